"""The convolutions of G and D, computed as matrix products where that is faster.

The layers between a vector and the 4x4 map are always matrix products: convolution kernels take
several times as long for them. The strided convolutions in between are PyTorch's own, except for
the weight gradient of wide layers on the CPU, in bf16 and without autocast. There oneDNN runs at a
quarter to three quarters of the speed of a matrix product (``benchmarks/step.py``), so the gradient
is computed as one product: the same sums of the same factors, accumulated in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import conv2d, conv_transpose2d, linear, pad

MIN_CHANNELS = 512
"""Channels of the smaller map from which on the weight gradient is a matrix product.

With fewer, on a Zen 4 processor, copying the patches took as long as the product saved.
"""


class FromVector(nn.ConvTranspose2d):
    """The first layer of G, "project and reshape" in the paper, as one matrix product."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 4) -> None:
        super().__init__(in_channels, out_channels, size, 1, 0, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the map: (N, in, 1, 1) float -> (N, out, size, size), in the weight's layout."""
        values, (_, channels, *size) = x.flatten(1), self.weight.shape
        if _is_nhwc(self.weight):
            maps = values @ self.weight.permute(0, 2, 3, 1).flatten(1)
            return maps.view(-1, *size, channels).permute(0, 3, 1, 2)
        return (values @ self.weight.flatten(1)).view(-1, channels, *size)


class ToVector(nn.Conv2d):
    """The last layer of D: each output is the product of the last map and one weight vector."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 4) -> None:
        super().__init__(in_channels, out_channels, size, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs: (N, in, size, size) float -> (N, out, 1, 1)."""
        weight = self.weight
        if _is_nhwc(x):
            x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return linear(x.flatten(1), weight.flatten(1))[:, :, None, None]


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def has_tangent(x: Tensor) -> bool:
    """Return whether a forward-mode derivative is computed with x."""
    return unpack_dual(x).tangent is not None


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` without running statistics, whose forward-mode derivative is right.

    PyTorch's own treats the batch's mean and variance as constants where that derivative is
    differentiated again, in the weights (``tests/training/test_penalties.py``).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map, in the shape and dtype of x: (N, channels, h, w) float."""
        if torch.compiler.is_compiling() or not has_tangent(x):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            centred = wide - wide.mean(dim=(0, 2, 3), keepdim=True)
            variance = centred.square().mean(dim=(0, 2, 3), keepdim=True)
            gain, shift = self.weight[:, None, None], self.bias[:, None, None]
            return (centred * (variance + self.eps).rsqrt() * gain + shift).to(x.dtype)


class Down(nn.Conv2d):
    """``nn.Conv2d`` that halves a map: stride 2, padding (kernel - 1) // 2."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, bias: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, 2, (kernel - 1) // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller map: (N, in, 2h, 2w) float -> (N, out, h, w)."""
        dtype = _dtype_of_product(self.weight, x)
        if self.bias is not None or dtype is None:
            return super().forward(x)
        y: Tensor = _StridedConvolution.apply(x.to(dtype), self.weight.to(dtype), False)
        return y


class Up(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that doubles a map, for kernels of 4 and 5."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        padding = (kernel - 1) // 2
        super().__init__(in_channels, out_channels, kernel, 2, padding, kernel % 2, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the larger map: (N, in, h, w) float -> (N, out, 2h, 2w)."""
        if (dtype := _dtype_of_product(self.weight, x)) is None:
            return super().forward(x, output_size)
        y: Tensor = _StridedConvolution.apply(x.to(dtype), self.weight.to(dtype), True)
        return y


def _dtype_of_product(weight: Tensor, x: Tensor) -> torch.dtype | None:
    """Return the dtype of a convolution whose weight gradient is a matrix product; None: no."""
    if (
        weight.shape[0] < MIN_CHANNELS
        or x.device.type != "cpu"
        or not (weight.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or has_tangent(x)  # _StridedConvolution has no forward mode
    ):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return weight.dtype
    return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


class _StridedConvolution(torch.autograd.Function):
    """A strided convolution with weight (O, C, k, k), or a transposed one with ``up``.

    It maps (N, C, 2h, 2w) to (N, O, h, w), and back with ``up``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, up: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.up = up
        return _strided_convolution(x, weight, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        # The gradient of a convolution's input is a transposed convolution, and vice versa.
        x_gradient = (
            _strided_convolution(gradient, weight, not ctx.up) if ctx.needs_input_grad[0] else None
        )
        large, small = (gradient, x) if ctx.up else (x, gradient)
        return x_gradient, weight_gradient(large, small, weight.shape[-1]), None


def _strided_convolution(x: Tensor, weight: Tensor, up: bool) -> Tensor:
    kernel = weight.shape[-1]
    padding = (kernel - 1) // 2
    if up:
        return conv_transpose2d(x, weight, None, 2, padding, kernel % 2)
    return conv2d(x, weight, None, 2, padding)


def weight_gradient(large: Tensor, small: Tensor, kernel: int) -> Tensor:
    """Return the weight gradient of ``Down`` or ``Up`` as one matrix product.

    Args:
        large: (N, C, 2h, 2w), the input of ``Down`` or the output gradient of ``Up``.
        small: (N, O, h, w), the output gradient of ``Down`` or the input of ``Up``.
        kernel: k, 4 or 5.

    Returns:
        (O, C, k, k): sum over n, y, x of small[n, o, y, x] * large[n, c, 2y+i-p, 2x+j-p], where
        p = (k - 1) // 2. Differentiable.
    """
    channels, outputs, before = large.shape[1], small.shape[1], (kernel - 1) // 2
    after = kernel - 2 - before
    rows = pad(large.permute(0, 2, 3, 1), (0, 0, before, after, before, after))
    # (N, h, w, k, k, C): the patch of the large map under each position of the small one.
    patches = rows.unfold(1, kernel, 2).unfold(2, kernel, 2).permute(0, 1, 2, 4, 5, 3)
    patches = patches.reshape(-1, kernel * kernel * channels)
    product = small.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ patches
    return product.view(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)

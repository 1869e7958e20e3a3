"""The convolutions of both networks, written as matrix products where that is faster.

At the two ends, between a vector and the 4x4 map, they are matrix products: a convolution's kernels
take several times as long for them. In between they are strided.

Where a layer is wide on both sides, as next to the 4x4 map, oneDNN's gradient of the weight is
slow: in bf16 it runs at a quarter to three quarters of the speed of a matrix product
(``benchmarks/step.py``). So one product computes it here: the same sums, of bf16 factors, in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, linear, pad

# Of the smaller map. With fewer, on a Zen 4 processor, copying the windows cost what was gained.
MANY_CHANNELS = 512


class FromVector(nn.ConvTranspose2d):
    """The first layer of G, the paper's "project and reshape": one matrix product."""

    def __init__(self, before: int, width: int, size: int = 4) -> None:
        super().__init__(before, width, size, 1, 0, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, before, 1, 1) float -> (N, width, size, size), laid out as the weight is."""
        values, (_, width, *size) = x.flatten(1), self.weight.shape
        if _is_nhwc(self.weight):
            maps = values @ self.weight.permute(0, 2, 3, 1).flatten(1)
            return maps.view(-1, *size, width).permute(0, 3, 1, 2)
        return (values @ self.weight.flatten(1)).view(-1, width, *size)


class ToVector(nn.Conv2d):
    """The last layer of D: all of the last map by one vector for each output."""

    def __init__(self, before: int, width: int, size: int = 4) -> None:
        super().__init__(before, width, size, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, size, size) float -> (N, width, 1, 1)."""
        weight = self.weight
        if _is_nhwc(x):
            x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return linear(x.flatten(1), weight.flatten(1))[:, :, None, None]


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Down(nn.Conv2d):
    """``nn.Conv2d`` that halves a map: stride 2, padding (kernel - 1) // 2."""

    def __init__(self, before: int, width: int, kernel: int, *, bias: bool = False) -> None:
        super().__init__(before, width, kernel, 2, (kernel - 1) // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, 2h, 2w) float -> (N, width, h, w)."""
        if self.bias is not None or not _as_a_product(self.weight, x):
            return super().forward(x)
        y: Tensor = _Strided.apply(x.bfloat16(), self.weight.bfloat16(), False)
        return y


class Up(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that exactly doubles a map, for kernels of 4 and 5."""

    def __init__(self, before: int, width: int, kernel: int) -> None:
        padding = (kernel - 1) // 2
        super().__init__(before, width, kernel, 2, padding, kernel % 2, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, before, h, w) float -> (N, width, 2h, 2w)."""
        if not _as_a_product(self.weight, x):
            return super().forward(x, output_size)
        y: Tensor = _Strided.apply(x.bfloat16(), self.weight.bfloat16(), True)
        return y


def _as_a_product(weight: Tensor, x: Tensor) -> bool:
    return (
        weight.shape[0] >= MANY_CHANNELS
        and x.device.type == "cpu"
        and weight.requires_grad
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class _Strided(torch.autograd.Function):
    """Between maps (N, C, 2h, 2w) and (N, O, h, w), weight (O, C, k, k): down, or ``up``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, up: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.up = up
        return _strided(x, weight, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        # The gradient of the input goes the other way by the same weight.
        of_x = _strided(gradient, weight, not ctx.up) if ctx.needs_input_grad[0] else None
        large, small = (gradient, x) if ctx.up else (x, gradient)
        return of_x, weight_gradient(large, small, weight.shape[-1]), None


def _strided(x: Tensor, weight: Tensor, up: bool) -> Tensor:
    kernel = weight.shape[-1]
    padding = (kernel - 1) // 2
    if up:
        return conv_transpose2d(x, weight, None, 2, padding, kernel % 2)
    return conv2d(x, weight, None, 2, padding)


def weight_gradient(large: Tensor, small: Tensor, kernel: int) -> Tensor:
    """Gradient of the weight between two maps, one side's values by the other side's gradients.

    Args:
        large: (N, C, 2h, 2w): input of ``Down``, or gradient of the output of ``Up``.
        small: (N, O, h, w): gradient of the output of ``Down``, or input of ``Up``.
        kernel: k, 4 or 5.

    Returns:
        (O, C, k, k): sum over n, y, x of small[n, o, y, x] * large[n, c, 2y+i-p, 2x+j-p], where
        p = (k - 1) // 2. Differentiable.
    """
    channels, width, before = large.shape[1], small.shape[1], (kernel - 1) // 2
    after = kernel - 2 - before
    rows = pad(large.permute(0, 2, 3, 1), (0, 0, before, after, before, after))
    # (N, h, w, k, k, C): the windows that the positions of the small map have seen.
    windows = rows.unfold(1, kernel, 2).unfold(2, kernel, 2).permute(0, 1, 2, 4, 5, 3)
    seen = windows.reshape(-1, kernel * kernel * channels)
    product = small.permute(0, 2, 3, 1).reshape(-1, width).t() @ seen
    return product.view(width, kernel, kernel, channels).permute(0, 3, 1, 2)

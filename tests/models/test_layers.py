"""Layers that are computed as matrix products, against PyTorch's own convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.layers import Down, FromVector, ToVector, Up, _StridedConvolution
from pipeline.models.noise import rng

KERNELS = pytest.mark.parametrize("kernel", [4, 5])


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=rng(0, "test", sum(shape)), dtype=dtype)
    return made.requires_grad_()


@KERNELS
@pytest.mark.parametrize("up", [False, True])
def test_first_and_second_derivatives(kernel: int, up: bool) -> None:
    """Both gradients, and the gradients of those (R1 needs them), by finite differences."""
    x = numbers(2, *((4, 4, 4) if up else (3, 8, 8)), dtype=torch.double)
    weight = numbers(4, 3, kernel, kernel, dtype=torch.double)
    assert torch.autograd.gradcheck(_StridedConvolution.apply, (x, weight, up), fast_mode=True)
    assert torch.autograd.gradgradcheck(_StridedConvolution.apply, (x, weight, up), fast_mode=True)


def ours_and_theirs(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer of ours, and PyTorch's own class with the same weight."""
    kind = nn.Conv2d if isinstance(layer, Down) else nn.ConvTranspose2d
    options = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)
    more = {"output_padding": layer.output_padding} if isinstance(layer, Up) else {}
    theirs = kind(*options, layer.padding, bias=layer.bias is not None, **more)
    theirs.load_state_dict(layer.state_dict())
    return layer, theirs


@KERNELS
@pytest.mark.parametrize(
    "layer",
    [
        lambda k: Down(16, 24, k),
        lambda k: Down(16, 512, k),
        lambda k: Down(16, 512, k, bias=True),
        lambda k: Up(24, 16, k),
        lambda k: Up(512, 16, k),
    ],
)
@pytest.mark.parametrize("bf16", [True, False])
def test_a_layer_is_that_of_pytorch(
    kernel: int, layer: Callable[[int], Down | Up], bf16: bool
) -> None:
    """Same images bit for bit; gradients as near to float64's as PyTorch's in that precision."""
    layers = ours_and_theirs(layer(kernel))
    x = numbers(8, layers[0].in_channels, *[8 if isinstance(layers[0], Down) else 4] * 2)
    images, gradients = [], []
    for layer, dtype in ((layers[0], x.dtype), (layers[1], x.dtype), (layers[1], torch.double)):
        layer.to(dtype).zero_grad()
        leaf = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and dtype != torch.double):
            y = layer(leaf)
        y.to(dtype).square().sum().backward()
        images.append(y.detach())
        gradients.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert images[0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(images[0], images[1])
    for ours, theirs, exact in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        slack = (0.004 if bf16 else 2e-6) * exact.abs().max()
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + slack


def test_where_the_product_is_used() -> None:
    """On wide layers while weights are learnt; not with biases, frozen, or in fp16."""
    layer, x = Down(3, 512, 4), numbers(2, 3, 8, 8)

    def way(layer: Down = layer) -> str:
        return str(layer(x).grad_fn)

    with torch.autocast("cpu", torch.bfloat16):
        assert "_StridedConvolution" in way()
        assert "_StridedConvolution" not in way(Down(3, 256, 4))
        assert "_StridedConvolution" not in way(Down(3, 512, 4, bias=True))
        with torch.no_grad():
            assert layer(x).grad_fn is None
        layer.requires_grad_(False)
        assert "_StridedConvolution" not in way()
        layer.requires_grad_(True)
    assert "_StridedConvolution" in way()
    with torch.autocast("cpu", torch.float16):
        assert "_StridedConvolution" not in way()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ours", [FromVector(10, 8), ToVector(8, 3)])
def test_between_vector_and_map(ours: nn.Module, layout: torch.memory_format) -> None:
    """Values, gradients and layout are those of the convolution."""
    project = isinstance(ours, FromVector)
    theirs = (nn.ConvTranspose2d if project else nn.Conv2d)(
        ours.in_channels, ours.out_channels, 4, bias=False
    )
    theirs.load_state_dict(ours.state_dict())
    x = numbers(5, *((10, 1, 1) if project else (8, 4, 4)))
    made, gradients = [], []
    for layer in (ours, theirs):
        layer.to(memory_format=layout).zero_grad()
        x.grad = None
        y = layer(x if project else x.to(memory_format=layout))
        y.square().sum().backward()
        made.append(y)
        gradients.append((x.grad.clone(), layer.weight.grad))
    torch.testing.assert_close(*made)
    assert made[0].is_contiguous(memory_format=layout if project else torch.contiguous_format)
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert gradients[0][1].is_contiguous(memory_format=layout)

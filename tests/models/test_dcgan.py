"""The networks against the rules of Radford et al. 2016 and against counts made by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.models.dcgan import (
    Discriminator,
    Generator,
    init_weights,
    make_discriminator,
    make_generator,
    num_halvings,
    update_ema,
)
from pipeline.models.layers import BatchNorm, Down, FromVector, ToVector, Up
from pipeline.models.noise import rng

SIZES = [32, 64, 128, 256]
EVERY = [(size, kernel, channels) for size in SIZES for kernel in (4, 5) for channels in (1, 3)]
both = pytest.mark.parametrize("network", [Generator, Discriminator])


def small(**values: Any) -> ModelConfig:
    return ModelConfig(
        **({"image_size": 32, "channels": 1, "z_dim": 8, "ngf": 4, "ndf": 4} | values)
    )


def made(network: type[nn.Module], config: ModelConfig, seed: int = 0) -> nn.Module:
    made = network(config)
    init_weights(made, rng(seed, "test"))
    return made


def shapes(network: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The output shape of every layer by name, without the batch."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in network.layers.named_children():
        x = layer(x)
        found[name] = tuple(x.shape[1:])
    return found


@pytest.mark.parametrize(("size", "kernel", "channels"), EVERY)
def test_every_layer_doubles_or_halves(size: int, kernel: int, channels: int) -> None:
    """G: 4x4, 8x8, ... S; D: S/2, ... 4x4, one logit; widths halve or double at each step."""
    config = small(image_size=size, kernel_size=kernel, channels=channels)
    n = num_halvings(config)
    assert 4 * 2**n == size
    with torch.no_grad():
        g = shapes(Generator(config), torch.zeros(2, config.z_dim, 1, 1))
        d = shapes(Discriminator(config), torch.zeros(2, channels, size, size))
        assert Generator(config)(torch.zeros(2, config.z_dim)).shape == (2, channels, size, size)
        assert Discriminator(config)(torch.zeros(2, channels, size, size)).shape == (2,)
    for k in range(n):
        width, edge = 4 * 2**k, size // 2 ** (k + 1)
        assert g[f"relu_{edge}"] == (width, edge, edge)
        assert d[f"leaky_{edge}"] == (width, edge, edge)
    assert g["project"] == (4 * 2 ** (n - 1), 4, 4)
    assert g["tanh"] == (channels, size, size)
    assert d["to_logit"] == (1, 1, 1)


def test_figure_1_of_the_paper() -> None:
    """z 100 -> 1024x4x4 -> 512x8x8 -> 256x16x16 -> 128x32x32 -> 3x64x64."""
    config = ModelConfig(ngf=128, kernel_size=5)
    with torch.no_grad():
        found = shapes(Generator(config), torch.zeros(2, 100, 1, 1))
    maps = [found[f"relu_{edge}"] for edge in (4, 8, 16, 32)] + [found["tanh"]]
    assert maps == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]


@pytest.mark.parametrize(("size", "kernel", "channels"), EVERY)
def test_parameter_counts_by_hand(size: int, kernel: int, channels: int) -> None:
    """G: z*w*16 + sum w_i*w_{i+1}*k^2 + 2 sum w_i; D: the mirror, no BatchNorm on its input."""
    config = small(image_size=size, kernel_size=kernel, channels=channels, ngf=5, ndf=3, z_dim=7)
    n = {32: 3, 64: 4, 128: 5, 256: 6}[size]
    k2 = kernel * kernel
    g = [5 * 2**i for i in range(n)][::-1]
    d = [3 * 2**i for i in range(n)]
    g_count = 7 * g[0] * 16 + sum(a * b * k2 for a, b in pairwise([*g, channels])) + 2 * sum(g)
    d_count = sum(a * b * k2 for a, b in pairwise([channels, *d])) + 2 * sum(d[1:]) + d[-1] * 16
    assert sum(p.numel() for p in Generator(config).parameters()) == g_count
    assert sum(p.numel() for p in Discriminator(config).parameters()) == d_count


def test_the_usual_64_pixel_network_has_the_known_size() -> None:
    """nz 100, ngf = ndf = 64, kernel 4: 3,576,704 and 2,765,568, as PyTorch's DCGAN example."""
    config = ModelConfig()
    assert sum(p.numel() for p in Generator(config).parameters()) == 3_576_704
    assert sum(p.numel() for p in Discriminator(config).parameters()) == 2_765_568


@pytest.mark.parametrize("size", SIZES)
def test_the_architecture_guidelines(size: int) -> None:
    """No pooling, no dense layer, no bias before BatchNorm; BatchNorm and activations in place."""
    config = small(image_size=size)
    n = num_halvings(config)
    assert issubclass(FromVector, nn.ConvTranspose2d)
    assert issubclass(Up, nn.ConvTranspose2d)
    assert issubclass(Down, nn.Conv2d)
    assert issubclass(ToVector, nn.Conv2d)
    up, down = [nn.BatchNorm2d, nn.ReLU, Up], [Down, BatchNorm, nn.LeakyReLU]
    g, d = (list(network(config).layers) for network in (Generator, Discriminator))
    assert [type(layer) for layer in g] == [FromVector, *up * n, nn.Tanh]
    assert [type(layer) for layer in d] == [Down, nn.LeakyReLU, *down * (n - 1), ToVector]
    convolutions = [layer for layer in g + d if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert all(layer.bias is None for layer in convolutions)
    strides = [layer.stride for layer in convolutions]
    assert strides == [(1, 1)] + [(2, 2)] * n + [(2, 2)] * n + [(1, 1)]
    assert all(layer.negative_slope == 0.2 for layer in d if isinstance(layer, nn.LeakyReLU))
    assert all(layer.affine for layer in g + d if isinstance(layer, nn.BatchNorm2d))


@pytest.mark.parametrize("kernel", [4, 5])
def test_every_input_pixel_and_every_z_counts(kernel: int) -> None:
    """No border or component is cut off: each has a gradient, and each output pixel varies."""
    config = small(kernel_size=kernel)
    x = torch.randn(3, 1, 32, 32, generator=rng(0, "x")).requires_grad_()
    made(Discriminator, config)(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
    z = torch.randn(3, 8, generator=rng(0, "z")).requires_grad_()
    images = made(Generator, config)(z)
    assert (images.std(dim=0) > 0).all()
    images.square().sum().backward()
    assert z.grad is not None
    assert (z.grad != 0).all()


def test_output_range() -> None:
    """Images lie in [-1, 1] whatever z is; logits are not squashed."""
    config = small()
    G, D = made(Generator, config), made(Discriminator, config)
    with torch.no_grad():
        images = G(100 * torch.randn(16, 8, generator=rng(0, "z")))
        logits = D(torch.randn(64, 1, 32, 32, generator=rng(0, "x")) * 1000)
    assert images.abs().max() <= 1
    assert images.abs().max() > 0
    assert logits.min() < 0 < logits.max()


@both
def test_init_is_the_papers(network: type[nn.Module]) -> None:
    """Weights N(0, 0.02), gains N(1, 0.02), shifts 0 (section 4, and the authors' code)."""
    layers = made(network, ModelConfig(image_size=64, ngf=64, ndf=64)).layers
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            n = layer.weight.numel()
            assert layer.weight.mean().abs() < 5 * 0.02 / n**0.5
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            n = layer.weight.numel()
            assert (layer.weight.mean() - 1).abs() < 5 * 0.02 / n**0.5
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
            assert not layer.bias.any()


@pytest.mark.parametrize("kernel", [4, 5])
def test_a_d_without_normalisation_keeps_the_scale_of_its_input(kernel: int) -> None:
    """He et al. 2015: the mean square of each feature map is that of the layer's input, within the
    noise of one draw and of padding; biases are 0 and no layer is BatchNorm. With the paper's
    N(0, 0.02) it would fall by orders of magnitude.
    """
    config = small(image_size=64, ndf=32, kernel_size=kernel, d_norm="none", channels=3)
    D = made(Discriminator, config)
    x = torch.randn(8, 3, 64, 64, generator=rng(0, "x"))
    sizes = [x.square().mean().item()]
    for layer in D.layers:
        assert not isinstance(layer, nn.BatchNorm2d)
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU | ToVector):
            sizes.append(x.square().mean().item())
        if isinstance(layer, Down):
            assert layer.bias is not None
            assert not layer.bias.any()
    assert all(0.3 < after / before < 2 for before, after in pairwise(sizes[:-1]))
    assert 0.05 < sizes[-1] < 5


@both
def test_weights_are_a_function_of_the_seed(network: type[nn.Module]) -> None:
    """Same seed, same weights, whatever the global RNG did; another seed, others everywhere."""
    torch.manual_seed(1)
    first = made(network, small())
    torch.manual_seed(2)
    torch.rand(10)
    again, other = made(network, small()), made(network, small(), seed=1)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or not a.any()  # shifts are zero


@both
def test_training_networks_hold_parameters_only(network: type[nn.Module]) -> None:
    """No buffers, so no state that ranks or histories could differ in; the same in eval mode."""
    config = small()
    one = made(network, config)
    assert not list(one.buffers())
    assert set(one.state_dict()) == {name for name, _ in one.named_parameters()}
    shape = (4, 8) if network is Generator else (4, 1, 32, 32)
    x = torch.randn(shape, generator=rng(0, "x"))
    with torch.no_grad():
        assert torch.equal(one.train()(x), one.eval()(x))


def test_d_takes_the_class_in_by_projection() -> None:
    """D(x, y) = D(x) + <v_y, phi(x)>, phi the last feature map (Miyato & Koyama 2018)."""
    D = made(Discriminator, small(num_classes=3))
    x, y = torch.randn(6, 1, 32, 32, generator=rng(0, "x")), torch.tensor([2, 0, 1, 1, 2, 0])
    with torch.no_grad():
        phi = D.layers[:-1](x).flatten(1)
        own, *of_classes = D.layers.to_logit.weight.flatten(1)
        torch.testing.assert_close(D(x), phi @ own)
        by_hand = (torch.stack(of_classes)[y] * phi).sum(1)
        torch.testing.assert_close(D(x, y) - D(x), by_hand)
    assert (by_hand != 0).all()


def test_the_mlp_d_takes_the_class_as_one_hot_inputs() -> None:
    """All weights 0 but one way: from input k behind the pixels, times k + 1, to D(x, k)."""
    D = make_discriminator(small(architecture="mlp", num_classes=3))
    with torch.no_grad():
        for weights in D.parameters():
            weights.zero_()
        D.hidden[0].weight[0, 32 * 32 :] = torch.tensor([1.0, 2.0, 3.0])
        D.hidden[1].weight[0, 0] = D.to_logit.weight[0, 0] = 1
        x = torch.randn(4, 1, 32, 32, generator=rng(0, "x"))
        assert D(x, torch.tensor([0, 1, 2, 0])).tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("architecture", ["dcgan", "mlp"])
def test_g_sees_the_class_through_its_own_weights(architecture: str) -> None:
    """The same z of two classes differs exactly while the weights of the one-hot inputs do."""
    G = make_generator(small(architecture=architecture, num_classes=2))
    init_weights(G, rng(0, "test"))
    z = torch.randn(3, 8, generator=rng(0, "z"))
    first, second = (torch.cat([z, row.expand(3, 2)], 1) for row in torch.eye(2))
    weights = G.hidden[0].weight.T if architecture == "mlp" else G.layers.project.weight
    with torch.no_grad():
        assert not torch.equal(G(first), G(second))
        weights[8:] = weights[8:9].clone()
        assert torch.equal(G(first), G(second))


def test_running_statistics_are_added_beside_the_same_parameters() -> None:
    """Weights of training load into a G for sampling by name; only its statistics are missing."""
    config = small()
    train, sampler = Generator(config), Generator(config, running_stats=True)
    assert [n for n, _ in train.named_parameters()] == [n for n, _ in sampler.named_parameters()]
    missing, unexpected = sampler.load_state_dict(train.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {name for name, _ in sampler.named_buffers()}


@both
def test_sync_batchnorm_keeps_names_and_weights(network: type[nn.Module]) -> None:
    """A checkpoint is the same with and without SyncBatchNorm, which adds no buffers either."""
    one = made(network, small())
    before = {name: value.clone() for name, value in one.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(one)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
    assert not any(type(layer) in (nn.BatchNorm2d, BatchNorm) for layer in converted.modules())
    after = converted.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(converted.buffers())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_formula(decay: float) -> None:
    """ema_t = decay * ema_{t-1} + (1 - decay) * w_t, for each parameter; w is left alone."""
    config = small()
    averaged, network = made(Generator, config, 0), made(Generator, config, 1)
    weights = [p.detach().clone() for p in network.parameters()]
    expected = [p.detach().clone() for p in averaged.parameters()]
    for _ in range(3):
        update_ema(averaged, network, decay)
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    torch.testing.assert_close(list(averaged.parameters()), expected)
    if decay == 0:
        assert all(map(torch.equal, averaged.parameters(), network.parameters()))
    assert all(map(torch.equal, network.parameters(), weights))

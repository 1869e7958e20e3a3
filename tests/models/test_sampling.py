"""Noise and images are functions of (seed, purpose, index) and the weights, and of nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.models import noise
from pipeline.models.dcgan import Discriminator, Generator, init_weights
from pipeline.models.noise import BLOCK, BY_BATCH, BY_ROW, draw_z, rng, training_z, z_rows
from pipeline.models.sampling import (
    STATISTICS_BATCHES,
    draw_images,
    image_grid,
    make_sampler,
    to_uint8,
)

MODEL = ModelConfig(image_size=32, channels=3, z_dim=8, ngf=8, ndf=8)
UNIFORM = ModelConfig(z_dim=4)
NORMAL = ModelConfig(z_dim=4, z_distribution="normal")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A generator's weights, made livelier than at the start so that images differ visibly."""
    G = Generator(MODEL)
    init_weights(G, rng(0, "test"))
    with torch.no_grad():
        for p in G.parameters():
            p.mul_(4.0)
    return G.state_dict()


@pytest.fixture(scope="module")
def G(weights: dict[str, Tensor]) -> Generator:
    return make_sampler(MODEL, weights)


# -- noise --------------------------------------------------------------------------------------


def test_seeds_are_frozen() -> None:
    """Another number here would break every resume across versions: it needs a migration."""
    assert rng(0, "z", 0).initial_seed() == 4251995223362909821
    assert rng(7, "weights of G").initial_seed() == 7375035343110332834
    assert rng(0, "standing", 3).initial_seed() == 5215130352550247636


def test_uniform_noise_is_frozen() -> None:
    """The z of a batch and of the grids, bit for bit."""
    drawn = [
        [-0.7045032978057861, 0.9257956743240356, 0.6431866884231567, 0.13144159317016602],
        [-0.2847813367843628, 0.3130662441253662, 0.9233884811401367, 0.25932300090789795],
        [-0.8093656301498413, -0.5726418495178223, 0.4530766010284424, -0.5987865924835205],
    ]
    rows = [
        [0.8777165412902832, 0.7383825778961182, 0.020800471305847168, 0.6323002576828003],
        [-0.03148317337036133, -0.9757190942764282, 0.8137354850769043, 0.7486890554428101],
    ]
    assert draw_z(UNIFORM, 3, rng(0, "z", 5)).tolist() == drawn
    assert z_rows(UNIFORM, 1, "grid", 63, 2).tolist() == rows


def test_normal_noise_is_frozen() -> None:
    """Up to the last bits, in which processors' vector units may round logarithms differently."""
    first_and_last = [
        [0.46704795956611633, 0.5806877017021179, -0.2727154493331909, 0.394429475069046],
        [0.04986170306801796, 0.2644936442375183, 0.5578873753547668, -2.5475800037384033],
    ]
    rows = [
        [-0.27932634949684143, -0.7148181796073914, -0.0711941048502922, -0.19493639469146729],
        [0.01116722822189331, -0.15122710168361664, 2.17679762840271, 1.6243222951889038],
    ]
    drawn = draw_z(NORMAL, 16, rng(0, "z", 5))[[0, 15]]
    torch.testing.assert_close(drawn, torch.tensor(first_and_last), rtol=1e-5, atol=1e-6)
    table = z_rows(NORMAL, 1, "grid", 63, 2)
    torch.testing.assert_close(table, torch.tensor(rows), rtol=1e-5, atol=1e-6)


def test_seed_purpose_and_index_all_matter() -> None:
    """Each argument changes the numbers, and arguments cannot run into each other."""
    arguments = [(0, "z", 0), (1, "z", 0), (0, "grid", 0), (0, "z", 1), (0, "z|1", 0), (2**62, "z")]
    drawn = [torch.rand(4, generator=rng(*a)).tolist() for a in arguments]
    assert len({tuple(values) for values in drawn}) == len(arguments)
    assert torch.rand(4, generator=rng(0, "z", 0)).tolist() == drawn[0]


def test_a_batch_of_noise_cut_by_ranks_is_the_batch_of_one_process() -> None:
    """As the loop does it: each rank draws the rows of its positions, by either rule."""
    for rule in (BY_ROW, BY_BATCH):
        complete = training_z(MODEL, 3, 17 * 240, 240, 240, rule)
        for ranks in (2, 3, 4):
            n = 240 // ranks
            cut = [training_z(MODEL, 3, 17 * 240 + r * n, n, 240, rule) for r in range(ranks)]
            assert torch.equal(torch.cat(cut), complete)


def test_a_rank_draws_its_own_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of 8192 rows costs sixteen blocks of 64; the older rule drew all rows."""
    drawn = []
    monkeypatch.setattr(noise, "draw_z", lambda *words: drawn.append(words[1]) or draw_z(*words))
    for rule in (BY_ROW, BY_BATCH):
        training_z(MODEL, 0, 3 * 8192 + 1024, 1024, 8192, rule)
    assert drawn == [*[BLOCK] * 16, 8192]


def test_the_noise_of_training_is_frozen() -> None:
    """Positions 63 and 64, in two blocks; and position 2 of batch 5 of 3 by the older rule."""
    rows = [
        [0.44518065452575684, -0.07417690753936768, -0.4318079948425293, -0.9111365079879761],
        [-0.9706686735153198, -0.4624830484390259, -0.4993596076965332, 0.2758007049560547],
    ]
    before = [[-0.8093656301498413, -0.5726418495178223, 0.4530766010284424, -0.5987865924835205]]
    assert training_z(UNIFORM, 1, 63, 2, 32).tolist() == rows
    assert training_z(UNIFORM, 0, 17, 1, 3, BY_BATCH).tolist() == before
    assert rng(0, "z rows", 0).initial_seed() == 5376992202600717676


@pytest.mark.parametrize("model", [UNIFORM, NORMAL], ids=["uniform", "normal"])
def test_the_distribution_is_the_configured_one(model: ModelConfig) -> None:
    """Uniform on [-1, 1): variance 1/3; or standard normal; both centred."""
    z = draw_z(model, 20_000, rng(0, "moments"))
    assert z.dtype == torch.float32
    assert z.mean().abs() < 0.02
    assert z.var().item() == pytest.approx(1 / 3 if model is UNIFORM else 1, rel=0.03)
    assert bool(z.abs().max() <= 1) == (model is UNIFORM)


@given(
    start=st.integers(0, 3 * BLOCK),
    counts=st.lists(st.integers(0, 2 * BLOCK), min_size=1, max_size=5),
    normal=st.booleans(),
)
@settings(max_examples=50)
def test_any_cut_of_the_noise_table_gives_the_same_rows(
    start: int, counts: list[int], normal: bool
) -> None:
    """Pieces read one by one, at any offsets, are the rows read at once."""
    model = NORMAL if normal else UNIFORM
    complete = z_rows(model, 5, "cut", 0, start + sum(counts))
    assert complete.shape == (start + sum(counts), model.z_dim)
    for count in counts:
        assert torch.equal(z_rows(model, 5, "cut", start, count), complete[start : start + count])
        start += count


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, BLOCK, BLOCK + 1, 150])
def test_images_do_not_depend_on_the_batch(cut: int, G: Generator) -> None:
    """The images of pieces of z, put together, are the images of all of z, byte for byte."""
    z = z_rows(MODEL, 0, "images", 0, 150 if cut > 1 else 20)
    complete = draw_images(G, z)
    assert complete.shape == (len(z), 32, 32, 3)
    assert complete.dtype == np.uint8
    assert complete.std() > 10, "the images are too flat for this test to mean anything"
    pieces = [draw_images(G, piece) for piece in z.split(cut)]
    np.testing.assert_array_equal(np.concatenate(pieces), complete)


def test_no_noise_gives_no_images(G: Generator) -> None:
    """Zero rows are an empty array of the right shape: a rank without work is no special case."""
    assert draw_images(G, torch.empty(0, 8)).shape == (0, 32, 32, 3)


def test_images_ignore_autocast_and_build_no_graph(G: Generator) -> None:
    """Samples are fp32 even when asked for in the midst of bf16 training."""
    z = z_rows(MODEL, 0, "images", 0, 5)
    plain = draw_images(G, z)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(draw_images(G, z), plain)
    assert not any(p.requires_grad for p in G.parameters())


def test_samples_and_statistics_are_fp32_in_full(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TF32 and no kernels by trial, whatever training has set; and its settings come back."""
    cudnn, whole = torch.backends.cudnn, torch.backends
    operators: list[Any] = [cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]

    def now() -> tuple[object, ...]:
        precisions = [operator.fp32_precision for operator in operators]
        return cudnn.benchmark, cudnn.deterministic, *precisions

    seen: list[tuple[object, ...]] = []
    forward = Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda *x: (seen.append(now()), forward(*x))[1])
    before = now()
    try:
        cudnn.benchmark, cudnn.deterministic = True, False
        whole.fp32_precision = "tf32"  # type: ignore[attr-defined]
        training = now()
        draw_images(make_sampler(MODEL, weights), z_rows(MODEL, 0, "images", 0, 5))
        assert now() == training
    finally:
        whole.fp32_precision = "none"  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.deterministic = before[:2]
        for operator, precision in zip(operators, before[2:], strict=True):
            operator.fp32_precision = precision
    assert len(seen) > STATISTICS_BATCHES
    assert set(seen) == {(False, True, "ieee", "ieee", "ieee")}


def test_to_uint8_rounds_and_clamps() -> None:
    """-1 -> 0, 0 -> 128, 1 -> 255, to the nearest level in between, beyond to the ends; NHWC."""
    levels = torch.tensor([-1.0, 0.0, 1.0, -1.5, 7.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1])
    out = to_uint8(levels.view(1, 1, 1, -1))
    assert out.flatten().tolist() == [0, 128, 255, 0, 255, 100, 101]
    assert out.dtype == torch.uint8
    image = torch.zeros(2, 3, 4, 5)
    image[1, 2, 3, 4] = 1.0
    assert to_uint8(image).shape == (2, 4, 5, 3)
    assert to_uint8(image)[1, 3, 4, 2] == 255


@pytest.mark.parametrize("columns", [1, 3, 4])
def test_grid_layout(columns: int) -> None:
    """Image k lies at row k // columns, column k % columns; empty cells are black."""
    images = np.arange(1, 8, dtype=np.uint8)[:, None, None, None] * np.ones((7, 2, 3, 1), np.uint8)
    grid = image_grid(images, columns)
    rows = -(-7 // columns)
    assert grid.shape == (rows * 2, columns * 3, 1)
    for cell in range(rows * columns):
        y, x = cell // columns * 2, cell % columns * 3
        assert (grid[y : y + 2, x : x + 3] == (cell + 1 if cell < 7 else 0)).all()


# -- BatchNorm statistics -----------------------------------------------------------------------


def statistics(G: Generator) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in G.named_buffers()}


def test_statistics_are_a_function_of_the_weights(weights: dict[str, Tensor]) -> None:
    """Equal after other samplers were made and the global RNG moved, which itself is untouched."""
    first = statistics(make_sampler(MODEL, weights))
    torch.manual_seed(123)
    make_sampler(MODEL, {name: value * 0.5 for name, value in weights.items()})
    before = torch.random.get_rng_state()
    again = statistics(make_sampler(MODEL, weights))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_statistics_are_those_of_the_fixed_batches(weights: dict[str, Tensor]) -> None:
    """The first layer's are the mean over 16 batches of 64 of batch means and variances."""
    G = make_sampler(MODEL, weights)
    assert not G.training
    z = z_rows(MODEL, 0, "standing", 0, STATISTICS_BATCHES * BLOCK)
    with torch.no_grad():
        maps = [G.layers.project(batch[:, :, None, None]) for batch in z.split(BLOCK)]
    means = torch.stack([m.mean(dim=(0, 2, 3)) for m in maps]).mean(0)
    variances = torch.stack([m.var(dim=(0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(G.layers.norm_4.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(G.layers.norm_4.running_var, variances, rtol=1e-4, atol=1e-5)


def test_sampled_images_are_close_to_those_of_training(weights: dict[str, Tensor]) -> None:
    """With running statistics each image is near what a large training batch makes of its z."""
    train = Generator(MODEL)
    train.load_state_dict(weights)
    z = z_rows(MODEL, 9, "near", 0, 512)
    with torch.no_grad():
        of_training = train(z)
        of_sampling = make_sampler(MODEL, weights)(z)
    assert (of_sampling - of_training).abs().mean() < 0.05 * of_training.std()


def test_kept_statistics_are_used_as_they_are(G: Generator) -> None:
    """A snapshot carries its statistics: reading it recomputes nothing and is bitwise equal."""
    state = {name: value.clone() for name, value in G.state_dict().items()}
    state["layers.norm_4.running_mean"] += 1.0
    back = make_sampler(MODEL, state).state_dict()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_weights_of_another_architecture_are_refused(weights: dict[str, Tensor]) -> None:
    """D's weights, or a state with a layer missing, are no generator."""
    with pytest.raises(ValueError, match="another architecture"):
        make_sampler(MODEL, Discriminator(MODEL).state_dict())
    with pytest.raises(ValueError, match="another architecture"):
        make_sampler(MODEL, {name: w for name, w in weights.items() if "project" not in name})


def test_the_training_weights_are_left_alone(weights: dict[str, Tensor]) -> None:
    """A grid in the midst of training shares no memory with the networks that train."""
    G = make_sampler(MODEL, weights)
    shared = {p.data_ptr() for p in G.parameters()} & {w.data_ptr() for w in weights.values()}
    assert not shared

"""With train.exact_sum the number of ranks is no part of the result: one hash on 1, 2 and 4."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from launching import run, state_of, train
from ranks import on_ranks
from torch import Tensor, nn

from pipeline.config.recipe import POLICIES, StabilityConfig
from pipeline.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.config.sizes import micro_batching
from pipeline.models.noise import append_classes, draw_z, rng
from pipeline.runtime import launch
from pipeline.runtime.errors import NonFiniteLoss
from pipeline.training import gradients
from pipeline.training.finite_guard import LIMIT
from pipeline.training.gan import GAN
from pipeline.training.gradients import ExactMean
from pipeline.training.meter import Meter

BATCH, STEPS, CLASSES = 24, 3, 3
DCGAN = ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4)
PLAIN = Config(
    model=DCGAN,
    data=DataConfig(batch_size=BATCH),
    train=TrainConfig(precision="fp32", micro_batch=2, exact_sum=True),
)
ALL = replace(  # BatchNorm in D, two steps of D, R1 in every second of them, DiffAugment, classes
    PLAIN,
    model=replace(DCGAN, num_classes=CLASSES),
    optim=OptimConfig(d_steps=2),
    stability=StabilityConfig(r1_gamma=1.0, r1_every=2, augment=list(POLICIES)),
)
PAIRS = replace(
    PLAIN,
    model=replace(DCGAN, d_norm="spectral", loss="relativistic"),
    stability=StabilityConfig(r1_gamma=1.0, r2_gamma=1.0, penalty="along", penalty_share=0.5),
)
MLP = replace(PLAIN, model=replace(DCGAN, architecture="mlp", ngf=16, ndf=8, maxout=3, dropout=0.5))
CASES = {
    "plain": PLAIN,
    "six micro-batches, one a rank on four": replace(
        PLAIN, train=replace(PLAIN.train, micro_batch=6)
    ),
    "all at once": ALL,
    "tangent": replace(ALL, stability=replace(ALL.stability, penalty="tangent")),
    "relativistic": PAIRS,
    "mlp": MLP,
    "bf16": replace(ALL, train=replace(ALL.train, precision="bf16")),
}
FLOATS = replace(PLAIN, train=replace(PLAIN.train, exact_sum=False))


def trained(config: Config, steps: int = STEPS) -> GAN:
    """The networks after some steps of this rank."""
    return _trained(config, steps)[0]


def _trained(config: Config, steps: int) -> tuple[GAN, list[float]]:
    AcceleratorState._reset_state()  # one process, several precisions
    accelerator = launch.make_accelerator(config.train.precision)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batch, accumulation = micro_batching(config, ranks)
    gan = GAN(config, accelerator, accumulation)
    meter = Meter(accelerator, BATCH, exact=config.train.exact_sum)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    for step in range(1, steps + 1):
        terms = []
        for turn in range(config.optim.d_steps):
            number = step * config.optim.d_steps + turn
            x = torch.rand(BATCH, 1, 32, 32, generator=rng(0, "x", number))[rows] * 2 - 1
            labels = torch.arange(BATCH)[rows] % CLASSES
            z = draw_z(config.model, BATCH, rng(0, "z", number))[rows]
            noise = append_classes(config.model, z, labels).split(micro_batch)
            y = labels.split(micro_batch) if config.model.num_classes else None
            terms.append(gan.update_D(x.split(micro_batch), noise, step, y, turn))
        loss = gan.update_G(noise, step, y, x.split(micro_batch))
        gan.update_average(step)
        meter.add(loss, terms)
    row = meter.row(steps)
    return gan, [row[key] for key in ("loss/G", "loss/D", "scores/real", "scores/fake")]


def bits(gan: GAN, row: list[float]) -> str:
    """A SHA-256 of the networks, both optimizers and the logged means."""
    digest = hashlib.sha256(repr(row).encode())
    for network in gan.networks().values():
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
    for optimizer in gan.optimizers().values():
        for moments in optimizer.state_dict()["state"].values():
            for value in moments.values():
                digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def on_this_rank(folder: str) -> None:
    torch.set_num_threads(1)
    found = {name: bits(*_trained(config, STEPS)) for name, config in CASES.items()}
    found["floats"] = bits(*_trained(FLOATS, STEPS))
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    (Path(folder) / f"{rank}-of-{ranks}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_one_two_and_four_ranks_compute_the_same_bits(tmp_path: Path) -> None:
    """G, D, G_ema, Adam's moments and the logged means have one SHA-256, with everything that a
    training can have; the ordinary sum of floats has several.
    """
    for ranks in (1, 2, 4):
        on_ranks(ranks, on_this_rank, str(tmp_path))
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert len(found) == 1 + 2 + 4
    for name in CASES:
        assert len({one[name] for one in found.values()}) == 1, name
    assert len({one["floats"] for one in found.values()}) > 1
    assert len(set(found["0-of-1.json"].values())) == len(CASES) + 1


@pytest.mark.slow
def test_a_run_that_moves_between_numbers_of_ranks_ends_in_the_same_files(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """The real command: 4 ranks to step 2, 1 to step 4, 2 to step 6, against 1 rank to step 6. The
    files of G, D and G_ema have the same SHA-256, Adam's moments and the rows the same numbers.
    """
    settings = [*training_settings, "train.exact_sum=true", "train.log_every=1", "data.workers=0"]
    for name, legs in (("moved", ((4, 2), (1, 4), (2, 6))), ("still", ((1, 6),))):
        for ranks, steps in legs:
            end = f"train.total_steps={steps}"
            train(ranks, tiny_config, *settings, end, f"run.dir={tmp_path / name}")
    moved, still = tmp_path / "moved", tmp_path / "still"
    for network in ("G", "D", "G_ema"):
        file = f"checkpoints/step_00000006/{network}.safetensors"
        assert sha256(moved / file) == sha256(still / file)
    a, b = state_of(moved, 6), state_of(still, 6)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(moved) == losses(still)
    code, said = run(1, tiny_config, *training_settings, f"run.dir={moved}")
    assert code == 2
    assert "train.exact_sum: True -> False" in said
    code, said = run(1, tiny_config, *settings, "train.micro_batch=4", f"run.dir={moved}")
    assert code == 2
    assert "train.micro_batch: 8 -> 4" in said


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def losses(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith(("loss", "scores"))} for row in rows]


# -- the sum itself -----------------------------------------------------------------------------


class Weights(nn.Module):
    """Parameters whose gradients a test chooses, one of them in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(70_000))
        image = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
        self.b = nn.Parameter(image)
        self.c = nn.Parameter(torch.zeros(3))


def mean_of(batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float, float]:
    """What ExactMean leaves in the parameters, the mean term and the peak."""
    network, accelerator = Weights(), launch.make_accelerator("fp32")
    mean = ExactMean(accelerator, network, len(batches), 1)
    for k, batch in enumerate(batches):
        with mean.micro_batch(k):
            objective = sum((p * batch[name]).sum() for name, p in network.named_parameters())
            assert isinstance(objective, Tensor)
            mean.backward(objective, batch["c"][0])
    _, terms, peak = mean.finish()
    assert peak is not None
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return found, terms.item(), peak.item()


def drawn(count: int, scale: float = 1e-3) -> list[dict[str, Tensor]]:
    return [
        {
            name: torch.randn(p.shape, generator=rng(k, name)) * scale
            for name, p in Weights().named_parameters()
        }
        for k in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_mean_is_that_of_exact_arithmetic(count: int) -> None:
    """Against fractions: off by one rounding to the grid of 2^-50 and two to fp32 at most."""
    batches = drawn(count)
    found, term, peak = mean_of(batches)
    assert peak == max(float(one.abs().max()) for batch in batches for one in batch.values())
    grid = 2.0 ** ((count - 1).bit_length() - 50)
    for name in ("b", "c"):
        for place, got in enumerate(found[name].flatten().tolist()):
            values = [Fraction(batch[name].flatten()[place].item()) for batch in batches]
            right = float(sum(values) / count)
            assert abs(got - right) <= grid / 2 + 2**-22 * abs(right)
    assert term == found["c"][0].item()


def test_neither_order_nor_buckets_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of very different sizes, in other orders and other buckets."""
    batches = [one for scale in (1e-6, 1.0, 1e3) for one in drawn(2, scale)]
    right, term, _ = mean_of(batches)
    for bucket, chunk in ((2**20, 2**16), (1, 7), (100, 2**16)):
        monkeypatch.setattr(gradients, "BUCKET", bucket)
        monkeypatch.setattr(gradients, "CHUNK", max(chunk, 2**10))
        found, other, _ = mean_of(batches[::-1])
        assert all(torch.equal(found[name], right[name]) for name in right)
        assert other == term


def test_the_largest_sum_does_not_wrap() -> None:
    """Three micro-batches of the largest float below 2^13, and of its negative: the mean is it."""
    edge = float(torch.tensor(2.0**13).nextafter(torch.tensor(0.0)))
    batches = [{name: torch.full_like(v, edge) for name, v in drawn(1)[0].items()}] * 3
    for sign in (1, -1):
        found, term, peak = mean_of([{n: sign * v for n, v in one.items()} for one in batches])
        assert peak == edge < LIMIT
        assert all(bool((value == sign * edge).all()) for value in found.values())
        assert term == sign * edge


@pytest.mark.parametrize("value", [2.0**13, -(2.0**13), 1e30, math.nan, math.inf, -math.inf])
def test_what_does_not_fit_shows_in_the_peak(value: float) -> None:
    """One number of one micro-batch is enough."""
    batches = drawn(3)
    batches[1]["a"][69_999] = value
    peak = mean_of(batches)[2]
    assert not peak < LIMIT


def too_large(folder: str) -> None:
    """One step, then one in which only rank 1 has numbers that do not fit."""
    gan = trained(PLAIN, 1)
    before = bits(gan, [])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    micro_batch, accumulation = micro_batching(PLAIN, ranks)
    x = torch.ones(accumulation, micro_batch, 1, 32, 32)
    with torch.no_grad():
        scale = 1e8 if rank == 1 else 1.0
        dict(gan.D.named_parameters())["layers.to_logit.weight"].mul_(scale)
        before = bits(gan, [])
    try:
        gan.update_D(list(x), list(torch.ones(accumulation, micro_batch, 8)), 5)
        said = ""
    except NonFiniteLoss as error:
        said = str(error)
    same: Any = bits(gan, []) == before
    (Path(folder) / f"{rank}.json").write_text(json.dumps([said, same]))


@pytest.mark.slow
def test_a_gradient_that_does_not_fit_ends_all_ranks_before_the_step(tmp_path: Path) -> None:
    """A finite loss of 2^13 or more on rank 1 of 2: named there, and no weight has changed."""
    on_ranks(2, too_large, str(tmp_path))
    (zero, kept), (one, also_kept) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert kept
    assert also_kept
    assert "on another rank" in zero
    assert "loss/D or a gradient of it became NaN or reached 8192" in one
    assert "at step 5 on rank 1" in one

"""Two real processes under DDP: what is computed, what travels, and the fault that we avoid."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment, free_port
from ranks import on_ranks
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.config.sizes import micro_batching
from pipeline.models.noise import draw_z, rng
from pipeline.runtime import launch
from pipeline.training.gan import GAN

pytestmark = pytest.mark.slow
STEPS = 3
BATCH = 16
MICRO_BATCHES = [8, 4]  # one and two a rank and step
CONFIG = Config(
    model=ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4),
    data=DataConfig(batch_size=BATCH),
    train=TrainConfig(precision="fp32"),
)
Tensors = dict[str, Tensor]


def trained(config: Config) -> dict[str, Any]:
    """STEPS steps on this rank: gradients at each optimizer step, bytes sent, final weights."""
    accelerator = launch.make_accelerator("fp32")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batch, accumulation = micro_batching(config, ranks)
    gan = GAN(config, accelerator, accumulation)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    gradients: dict[str, list[Tensors]] = {"D": [], "G": []}
    sent: list[tuple[int, str, str, int]] = []
    now = (0, "")
    for name in ("D", "G"):
        network, optimizer = getattr(gan, name), getattr(gan, f"opt_{name}").optimizer
        optimizer.register_step_pre_hook(
            lambda *_, name=name, network=network: gradients[name].append(
                {key: p.grad.clone() for key, p in network.named_parameters()}
            )
        )
        if ranks > 1:

            def count(_, bucket, name=name):  # type: ignore[no-untyped-def]
                buffer = bucket.buffer()
                sent.append((*now, name, buffer.numel() * buffer.element_size()))
                return allreduce_hook(None, bucket)

            getattr(gan, f"_{name}").register_comm_hook(None, count)
    with all_reduced() if ranks > 1 else nullcontext() as travelled:
        for step in range(1, STEPS + 1):
            x = torch.rand(BATCH, 1, 32, 32, generator=rng(0, "x", step))[rows] * 2 - 1
            z = draw_z(config.model, BATCH, rng(0, "z", step))[rows]
            now = (step, "update_D")
            gan.update_D(x.split(micro_batch), z.split(micro_batch), step)
            now = (step, "update_G")
            gan.update_G(z.split(micro_batch), step)
    return {
        "weights": {name: network.state_dict() for name, network in gan.networks().items()},
        "gradients": gradients,
        "sent": sent,
        "travelled": travelled,
        "frozen": all(p.grad is None for p in gan.D.parameters()),
    }


@contextmanager
def all_reduced() -> Iterator[list[tuple[int, str]]]:
    """Numbers and type of every all-reduce in the block as gloo itself reports them, beside our
    hook.
    """
    found: list[tuple[int, str]] = []
    with torch.profiler.profile(record_shapes=True) as profile:
        yield found
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "gloo:all_reduce":
            (shape,), (kind,) = event.shapes(), event.dtypes()
            found.append((torch.Size(shape).numel(), kind))


def with_micro_batch(size: int) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, micro_batch=size))


def on_this_rank(folder: str) -> None:
    found = {size: trained(with_micro_batch(size)) for size in MICRO_BATCHES}
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    on_ranks(2, on_this_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=MICRO_BATCHES, ids="micro_batch {}".format)
def runs(request: pytest.FixtureRequest, two_ranks: list[dict[int, Any]]) -> dict[str, Any]:
    """The same three steps on two ranks and in one process, with the same micro-batches."""
    size = request.param
    return {"ranks": [rank[size] for rank in two_ranks], "alone": trained(with_micro_batch(size))}


def sizes(weights: dict[str, Tensors]) -> dict[str, int]:
    return {name: sum(w.numel() for w in weights[name].values()) for name in ("D", "G")}


def test_ranks_stay_bitwise_equal(runs: dict[str, Any]) -> None:
    """Two forward passes of D before one backward pass, three times: G, D and G_ema are the same
    on both ranks, and they have moved.
    """
    here, there = (rank["weights"] for rank in runs["ranks"])
    start = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    for name, network in start.networks().items():
        assert all(torch.equal(here[name][key], there[name][key]) for key in here[name])
        if name != "G_ema":  # not updated here
            assert not any(torch.equal(here[name][k], w) for k, w in network.state_dict().items())


def test_gradients_are_those_of_one_process(runs: dict[str, Any]) -> None:
    """The gradients of each step are the single process's with the same micro-batches, up to the
    order of sums: within 1e-5 of the largest in each tensor in the first step.

    Later, Adam has divided by roots of near-zero moments; 1e-3 bounds what that can have become.
    """
    ranks, alone = runs["ranks"], runs["alone"]
    for name in ("D", "G"):
        for step in range(STEPS):
            expected = alone["gradients"][name][step]
            for rank in ranks:
                for key, gradient in rank["gradients"][name][step].items():
                    scale = expected[key].abs().max().item()
                    assert scale > 0, key
                    tolerance = (1e-5 if step == 0 else 1e-3) * scale
                    torch.testing.assert_close(
                        gradient, expected[key], rtol=0, atol=tolerance, msg=f"{step} {name} {key}"
                    )


def test_each_gradient_travels_once(runs: dict[str, Any]) -> None:
    """Per step D's gradients are all-reduced once, in D's update, and G's once, in G's; nothing
    of D is computed or sent in G's update, however many micro-batches are accumulated.
    """
    for rank in runs["ranks"]:
        count = sizes(rank["weights"])
        for step in range(1, STEPS + 1):
            for update, own, other in (("update_D", "D", "G"), ("update_G", "G", "D")):
                sent = [row for row in rank["sent"] if row[:2] == (step, update)]
                assert sum(n for *_, name, n in sent if name == own) == 4 * count[own]
                assert not [row for row in sent if row[2] == other]
        assert rank["frozen"], "D has weight gradients from G's update"


def test_nothing_else_travels(runs: dict[str, Any]) -> None:
    """gloo's own record: both networks once a step and two flags of one number, no more."""
    for rank in runs["ranks"]:
        count = sizes(rank["weights"])
        assert rank["travelled"], "the profiler names all-reduces otherwise: adapt this test"
        assert sum(n for n, _ in rank["travelled"]) == STEPS * (count["D"] + count["G"] + 2)


# -- bf16 on the wire, and a resume --------------------------------------------------------------

WIDE = replace(CONFIG, model=replace(CONFIG.model, ngf=32, ndf=32))


def resumed_on_this_rank(folder: str) -> None:
    """Two steps and one more, by the same networks and by others that took over their state; in
    fp32 and in bf16, with what gloo has sent in the third step.
    """
    accelerator = launch.make_accelerator("fp32")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)

    def take(gan: GAN, step: int) -> None:
        x = torch.rand(BATCH, 1, 32, 32, generator=rng(0, "x", step))[rows] * 2 - 1
        z = draw_z(WIDE.model, BATCH, rng(0, "z", step))[rows]
        gan.update_D(x.split(2), z.split(2), step)
        gan.update_G(z.split(2), step)

    found: dict[str, Any] = {}
    for grad_dtype in ("fp32", "bf16"):
        train = replace(WIDE.train, micro_batch=2, grad_dtype=grad_dtype)
        config = replace(WIDE, train=train)
        through, resumed = (GAN(config, accelerator, BATCH // 2 // ranks) for _ in range(2))
        take(through, 1)
        take(through, 2)
        states = [one.state_dict() for one in through.optimizers().values()]
        weights = {name: one.state_dict() for name, one in through.networks().items()}
        resumed.load(weights, dict(zip(("G", "D"), copy.deepcopy(states), strict=True)))
        with all_reduced() as sent:
            take(through, 3)
        take(resumed, 3)
        found[grad_dtype] = {
            "sent": sent,
            "weights": {name: one.state_dict() for name, one in through.networks().items()},
            "resumed": {name: one.state_dict() for name, one in resumed.networks().items()},
        }
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    on_ranks(4, resumed_on_this_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("grad_dtype", ["fp32", "bf16"])
def test_a_resume_on_four_ranks_keeps_every_bit(
    four_ranks: list[dict[str, Any]], grad_dtype: str
) -> None:
    """The step after a resume has the buckets of the run that went on: sums of four floats depend
    on them. All ranks are the same.
    """
    for rank in four_ranks:
        for name, weights in rank[grad_dtype]["weights"].items():
            for key, weight in weights.items():
                assert torch.equal(rank[grad_dtype]["resumed"][name][key], weight), (name, key)
                assert torch.equal(four_ranks[0][grad_dtype]["weights"][name][key], weight)


def test_bf16_halves_the_bytes_and_rounds_what_travels(four_ranks: list[dict[str, Any]]) -> None:
    """The networks' numbers travel once a step, with 4 and with 2 bytes each. The weights are not
    those that fp32 gives, but within three steps of Adam.
    """
    for rank in four_ranks:
        count = sum(sizes(rank["fp32"]["weights"]).values())
        for grad_dtype, kind in (("fp32", "float"), ("bf16", "c10::BFloat16")):
            flags = [(1, "float")] * 2  # of the guard
            sent = sorted(rank[grad_dtype]["sent"])
            assert sent[:2] == flags
            assert sum(n for n, _ in sent[2:]) == count
            assert {one for _, one in sent[2:]} == {kind}
        a, b = (rank[one]["weights"]["G"] for one in ("fp32", "bf16"))
        far = max((a[key] - b[key]).abs().max().item() for key in a)
        assert 0 < far < 2 * 3 * CONFIG.optim.g_lr


# -- compiled networks --------------------------------------------------------------------------


def compiled_on_this_rank(folder: str) -> None:
    config = with_micro_batch(MICRO_BATCHES[0])
    train = replace(config.train, compile=True, compile_mode="reduce-overhead")
    torch.save(trained(replace(config, train=train)), Path(folder) / f"{os.environ['RANK']}.pt")


@pytest.mark.faults  # it takes minutes
def test_compiled_networks_train_under_ddp(two_ranks: list[dict[int, Any]], tmp_path: Path) -> None:
    """The networks in the wrappers are compiled: gradients are the eager ones, and travel once."""
    on_ranks(2, compiled_on_this_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    eager = two_ranks[0][MICRO_BATCHES[0]]
    for name in ("D", "G"):
        for key, expected in eager["gradients"][name][0].items():
            limits = {"rtol": 0, "atol": 1e-4 * expected.abs().max().item()}
            torch.testing.assert_close(ranks[0]["gradients"][name][0][key], expected, **limits)
        for key, weight in ranks[0]["weights"][name].items():
            assert torch.equal(weight, ranks[1]["weights"][name][key])
    assert sum(n for *_, n in ranks[0]["sent"]) == sum(n for *_, n in eager["sent"])


# -- threads ------------------------------------------------------------------------------------

SAY_THREADS = """
import torch
from pipeline.runtime import launch
launch.make_accelerator("fp32")
# One write, so that the lines of two ranks cannot interleave.
print(f"threads {torch.get_num_threads()}\\n", end="")
"""


@pytest.mark.parametrize(
    ("launch", "given", "expected"),
    [
        (("--num_processes", "1"), {}, len(os.sched_getaffinity(0))),
        (("--num_processes", "1"), {"OMP_NUM_THREADS": "1"}, 1),
        pytest.param(
            ("--num_processes", "1", "--num_cpu_threads_per_process", "1"),
            *({}, 1),
            marks=pytest.mark.faults,  # seconds that `make test` has better uses for
        ),
        pytest.param(
            ("--multi_gpu", "--num_processes", "2"),
            *({}, max(1, len(os.sched_getaffinity(0)) // 2)),
            marks=pytest.mark.faults,
        ),
    ],
    ids=["nothing said", "by environment", "by option", "two ranks"],
)
def test_a_cpu_is_used_whole_unless_the_launcher_was_told_otherwise(
    launch: tuple[str, ...], given: dict[str, str], expected: int, tmp_path: Path
) -> None:
    script = tmp_path / "say.py"
    script.write_text(SAY_THREADS)
    env = {k: v for k, v in environment().items() if k != "OMP_NUM_THREADS"} | given
    words = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    words += ["--num_machines", "1", "--dynamo_backend", "no"]
    words += ["--main_process_port", str(free_port()), *launch, str(script)]
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    found = [line for line in said.splitlines() if line.startswith("threads")]
    assert found == [f"threads {expected}"] * len(found)
    assert found

"""No weight changes once a loss is NaN or infinite on any rank, and the message says where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.models.noise import rng
from pipeline.runtime import launch
from pipeline.runtime.errors import NonFiniteLoss
from pipeline.training.finite_guard import FiniteGuard
from pipeline.training.gan import GAN

CONFIG = Config(
    model=ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4),
    data=DataConfig(batch_size=8),
    train=TrainConfig(precision="fp32"),
)
BAD = [float("nan"), float("inf"), float("-inf")]


def inputs(step: int, rank: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = rng(step, "inputs", rank)
    real = torch.rand(4, 1, 32, 32, generator=generator) * 2 - 1
    return [real], [torch.rand(4, 8, generator=generator) * 2 - 1]


def everything(gan: GAN) -> dict[str, Tensor]:
    """Every weight and every tensor of Adam's state, copied."""
    found = {
        f"{name}.{key}": value.clone()
        for name, network in gan.networks().items()
        for key, value in network.state_dict().items()
    }
    for name, optimizer in gan.optimizers().items():
        for index, moments in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{index}.{key}": value.clone() for key, value in moments.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(steps: int = 2, rank: int = 0) -> GAN:
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    for step in range(1, steps + 1):
        real, z = inputs(step, rank)
        gan.update_D(real, z, step)
        gan.update_G(z, step)
    return gan


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("network", ["D", "G"])
def test_a_non_finite_loss_stops_before_the_step(network: str, value: float) -> None:
    """The error names loss, step and rank; weights and both Adam states are what they were."""
    gan = trained()
    before = everything(gan)
    real, z = inputs(3)
    (real if network == "D" else z)[0][1] = value
    stopped = pytest.raises(
        NonFiniteLoss, match=rf"loss/{network} became NaN or infinite at step 31 on rank 0"
    )
    with stopped:
        gan.update_D(real, z, 31) if network == "D" else gan.update_G(z, 31)
    assert same(everything(gan), before)


def test_a_fault_in_one_micro_batch_is_enough() -> None:
    """With accumulation the other micro-batches do not hide it."""
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 2)
    before = everything(gan)
    (good,), (z,) = inputs(1)
    with pytest.raises(NonFiniteLoss, match="loss/D"):
        gan.update_D([good, good * float("nan")], [z, z], 1)
    assert same(everything(gan), before)


@pytest.mark.parametrize("first_step", [True, False])
def test_the_fused_kernel_skips_the_update(first_step: bool) -> None:
    """As on a GPU, where nothing waits for the flag: ``step`` with it set changes nothing at all,
    finite gradients or not, and works again without it.
    """
    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((2, 2), 3.0))]
    adam = optim.Adam(parameters, lr=0.1, fused=True)
    guard = FiniteGuard([adam], torch.device("cpu"), 0, 1)

    def step(gradient: float) -> list[Any]:
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        adam.step()
        state = [value.clone() for moments in adam.state.values() for value in moments.values()]
        return [p.detach().clone() for p in parameters] + state

    before = [p.detach().clone() for p in parameters]
    if not first_step:
        before = step(1.0)
    with pytest.raises(NonFiniteLoss):
        guard.check(torch.tensor(float("nan")), "D", 5)
    for gradient in (float("nan"), float("inf"), 1.0):
        after = step(gradient)
        if first_step:  # Adam has made its state of zeros by now
            assert not any(value.any() for value in after[2:])
        assert all(map(torch.equal, after, before))
    with pytest.raises(NonFiniteLoss, match=r"loss/D .* step 5 "):
        guard.raise_if_tripped()


def test_finite_losses_pass() -> None:
    """However large: only NaN and infinity stop a run."""
    guard = FiniteGuard([], torch.device("cpu"), 0, 1)
    for loss in (0.0, -1.0, 1e38, -1e38):
        guard.check(torch.tensor(loss), "G", 1)
    guard.raise_if_tripped()


def test_the_first_fault_is_the_one_named() -> None:
    """Later faults follow from the first; they do not replace it in the message."""
    guard = FiniteGuard([], torch.device("cpu"), 3, 1)
    for name, step in (("G", 2**24 + 1), ("D", 2**24 + 2)):  # a float32 would round it
        with pytest.raises(NonFiniteLoss, match=r"loss/G .* at step 16777217 on rank 3;"):
            guard.check(torch.tensor(float("inf")), name, step)


def test_the_first_step_of_all_is_named_too() -> None:
    """Step 0 is a step, and D is a network: a later fault does not replace them."""
    guard = FiniteGuard([], torch.device("cpu"), 0, 1)
    for name, step in (("D", 0), ("G", 1)):
        with pytest.raises(NonFiniteLoss, match=r"^loss/D .* at step 0 on rank 0;"):
            guard.check(torch.tensor(float("nan")), name, step)


def test_the_message_says_where_and_what_to_do() -> None:
    """The rank of the fault names the place; the others, which see only the flag, name no place."""
    remedy = (
        "; no optimizer step was taken with it and the last checkpoint is intact. "
        "Lower optim.d_lr and optim.g_lr, or try train.precision=fp32, in a new run.dir."
    )
    guard = FiniteGuard([], torch.device("cpu"), 2, 1)
    with pytest.raises(NonFiniteLoss) as here:
        guard.check(torch.tensor(float("nan")), "G", 5)
    assert str(here.value) == f"loss/G became NaN or infinite at step 5 on rank 2{remedy}"

    adam = optim.Adam([nn.Parameter(torch.ones(1))], fused=True)
    guard = FiniteGuard([adam], torch.device("cpu"), 2, 1)
    adam.found_inf.fill_(1)  # as the all-reduce leaves it when another rank has the fault
    with pytest.raises(NonFiniteLoss) as elsewhere:
        guard.raise_if_tripped()
    assert str(elsewhere.value) == f"a loss became NaN or infinite on another rank{remedy}"


def test_only_a_cpu_is_waited_for() -> None:
    """A tensor of the meta device has no value: reading one, as waiting for a GPU does, fails."""
    adam = optim.Adam([nn.Parameter(torch.ones(1, device="meta"))])
    guard = FiniteGuard([adam], torch.device("meta"), 0, 1)
    guard.check(torch.tensor(float("nan"), device="meta"), "D", 1)
    assert adam.found_inf.device.type == "meta"
    with pytest.raises(RuntimeError):
        guard.raise_if_tripped()


def test_a_check_is_three_small_kernels() -> None:
    """On a GPU each costs as much as a layer of a small batch."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            launched.append(function.__name__)
            return function(*args, **kwargs or {})

    launched: list[str] = []
    guard = FiniteGuard([], torch.device("meta"), 0, 1)
    loss = torch.tensor(1.0, device="meta")
    with Names():
        guard.check(loss, "D", 1)
    assert [name for name in launched if not name.startswith("detach")] == [
        "sub.Tensor",
        "logical_or_.default",
        "add_.Tensor",
    ]


def test_the_flag_of_several_ranks_is_their_maximum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not their sum: the fused kernel skips the update only where the flag is exactly 1."""
    reduced: list[tuple[Tensor, dist.ReduceOp]] = []
    all_reduce = dist.all_reduce

    def noted(tensor: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
        reduced.append((tensor, op))
        all_reduce(tensor, op)

    monkeypatch.setattr(dist, "all_reduce", noted)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        adam = optim.Adam([nn.Parameter(torch.ones(1))], fused=True)
        FiniteGuard([adam], torch.device("cpu"), 0, 2).check(torch.tensor(1.0), "D", 1)
        FiniteGuard([], torch.device("cpu"), 0, 1).check(torch.tensor(1.0), "D", 1)
    finally:
        dist.destroy_process_group()
    ((tensor, op),) = reduced
    assert tensor is adam.found_inf
    assert op == dist.ReduceOp.MAX


def _fault_on_rank_1(folder: str) -> None:
    """On each of two ranks: two good steps, then a fault on rank 1 only."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for network in ("D", "G"):
        gan = trained(rank=rank)
        before = everything(gan)
        real, z = inputs(3, rank)
        if rank == 1:
            (real if network == "D" else z)[0][0] = float("nan")
        update: Callable[[], Any] = (
            (lambda gan=gan, real=real, z=z: gan.update_D(real, z, 3))
            if network == "D"
            else (lambda gan=gan, z=z: gan.update_G(z, 3))
        )
        message = ""
        try:
            update()
        except NonFiniteLoss as error:
            message = str(error)
        found[network] = {"message": message, "unchanged": same(everything(gan), before)}
        found[network]["state"] = before
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_a_fault_on_one_rank_stops_all_ranks_unharmed(tmp_path: Path) -> None:
    """NaN on rank 1 only: both raise in the same call, rank 1 with the place; no rank steps."""
    on_ranks(2, _fault_on_rank_1, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for network in ("D", "G"):
        here, there = ranks[1][network], ranks[0][network]
        assert f"loss/{network} became NaN or infinite at step 3 on rank 1" in here["message"]
        assert "on another rank" in there["message"]
        assert here["unchanged"]
        assert there["unchanged"]
        assert same(here["state"], there["state"]), "the ranks had parted before the fault"

"""The stop at a non-finite loss, before the optimizer step that would spread it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, optim

from pipeline.runtime.errors import NonFiniteLoss

NETWORKS = "DG"


class FiniteGuard:
    """Watches the losses; once one is NaN or infinite on any rank, no weight changes any more.

    The flag lives on the device and the fused Adam kernel itself skips the update, so a GPU need
    not be waited for: the fault is raised at the next ``raise_if_tripped``, with the step it began
    at. On the CPU, where looking is free, it is raised at once.

    Args:
        optimizers: fused optimizers; each is given the flag. Empty under a gradient scaler, which
            skips non-finite gradients itself.
        device: where the losses live.
        rank, world_size: for the message and for sharing the flag.
    """

    def __init__(
        self,
        optimizers: Sequence[optim.Optimizer],
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._tripped = torch.zeros((), device=device)
        self._now = torch.zeros(2, dtype=torch.int64, device=device)  # step; which of NETWORKS
        self._first = torch.full_like(self._now, -1)  # of the first fault
        for optimizer in optimizers:
            optimizer.found_inf = self._tripped  # type: ignore[attr-defined]

    def begin(self, step: int) -> None:
        """The step that the losses to come belong to."""
        self._now[0].fill_(step)

    def check(self, loss: Tensor, name: str) -> None:
        """Look at a loss (scalar) of network ``D`` or ``G`` before its gradients are applied.

        Everything it reads and writes stays in its place, so a CUDA graph may hold it.
        """
        bad = (~torch.isfinite(loss.detach())).float()
        self._now[1].fill_(NETWORKS.index(name))
        first = (bad > 0) & (self._first[0] < 0)
        self._first.copy_(torch.where(first, self._now, self._first))
        self._tripped.copy_(torch.maximum(self._tripped, bad))
        if self.world_size > 1:
            dist.all_reduce(self._tripped, dist.ReduceOp.MAX)
        if bad.device.type == "cpu":
            self.raise_if_tripped()

    def raise_if_tripped(self) -> None:
        """Raise if any loss was non-finite since the start; waits for the device.

        Raises:
            NonFiniteLoss: naming loss, step and rank.
        """
        if not self._tripped.item():
            return
        step, number = self._first.tolist()
        where = (
            f"loss/{NETWORKS[number]} became NaN or infinite at step {step} on rank {self.rank}"
            if step >= 0
            else "a loss became NaN or infinite on another rank"
        )
        raise NonFiniteLoss(
            f"{where}; no optimizer step was taken with it and the last checkpoint is intact. "
            "Lower optim.d_lr and optim.g_lr, or try train.precision=fp32, in a new run.dir."
        )

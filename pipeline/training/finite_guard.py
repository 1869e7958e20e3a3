"""Stop a run at a non-finite loss, before the optimizer step that would spread it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from pipeline.runtime.errors import NonFiniteLoss

LIMIT = 2.0**13
"""Gradients and losses of a micro-batch must be below it to be summed as integers."""


class FiniteGuard:
    """A check of every loss. Once one is NaN or infinite on any rank, no weight changes any more.

    The flag is a tensor on the device, and the fused Adam kernel skips the update while it is set.
    So a GPU need not be waited for: ``raise_if_tripped`` raises later, with the step of the first
    fault. On a CPU, where reading the flag is free, ``check`` raises at once.

    Args:
        optimizers: fused optimizers, which get the flag as ``found_inf``. Empty with a gradient
            scaler, which skips non-finite gradients itself.
        device: device of the losses.
        rank: this process, for the message.
        world_size: number of ranks; with several the flag is all-reduced.
    """

    def __init__(
        self,
        optimizers: Sequence[optim.Optimizer],
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        # Whether this rank has had any fault, and one of a loss; and how many checks ago.
        self._own, self._since = torch.zeros(2, 2, device=device)
        self._tripped = self._own[0] if world_size == 1 else torch.zeros((), device=device)
        self._checks: list[tuple[str, int]] = []
        for optimizer in optimizers:
            optimizer.found_inf = self._tripped  # type: ignore[attr-defined]

    def check(self, loss: Tensor, name: str, step: int, peak: Tensor | None = None) -> None:
        """Check a loss before its gradients are applied. All ranks call it in the same order.

        Args:
            loss: float scalar on the device.
            name: ``D`` or ``G``, the network that the loss trains.
            step: number of the step, for the message.
            peak: largest absolute value that was summed as an integer, which must be below
                ``LIMIT``; a scalar on the device.

        Raises:
            NonFiniteLoss: on a CPU, see ``raise_if_tripped``.
        """
        self._checks.append((name, step))
        # 0, or NaN for a loss that is NaN or infinite; as a flag NaN is true. Few and small kernels
        # in place, and nothing that waits for a GPU: the optimizers hold the flag.
        broken = loss.detach() - loss.detach()
        if peak is not None:
            broken = torch.stack([torch.where(peak < LIMIT, broken, 1), broken])  # NaN < LIMIT: no
        self._since.add_(self._own.logical_or_(broken))
        if self.world_size > 1:
            self._tripped.copy_(self._own[0])
            dist.all_reduce(self._tripped, dist.ReduceOp.MAX)
        if self._tripped.device.type == "cpu":
            self.raise_if_tripped()

    def raise_if_tripped(self) -> None:
        """Raise if any loss has been non-finite on any rank. Waits for the device.

        Raises:
            NonFiniteLoss: the message names loss, step and rank of the first fault on this rank.
        """
        if not self._tripped.item():
            self._checks.clear()
            return
        since, of_loss = (int(count) for count in self._since.tolist())
        where = "a loss became NaN or infinite on another rank"
        if since:
            network, step = self._checks[-since]
            name = f"loss/{network} became NaN or infinite"
            if of_loss < since:
                name = f"loss/{network} or a gradient of it became NaN or reached {LIMIT:g}"
                name += ", the most that train.exact_sum can add"
            where = f"{name} at step {step} on rank {self.rank}"
        raise NonFiniteLoss(
            f"{where}; no optimizer step was taken with it and the last checkpoint is intact. "
            "Lower optim.d_lr and optim.g_lr, or try train.precision=fp32, in a new run.dir."
        )


def require_finite_weights(networks: Iterable[nn.Module], step: int) -> None:
    """Check the weights before they are saved: an update can overflow them with a finite loss.

    Raises:
        NonFiniteLoss: a weight is NaN or infinite.
    """
    sums = [p.detach().abs().max() for network in networks for p in network.parameters()]
    if not torch.isfinite(torch.stack(sums)).all():
        raise NonFiniteLoss(
            f"weights became NaN or infinite by step {step}; it is not saved and the last "
            "checkpoint is intact. Lower optim.d_lr and optim.g_lr in a new run.dir."
        )

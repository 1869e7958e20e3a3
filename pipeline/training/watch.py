"""Watch single steps for what a collapse looks like: norms, D's margin, diversity of G's images.

The figures are computed on the device, in the steps that end a row of metrics, and change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.training.losses import least_discriminator_loss

FIGURES = ("watch/margin", "watch/diversity", "watch/features", "watch/loss_D")
SCALE, LARGEST = 2.0**40, 2.0**13
"""Figures are summed as integers, in units of 2^-40 and cut off at 2^13, so that their means do not
depend on the number of ranks."""


class Watch:
    """The figures of the last step that was watched, as one rank sees it.

    Args:
        config: says which steps end a row.
        accelerator: the ranks that the figures are averaged over; its scaler scales fp16 gradients.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self._train, self._accelerator = config.train, accelerator
        self._least = least_discriminator_loss(config.model.loss, config.stability.label_smoothing)
        self._norms: dict[str, Tensor] = {}  # the same on all ranks
        self._sums: list[Tensor] = []  # (len(FIGURES),) int64 for each micro-batch

    def due(self, step: int) -> bool:
        """Return whether a row of metrics ends with this step."""
        return step % self._train.log_every == 0 or step == self._train.total_steps

    @torch.no_grad()
    def see_update(self, name: str, network: nn.Module) -> None:
        """Note the norms of ``G`` or ``D``, and of the gradients it is about to be updated with."""
        parameters = list(network.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler = self._accelerator.scaler
        self._norms[f"grad_norm/{name}"] = norm / scaler.get_scale() if scaler else norm
        self._norms[f"weight_norm/{name}"] = torch.nn.utils.get_total_norm(parameters)

    @torch.no_grad()
    def see_images(
        self,
        k: int,
        images: tuple[Tensor, Tensor],
        y: Tensor | None,
        logits: tuple[Tensor, Tensor],
        loss: Tensor,
        D: Any,
    ) -> None:
        """Note what a micro-batch says of D's margin and of the diversity of G's images.

        The diversity is the root mean squared distance of two generated images over that of two
        real ones, from the mean variance of a number over the batch, which is half of the mean
        squared difference of two images in it. Once of pixels, once of D's last features.

        Args:
            k: number of the micro-batch on this rank, from 0.
            images: real and generated ones, (m, C, S, S) float each, m at least 2.
            y: their classes, (m,) int64; None without.
            logits: of both, (m,) float32 each.
            loss: D's loss of them without penalties, a scalar.
            D: the bare network; its ``features`` are computed once more.
        """
        if k == 0:
            self._sums.clear()
        with self._accelerator.autocast():
            features = tuple(D.features(one, y) for one in images)
        figures = torch.stack(
            [
                logits[0].mean() - logits[1].mean(),
                *(_spread(fake) / _spread(real) for real, fake in (images, features)),
                loss.float() - self._least,
            ]
        )
        figures = figures.nan_to_num(0.0).clamp(-LARGEST, LARGEST)
        self._sums.append((figures * SCALE).round().to(torch.int64))

    def row(self) -> dict[str, float]:
        """Return the figures of the last watched step. Waits for the device; all ranks call it.

        ``grad_norm/G`` and ``grad_norm/D`` are Euclidean norms over all weights' gradients, and
        ``weight_norm/G`` and ``weight_norm/D`` over all weights, before the update. The others are
        means over all micro-batches of all ranks: ``watch/margin`` is the mean logit of real images
        minus that of generated ones. ``watch/diversity`` is about 1 for a good G, 0 for a G that
        makes one image, and ``watch/features`` the same of D's last features. ``watch/loss_D`` is
        D's loss of the step minus the least that it can be: near 0, D has won.
        """
        if not self._sums:
            return {}
        total = torch.stack(self._sums).sum(dim=0)
        ranks = self._accelerator.num_processes
        if ranks > 1:
            dist.all_reduce(total)
        count = len(self._sums) * ranks
        means = [value / SCALE / count for value in total.tolist()]
        norms = torch.stack([*self._norms.values()]).tolist()
        return dict(zip(self._norms, norms, strict=True)) | dict(zip(FIGURES, means, strict=True))


def _spread(numbers: Tensor) -> Tensor:
    """Return the root of the mean variance over dimension 0, at least a tiny number, a scalar."""
    return numbers.float().var(dim=0).mean().sqrt().clamp_min(1e-12)

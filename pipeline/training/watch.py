"""Watch single steps for what a collapse looks like: gradient norms, D's margin, G's diversity.

The figures are computed on the device, in the steps that end a row of metrics, and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.runtime.ranks import mean_over_ranks

PATIENCE = 500
"""Steps that a sign must hold in every row before it is said: first steps show each of them."""
SIGNS = {
    "loss/D": (1e-3, "D has won, and G hardly learns"),
    "watch/diversity": (0.1, "G makes almost one image"),
}
"""What a row says of a collapse: a metric, the value that it stays below, and what that means."""


class Watch:
    """The figures of the last step that was watched, as one rank sees it.

    Args:
        config: says which steps end a row.
        accelerator: the ranks that the figures are averaged over; its scaler scales fp16 gradients.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self._train, self._accelerator = config.train, accelerator
        self._found: dict[str, Tensor] = {}
        self._since: dict[str, int] = {}
        self._said: set[str] = set()

    def due(self, step: int) -> bool:
        """Return whether a row of metrics ends with this step."""
        return step % self._train.log_every == 0 or step == self._train.total_steps

    @torch.no_grad()
    def see_update(self, name: str, network: nn.Module) -> None:
        """Note the norm of the gradients that ``G`` or ``D`` is about to be updated with."""
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scaler = self._accelerator.scaler
        self._found[f"grad_norm/{name}"] = norm / scaler.get_scale() if scaler else norm

    @torch.no_grad()
    def see_images(self, real: Tensor, fake: Tensor, logits: tuple[Tensor, Tensor]) -> None:
        """Note D's margin and the spread of real and of generated images of a micro-batch.

        The spread is the mean over pixels of their variance over the batch: half of the mean
        squared difference of two images in a pixel.

        Args:
            real: (m, C, S, S) float, m at least 2.
            fake: the same of generated images.
            logits: of both, (m,) each.
        """
        self._found["watch/margin"] = logits[0].mean() - logits[1].mean()
        for name, images in (("real", real), ("fake", fake)):
            self._found[name] = images.float().var(dim=0).mean()

    def row(self) -> dict[str, float]:
        """Return the figures of the last watched step. Waits for the device; all ranks call it.

        ``grad_norm/G`` and ``grad_norm/D`` are Euclidean norms over all weights. ``watch/margin``
        is the mean logit of real images minus that of generated ones. ``watch/diversity`` is the
        root mean squared distance of two generated images over that of two real ones: about 1 for a
        good G, 0 for a G that makes one image. The last two are of each rank's last micro-batch.
        """
        if not self._found:
            return {}
        means = mean_over_ranks(self._accelerator, torch.stack([*self._found.values()])).tolist()
        row = dict(zip(self._found, means, strict=True))
        real, fake = row.pop("real"), row.pop("fake")
        return row | {"watch/diversity": (fake / real) ** 0.5 if real else 0.0}

    def warnings(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Return a line for each sign of a collapse that has held for ``PATIENCE`` steps, once.

        A resume begins to count anew: the line then comes later.

        Args:
            step: step of the row.
            row: all metrics of the step; ``loss/D`` is the mean since the last row.
        """
        lines = []
        for key, (limit, meaning) in SIGNS.items():
            value = row.get(key, limit)
            if not value < limit:
                self._since.pop(key, None)
                continue
            held = step - self._since.setdefault(key, step)
            if held >= PATIENCE and key not in self._said:
                self._said.add(key)
                lines.append(
                    f"step {step}: {key} ({value:.2g}) has been below {limit:g} for {held} steps: "
                    f"{meaning}. Lower optim.d_lr, or set stability.r1_gamma or stability.augment: "
                    "in a resume with run.accept_changes=true, or in a new run from an earlier "
                    "checkpoint with train.init."
                )
        return lines

"""The Parzen-window log-likelihood of Goodfellow et al. 2014, section 5 (Breuleux et al. 2011).

The density is a mixture of Gaussians of standard deviation sigma, one at each of N generated
images, with pixels in [0, 1]. The score is the mean log-density of held-out images, with its
standard error. sigma is chosen on a tenth of the held-out images, a fixed random choice, and the
score is computed on the others. (The authors' code chose sigma on 1,000 images of the training set,
which it left out of the training, and computed the score on the whole test set.)

Use it only to compare with table 1 of the paper. In hundreds of dimensions it is far from the true
likelihood, it can prefer a model that repeats cluster centres to the data itself, and it need not
agree with the quality of the images (Theis et al. 2016, arXiv 1511.01844). To choose a checkpoint,
use FID or KID.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.cache import check_shards
from pipeline.data.shards import Index
from pipeline.evaluation import candidates
from pipeline.evaluation.moments import FeatureSet
from pipeline.evaluation.protocol import (
    SAMPLING,
    hash_fields,
    label_rule,
    seeds_of,
    short_count,
    show_seeds,
)
from pipeline.evaluation.scorer import Scorer
from pipeline.models.sampling import Images
from pipeline.runtime.console import say
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.ranks import on_rank_zero, run_on_selected_ranks

SIGMAS = tuple(float(s) for s in np.logspace(-1, 0, 10))
"""Values of sigma to choose from, as in the authors' code."""
VALIDATION_SHARE = 10
"""One in this number of held-out images is used to choose sigma."""
CHUNK, SAMPLES = 256, 1 << 14
"""Numbers of images and of samples whose distances are in memory at the same time."""
NUMBERS = 1 << 25
"""Limit of pixels of samples in memory as float64 (256 MiB)."""


@dataclass(frozen=True, kw_only=True)
class ParzenProtocol:
    """All settings that the score depends on, except for the generator."""

    data: str
    image_shape: tuple[int, int, int]
    held_out: int
    num_images: int
    seed: int
    weights: str
    labels: str
    sigmas: tuple[float, ...] = SIGMAS
    sampling: str = SAMPLING
    seeds: tuple[int, ...] = ()

    columns = ("parzen", "parzen_se", "parzen_sigma")  # in nats, nats, and pixels in [0, 1]
    metrics = ()  # none of ``eval.metrics``
    higher_is_better = True

    @property
    def id(self) -> str:
        """12 hex digits, the same if and only if all fields are the same."""
        return hash_fields({"metric": "parzen"} | dataclasses.asdict(self))

    def key(self, score: str) -> str:
        """Return the metric key of a score in ledger and W&B, e.g. ``eval/parzen_10k``."""
        return f"eval/{score}_{short_count(self.num_images)}"

    def title(self, score: str) -> str:
        """Return the title of a score in tables."""
        return {"parzen": "LOG-LIK.", "parzen_se": "S.E."}.get(score, "SIGMA")

    @property
    def headline(self) -> str:
        """Key of the score by which the best checkpoint is chosen; higher is better."""
        return self.key("parzen")

    def describe(self) -> str:
        """Return the protocol as one line to print."""
        validation = self.held_out // VALIDATION_SHARE
        return (
            f"protocol {self.id}: Parzen window on {self.num_images} images, log-likelihood of "
            f"{self.held_out - validation} held-out images in nats, sigma from {validation} others"
            f", {'G_ema' if self.weights == 'ema' else 'G'}, {show_seeds(self)}"
        )


def log_likelihoods(images: Tensor, samples: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Compute log p(x) of each image under the mixture of Gaussians at the samples.

    The images and samples are converted to float64 in parts, to limit the memory in use.

    Args:
        images: (M, D) float in [0, 1], or uint8.
        samples: (N, D) float in [0, 1], or uint8.
        sigmas: standard deviations of the Gaussians, for pixels in [0, 1].

    Returns:
        (len(sigmas), M) float64 in nats.
    """
    count, dim = samples.shape
    total = torch.full((len(sigmas), len(images)), -math.inf, dtype=torch.float64)
    for part in samples.split(max(1, min(SAMPLES, NUMBERS // dim))):
        centres = _to_unit_range(part)
        lengths = centres.square().sum(1)
        for start in range(0, len(images), CHUNK):
            x = _to_unit_range(images[start : start + CHUNK])
            distances = x.square().sum(1)[:, None] + lengths - 2 * x @ centres.T
            for row, sigma in zip(total[:, start : start + CHUNK], sigmas, strict=True):
                torch.logaddexp(row, torch.logsumexp(-distances / (2 * sigma**2), 1), out=row)
    log_normalizers = [
        math.log(count) + dim / 2 * math.log(2 * math.pi * sigma**2) for sigma in sigmas
    ]
    return total - torch.tensor(log_normalizers, dtype=torch.float64)[:, None]


def _to_unit_range(pixels: Tensor) -> Tensor:
    """Return pixels as float64 in [0, 1]."""
    return pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()


def parzen(samples: Tensor, validation: Tensor, test: Tensor) -> tuple[float, float, float]:
    """Choose sigma on validation images and compute the score of the test images.

    Args:
        samples: generated images, (N, D); pixels of all three as for ``log_likelihoods``.
        validation: (V, D).
        test: (T, D), T >= 2.

    Returns:
        mean log-likelihood of the test images in nats, its standard error, sigma.
    """
    means = log_likelihoods(validation, samples, SIGMAS).mean(1)
    sigma = SIGMAS[int(means.argmax())]
    (values,) = log_likelihoods(test, samples, [sigma])
    return float(values.mean()), float(values.std() / math.sqrt(len(values))), sigma


def pixels(rows: NDArray[np.uint8], device: torch.device) -> dict[str, Tensor]:
    """Return pixels as features: (n, H, W, C) uint8 -> {"pixels": (n, H * W * C) uint8}."""
    return {"pixels": torch.from_numpy(rows).flatten(1).to(device)}


class ParzenScorer(Scorer):
    """A ``Scorer`` whose score is the Parzen-window log-likelihood.

    Args:
        config: ``eval.parzen_shards`` names the held-out images; ``eval.num_images`` is N.
        accelerator: the ranks divide the generation of images.

    Raises:
        UserError: there are no held-out images, they have another shape, or D was trained on them.
    """

    protocol: ParzenProtocol  # type: ignore[assignment]
    held_out: Index

    def _set_protocol(self) -> None:
        config, trained_on = self.config.eval, self.index
        make = f"python -m pipeline.prepare fashion-mnist --split test --size {trained_on.shape[0]}"
        if not config.parzen_shards:
            raise EvaluationError(
                "eval.parzen_shards (empty): must name shards of held-out images. Prepare them, "
                f"e.g. with: {make} --channels {trained_on.shape[2]} --out data/held-out. Then set "
                "eval.parzen_shards=data/held-out."
            )
        field, location = "eval.parzen_shards", config.parzen_shards
        found = candidates.open_shards(self.config, self.accelerator, field, location)
        self.held_out = candidates.require_held_out(found, trained_on, field)
        if self.held_out.num_samples < 2 * VALIDATION_SHARE:
            raise EvaluationError(
                f"eval.parzen_shards ({config.parzen_shards}): has {self.held_out.num_samples} "
                f"images, but at least {2 * VALIDATION_SHARE} are needed. Prepare more."
            )
        self.extractor = pixels  # type: ignore[assignment]
        self.classes = None
        seed, seeds = seeds_of(config)
        self.protocol = ParzenProtocol(
            data=self.held_out.fingerprint,
            image_shape=self.held_out.shape,
            held_out=self.held_out.num_samples,
            num_images=config.num_images,
            seed=seed,
            seeds=seeds,
            weights=config.weights,
            labels=label_rule(config.labels, self.config.model.num_classes),
        )

    def describe(self) -> str:
        """Return the protocol as one line to print."""
        return self.protocol.describe()

    def load_reference(self) -> None:
        """Read the held-out images on rank 0, in the order of ``chosen_ids``."""
        check = partial(check_shards, self.held_out, self.config.data.verify)
        run_on_selected_ranks(self.accelerator, self.is_main, check)

        def load() -> None:
            count = self.held_out.num_samples
            images = candidates.real_images(self.held_out, self.config.data, count)
            self._images = torch.from_numpy(images(0, count)).flatten(1)

        on_rank_zero(self.accelerator, load, lengthy=True)

    def _new_set(self) -> FeatureSet:
        return FeatureSet("pixels", self.protocol.num_images)

    def _compute_scores(
        self, found: FeatureSet, images: Images, classes: object
    ) -> dict[str, float]:
        size = len(self._images) // VALIDATION_SHARE
        values = parzen(found.features, self._images[:size], self._images[size:])
        if values[2] in (SIGMAS[0], SIGMAS[-1]):
            say(
                f"sigma = {values[2]:g} is at the end of the range that was searched, "
                f"{SIGMAS[0]:g} to {SIGMAS[-1]:g}: a value outside may score higher"
            )
        return dict(zip(map(self.protocol.key, self.protocol.columns), values, strict=True))

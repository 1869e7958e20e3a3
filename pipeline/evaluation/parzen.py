"""The Parzen-window log-likelihood of Goodfellow et al. 2014, section 5 (Breuleux et al. 2011).

A Gaussian of width sigma is put on each of N generated images, pixels in [0, 1]; the score is the
mean log density of held-out images under the mixture, with its standard error. sigma is the one
that is best for other held-out images: a tenth of the same set, a fixed random choice. The authors'
code chose it on 1,000 images left out of the training set, and scored the whole test set.

What it is worth: it was the only likelihood estimate available for a GAN, and is the figure of the
paper's table 1. In hundreds of dimensions it is far from the true likelihood, it can rank a model
that repeats cluster centres above the data itself, and it need not agree with how images look
(Theis et al. 2016, arXiv 1511.01844). It serves to compare with the paper; FID or KID decide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from pipeline.evaluation.scorer import Scorer
from pipeline.models.sampling import Images
from pipeline.runtime.console import say
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.ranks import on_rank_zero, run_on_selected_ranks

SIGMAS = tuple(float(s) for s in np.logspace(-1, 0, 10))  # the range that the authors searched
VALIDATION_SHARE = 10  # one image in ten chooses sigma
CHUNK, SAMPLES = 256, 1 << 14  # images and samples whose distances are in memory at a time
NUMBERS = 1 << 25  # of samples, as doubles: 256 MiB


@dataclass(frozen=True, kw_only=True)
class ParzenProtocol:
    """Everything the score depends on but the network that is scored."""

    data: str
    image_shape: tuple[int, int, int]
    held_out: int
    num_images: int
    seed: int
    weights: str
    sigmas: tuple[float, ...] = SIGMAS
    sampling: str = "z-table blocks of 64, standing BatchNorm, round and clamp to uint8: v1"

    columns = ("parzen", "parzen_se", "parzen_sigma")  # nats, nats, pixels from 0 to 1
    higher_is_better = True

    @property
    def id(self) -> str:
        """12 hex digits; equal exactly when all fields are."""
        fields = json.dumps({"metric": "parzen"} | dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:12]

    def key(self, score: str) -> str:
        """The metric's name in ledger and W&B, e.g. ``eval/parzen_10k``."""
        count = self.num_images
        return f"eval/{score}_{count // 1000}k" if count % 1000 == 0 else f"eval/{score}_{count}"

    def title(self, score: str) -> str:
        """A score's name in tables for people."""
        return {"parzen": "LOG-LIK.", "parzen_se": "S.E."}.get(score, "SIGMA")

    @property
    def headline(self) -> str:
        """The key that decides which checkpoint is best."""
        return self.key("parzen")

    def describe(self) -> str:
        """One line for people."""
        chosen = self.held_out // VALIDATION_SHARE
        return (
            f"protocol {self.id}: Parzen window on {self.num_images} images, log-likelihood of "
            f"{self.held_out - chosen} held-out ones in nats, sigma by {chosen} others, "
            f"{'G_ema' if self.weights == 'ema' else 'G'}, seed {self.seed}"
        )


def log_likelihoods(images: Tensor, samples: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Log p(x) of every image under the mixture of Gaussians at the samples, for each sigma.

    Args:
        images: (M, D), pixels in [0, 1] as floats, or uint8 ones.
        samples: (N, D) likewise.
        sigmas: standard deviations in units of pixels.

    Returns:
        (len(sigmas), M) float64, in nats. Doubles are made of ``CHUNK`` images and ``SAMPLES``
        samples at a time, or fewer of many pixels: ``NUMBERS`` in all.
    """
    count, dim = samples.shape
    total = torch.full((len(sigmas), len(images)), -math.inf, dtype=torch.float64)
    for some in samples.split(max(1, min(SAMPLES, NUMBERS // dim))):
        near = _unit(some)
        lengths = near.square().sum(1)
        for start in range(0, len(images), CHUNK):
            x = _unit(images[start : start + CHUNK])
            distances = x.square().sum(1)[:, None] + lengths - 2 * x @ near.T
            part = total[:, start : start + CHUNK]
            for row, sigma in zip(part, sigmas, strict=True):
                torch.logaddexp(row, torch.logsumexp(-distances / (2 * sigma**2), 1), out=row)
    volumes = [math.log(count) + dim / 2 * math.log(2 * math.pi * sigma**2) for sigma in sigmas]
    return total - torch.tensor(volumes, dtype=torch.float64)[:, None]


def _unit(pixels: Tensor) -> Tensor:
    """As doubles in [0, 1]."""
    return pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()


def parzen(samples: Tensor, validation: Tensor, test: Tensor) -> tuple[float, float, float]:
    """(mean log-likelihood of the test images, its standard error, the sigma that was chosen).

    Args:
        samples: (N, D), generated; all as in ``log_likelihoods``.
        validation: (V, D), chooses sigma.
        test: (T, D), at least 2.
    """
    means = log_likelihoods(validation, samples, SIGMAS).mean(1)
    sigma = SIGMAS[int(means.argmax())]
    (found,) = log_likelihoods(test, samples, [sigma])
    return float(found.mean()), float(found.std() / math.sqrt(len(found))), sigma


def pixels(rows: NDArray[np.uint8], device: torch.device) -> dict[str, Tensor]:
    """(n, H, W, C) uint8 -> {"pixels": (n, H * W * C) uint8 on the device}: an extractor."""
    return {"pixels": torch.from_numpy(rows).flatten(1).to(device)}


class ParzenScorer(Scorer):
    """Held-out images and protocol, ready to score generated ones.

    Args:
        config: ``eval.parzen_shards`` names the held-out set; ``eval.num_images`` is N.
        accelerator: the processes that share the generation.

    Raises:
        UserError: no held-out set, or one of another shape or of the training images.
    """

    protocol: ParzenProtocol  # type: ignore[assignment]

    def _open(self, trained_on: Index) -> None:
        config = self.config.eval
        make = f"python -m pipeline.prepare fashion-mnist --split test --size {trained_on.shape[0]}"
        if not config.parzen_shards:
            raise EvaluationError(
                "eval.parzen_shards (empty): the Parzen window needs images that were not trained "
                f"on: {make} --channels {trained_on.shape[2]} --out data/held-out, then "
                "eval.parzen_shards=data/held-out"
            )
        self.held_out = self._read_index("eval.parzen_shards", config.parzen_shards)
        if self.held_out.fingerprint == trained_on.fingerprint:
            raise EvaluationError(
                f"eval.parzen_shards ({config.parzen_shards}): must not be data.shards, which the "
                f"run was trained on; make held-out ones: {make}"
            )
        if self.held_out.num_samples < 2 * VALIDATION_SHARE:
            raise EvaluationError(
                f"eval.parzen_shards ({config.parzen_shards}): holds {self.held_out.num_samples} "
                f"images; at least {2 * VALIDATION_SHARE} are needed to choose sigma and to test."
            )
        self.extractor = pixels  # type: ignore[assignment]
        self.protocol = ParzenProtocol(
            data=self.held_out.fingerprint,
            image_shape=self.held_out.shape,
            held_out=self.held_out.num_samples,
            num_images=config.num_images,
            seed=config.seed,
            weights=config.weights,
        )

    def describe(self) -> str:
        """What is measured, for people."""
        return self.protocol.describe()

    def load_reference(self) -> None:
        """The held-out images, on rank 0: a tenth for sigma, the others for the score."""
        check = partial(check_shards, self.held_out, self.config.data.verify)
        run_on_selected_ranks(self.accelerator, self.is_main, check)

        def load() -> None:
            count = self.held_out.num_samples
            images = candidates.real_images(self.held_out, self.config.data, count)
            self._images = torch.from_numpy(images(0, count)).flatten(1)

        on_rank_zero(self.accelerator, load, lengthy=True)

    def score(self, images: Images, name: str) -> dict[str, float]:
        """Scores of ``eval.num_images`` images by metric key; {} on ranks other than 0."""
        features = self._extract(images, self.protocol.num_images, name)
        scores: dict[str, float] = {}

        def compute() -> None:
            chosen = len(self._images) // VALIDATION_SHARE
            validation, test = self._images[:chosen], self._images[chosen:]
            values = parzen(features["pixels"], validation, test)
            if values[2] in (SIGMAS[0], SIGMAS[-1]):
                say(
                    f"sigma = {values[2]:g} is at the end of the range that was searched, "
                    f"{SIGMAS[0]:g} to {SIGMAS[-1]:g}: another would score higher"
                )
            scores.update(zip(map(self.protocol.key, self.protocol.columns), values, strict=True))

        on_rank_zero(self.accelerator, compute, lengthy=True)
        return scores

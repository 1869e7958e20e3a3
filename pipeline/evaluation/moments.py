"""Accumulate features as mean and covariance in float64, and compare two sets by them.

Only a limited number of features stays in memory, whatever the number of images.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.files import sha256_of, write_atomic

CHUNK = 1024
"""Rows that are added at once. It is fixed, so the result depends on no batch size or rank."""
HEADER = 1 << 16
"""Bytes of an npy file besides its numbers, at most."""


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


class FeatureSet:
    """Features of a set of images that come in order, in parts of any size.

    Args:
        layer: of the features.
        keep: number of first rows whose features stay in memory.
        with_statistics: accumulate mean and covariance of all rows.
        logits: layer whose rows all stay in memory, for the Inception Score; None = none.
    """

    def __init__(
        self, layer: str, keep: int, with_statistics: bool = False, logits: str | None = None
    ) -> None:
        self._layer, self._keep, self._logits_layer = layer, keep, logits
        self._with_statistics = with_statistics
        self.is_finite = True
        """Whether no row so far is NaN or infinite; later rows are not added."""
        self._kept: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._num_pending = self._num_kept = self._count = 0
        self._sum: NDArray[np.float64] | None = None

    def add(self, found: dict[str, Tensor]) -> None:
        """Add rows: {layer: (n, D) on the CPU}."""
        rows = found[self._layer]
        self.is_finite &= bool(torch.isfinite(rows).all())
        if not self.is_finite:
            return
        kept = rows[: self._keep - self._num_kept]
        self._kept.append(kept)
        self._num_kept += len(kept)
        if self._logits_layer is not None:
            self._logits.append(found[self._logits_layer])
        if self._with_statistics:
            self._pending.append(rows)
            self._num_pending += len(rows)
            while self._num_pending >= CHUNK:
                self._add_chunk(CHUNK)

    def _add_chunk(self, size: int) -> None:
        pending = torch.cat(self._pending)
        rows = pending[:size].double().numpy()
        self._pending, self._num_pending = [pending[size:]], len(pending) - size
        if self._sum is None:
            # Sums about a point near the mean: a large mean then costs no digits.
            self._shift = rows.mean(0)
            self._sum = np.zeros_like(self._shift)
            self._outer = np.zeros((len(self._shift),) * 2)
        centred = rows - self._shift
        self._sum += centred.sum(0)
        self._outer += centred.T @ centred
        self._count += size

    @property
    def features(self) -> Tensor:
        """The first ``keep`` rows."""
        return torch.cat(self._kept)

    @property
    def logits(self) -> Tensor:
        """The logits of all rows."""
        return torch.cat(self._logits)

    def statistics(self) -> Statistics:
        """Return mean and covariance of all rows, at least 2; may be called once, at the end."""
        if self._num_pending:
            self._add_chunk(self._num_pending)
        assert self._sum is not None
        mean = self._sum / self._count
        sigma = (self._outer - self._count * np.outer(mean, mean)) / (self._count - 1)
        return Statistics(self._shift + mean, (sigma + sigma.T) / 2)


def statistics_of(features: Tensor) -> Statistics:
    """Return mean and covariance of rows: (N, D), N >= 2."""
    found = FeatureSet("all", 0, with_statistics=True)
    found.add({"all": features})
    return found.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the squared Frechet distance of two normal distributions (Heusel et al. 2017, eq. 6).

    tr (A B)^1/2 is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2, which is
    symmetric. So no complex root is taken, and singular covariances are no special case.
    """
    values, vectors = np.linalg.eigh(a.sigma)
    root = (vectors * _roots(values)) @ vectors.T
    product = root @ b.sigma @ root
    covariance = _roots(np.linalg.eigvalsh((product + product.T) / 2)).sum()
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * covariance)


def _roots(eigenvalues: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return square roots; what is 0 but for rounding, as of a singular matrix, is 0."""
    rounding = eigenvalues.max() * len(eigenvalues) * np.finfo(np.float64).eps
    return np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0))


# -- statistics of others: npz --------------------------------------------------------------------


def npz_id(path: Path) -> str:
    """Return the sha256 of an npz file in hex.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise EvaluationError(
            f"eval.reference ({path}): cannot be read: {error.strerror}."
        ) from None


def read_npz(path: Path, dim: int) -> Statistics:
    """Read mu and sigma of an npz file, as pytorch-fid, ADM and EDM write them. No code is run.

    Args:
        path: of the file.
        dim: number of features D that the extractor computes.

    Raises:
        EvaluationError: it lacks them, they are of another shape, or not those of a distribution.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes = {entry.filename: entry.file_size for entry in file.zip.infolist()}
            if sizes["mu.npy"] + sizes["sigma.npy"] > 8 * dim * (dim + 1) + 2 * HEADER:
                raise ValueError("its arrays are larger")
            mu, sigma = file["mu"], file["sigma"]
        if mu.shape != (dim,) or sigma.shape != (dim, dim):
            raise ValueError(f"mu has shape {mu.shape}, sigma {sigma.shape}")
        statistics = Statistics(mu.astype(np.float64), sigma.astype(np.float64))
        if not (np.isfinite(statistics.mu).all() and np.isfinite(statistics.sigma).all()):
            raise ValueError("a number is NaN or infinite")
        if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6) or (sigma.diagonal() < 0).any():
            raise ValueError("sigma is no covariance")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"eval.reference ({path}): must be an npz file with mu ({dim},) and sigma ({dim}, "
            f"{dim}) of the extractor's features: {error}."
        ) from None
    return statistics


def write_npz(path: Path, statistics: Statistics) -> None:
    """Write mu and sigma as an npz file, atomically.

    Raises:
        OSError: it cannot be written.
    """
    out = io.BytesIO()
    np.savez(out, mu=statistics.mu, sigma=statistics.sigma)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, out.getvalue())

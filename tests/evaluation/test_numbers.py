"""Each metric equals an independent computation, also of features with a large mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.evaluation import moments, neighbours
from pipeline.evaluation.metrics import kid, mind
from pipeline.evaluation.moments import CHUNK, FeatureSet, Statistics, frechet_distance
from pipeline.models.noise import rng
from pipeline.runtime.errors import EvaluationError

CPU = torch.device("cpu")


def cloud(count: int, seed: int, dim: int = 8, scale: float = 1.0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(0, scale, (count, dim))
    return torch.from_numpy(values @ np.triu(np.ones((dim, dim)))).float()


REAL, FAKE = cloud(300, 0), cloud(200, 1, scale=1.3)


def statistics_of(features: torch.Tensor, part: int = 64) -> Statistics:
    found = FeatureSet("x", 0, with_statistics=True)
    for rows in features.split(part):
        found.add({"x": rows})
    return found.statistics()


def distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Return all distances, one by one, in extended precision."""
    x, y = a.numpy().astype(np.longdouble), b.numpy().astype(np.longdouble)
    return np.sqrt(np.square(x[:, None] - y[None]).sum(2))


@pytest.mark.parametrize("count", [2, CHUNK, 3 * CHUNK + 7])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_streamed_statistics_are_numpys(count: int, offset: float) -> None:
    """For any number of rows, added in parts of any size; the size does not change a bit."""
    rows = cloud(count, 3) + offset
    found = statistics_of(rows)
    exact = rows.double().numpy()
    np.testing.assert_allclose(found.mu, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    again = statistics_of(rows, 1000)
    assert np.array_equal(again.mu, found.mu)
    assert np.array_equal(again.sigma, found.sigma)


def test_only_the_first_rows_stay_in_memory() -> None:
    found = FeatureSet("x", 100, with_statistics=True)
    for rows in REAL.split(64):
        found.add({"x": rows})
    assert torch.equal(found.features, REAL[:100])


@pytest.mark.parametrize("dim", [8, 250])
def test_the_frechet_distance_is_scipys_and_torch_fidelitys(dim: int) -> None:
    """Of full rank and, with more numbers than images, of singular covariances."""
    a, b = cloud(200, 5, dim), cloud(220, 6, dim)
    x, y = statistics_of(a), statistics_of(b)
    found = frechet_distance(x, y)
    root = scipy.linalg.sqrtm(x.sigma @ y.sigma)
    by_scipy = np.square(x.mu - y.mu).sum() + np.trace(x.sigma + y.sigma - 2 * np.real(root))
    assert found == pytest.approx(by_scipy, rel=5e-5)
    # The trace of the root is the sum of the singular values of the product of the centred rows.
    rows = [v.double().numpy() - v.double().numpy().mean(0) for v in (a, b)]
    trace = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum() / np.sqrt(199 * 219)
    exact = np.square(x.mu - y.mu).sum() + np.trace(x.sigma + y.sigma) - 2 * trace
    assert found == pytest.approx(exact, rel=1e-8)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), False
    )
    assert found == pytest.approx(next(iter(theirs.values())), rel=5e-5)
    assert abs(frechet_distance(x, x)) < 1e-9 * np.trace(x.sigma)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_neighbour_metrics_are_those_of_exact_distances(offset: float) -> None:
    """With a large mean too, where float32 without centring fails."""
    real, fake = REAL + offset, FAKE + offset
    found = neighbours.compare(fake, real, neighbours.radii(real, CPU), CPU)
    cross, among_real = distances(fake, real), distances(real, real)
    among_fake = distances(fake, fake)
    # Index k counts the row itself, at distance 0.
    narrow, wide = np.sort(among_real)[:, 3], np.sort(among_real)[:, 5]
    assert found.precision == (cross <= narrow).any(1).mean()
    assert found.recall == (cross <= np.sort(among_fake)[:, 3][:, None]).any(0).mean()
    assert found.density == pytest.approx((cross < wide).sum() / 5 / len(fake))
    assert found.coverage == (cross.min(0) < wide).mean()
    if not offset:
        theirs = list(prc_features_to_metric(fake, real, save_cpu_ram=True, verbose=False).values())
        assert (found.precision, found.recall) == pytest.approx(tuple(theirs[:2]), abs=1e-6)


def test_neighbours_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = neighbours.radii(REAL, CPU)
    scores = neighbours.compare(FAKE, REAL, whole, CPU)
    monkeypatch.setattr(neighbours, "ROWS", 37)
    monkeypatch.setattr(neighbours, "COLUMNS", 41)
    torch.testing.assert_close(neighbours.radii(REAL, CPU), whole, rtol=1e-12, atol=1e-12)
    assert neighbours.compare(FAKE, REAL, whole, CPU) == scores


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kid_is_the_estimate_in_extended_precision(offset: float) -> None:
    real, fake = REAL + offset, FAKE + offset
    choice, exact = np.random.RandomState(2020).choice, []
    for _ in range(100):
        x = fake.numpy()[choice(200, 50, replace=False)].astype(np.longdouble)
        y = real.numpy()[choice(300, 50, replace=False)].astype(np.longdouble)
        xx, yy, xy = ((a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        off = 50 * 49
        exact.append((xx.sum() - xx.trace()) / off + (yy.sum() - yy.trace()) / off - 2 * xy.mean())
    mean, deviation = kid(fake, real, 50)
    assert mean == pytest.approx(float(np.mean(exact)), rel=1e-4)
    assert deviation == pytest.approx(float(np.std(exact)), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_mind_is_three_d_times_the_mean_wasserstein_distance(offset: float) -> None:
    """The paper's alpha is 3 d; a shift by m along each axis then scores 3 d m^2 on average."""
    directions = torch.randn(1000, 8, generator=rng(0, "mind"), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    x, y = ((v[:200].double() @ directions.T).numpy() for v in (FAKE, REAL))
    exact = 3 * 8 * np.square(np.sort(x, 0) - np.sort(y, 0)).mean()
    assert mind(FAKE + offset, REAL + offset, CPU) == pytest.approx(exact, rel=1e-4)
    assert mind(REAL, REAL, CPU) == 0
    assert mind(REAL + 0.5, REAL, CPU) == pytest.approx(3 * 8 * 0.25, rel=0.1)


# -- statistics of others -------------------------------------------------------------------------


ADM = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.ones(3)}


@pytest.mark.parametrize("more", [{}, ADM], ids=["pytorch-fid", "ADM"])
def test_mu_and_sigma_of_others_are_read(tmp_path: Path, more: dict[str, np.ndarray]) -> None:
    """pytorch-fid and EDM write mu and sigma; ADM also images and spatial statistics."""
    found = statistics_of(REAL)
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=found.mu.astype(np.float32), sigma=found.sigma, **more)
    read = moments.read_npz(path, 8)
    np.testing.assert_allclose(read.mu, found.mu, rtol=1e-6)
    assert np.array_equal(read.sigma, found.sigma)


def test_our_npz_is_read_by_numpy(tmp_path: Path) -> None:
    found = statistics_of(REAL)
    moments.write_npz(tmp_path / "new" / "ours.npz", found)
    with np.load(tmp_path / "new" / "ours.npz", allow_pickle=False) as file:
        assert np.array_equal(file["mu"], found.mu)
        assert np.array_equal(file["sigma"], found.sigma)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(8)},
        {"mu": np.zeros(7), "sigma": np.eye(7)},
        {"mu": np.zeros(8), "sigma": np.zeros((900, 900))},
        {"mu": np.zeros(8), "sigma": -np.eye(8)},
        {"mu": np.zeros(8), "sigma": np.triu(np.ones((8, 8)))},
        {"mu": np.full(8, np.nan), "sigma": np.eye(8)},
        {"mu": np.array([print] * 8, object), "sigma": np.eye(8)},
        {"mu": np.array(["a"] * 8), "sigma": np.eye(8)},
    ],
    ids=["no sigma", "dim", "huge", "negative", "asymmetric", "nan", "objects", "text"],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(EvaluationError, match=r"must be an npz file with mu \(8,\) and sigma"):
        moments.read_npz(path, 8)
    path.write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="must be an npz file"):
        moments.read_npz(path, 8)

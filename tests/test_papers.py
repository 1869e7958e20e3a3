"""What the papers measure: Parzen windows, the theorems in one dimension, probes, filters."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import REPO, environment

from pipeline import theory
from pipeline.ledger import best
from pipeline.parzen import SIGMAS, log_likelihoods, parzen
from pipeline.sampling import stream

# -- Parzen window ------------------------------------------------------------------------------


def test_the_window_is_the_formula_by_hand() -> None:
    """Three samples, two images, two dimensions: sums of Gaussians written out."""
    samples = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    images = torch.tensor([[0.25, 0.0], [1.0, 1.0]])
    found = log_likelihoods(images, samples, [0.2, 1.0])
    assert found.shape == (2, 2)
    assert found.dtype == torch.float64
    for row, sigma in enumerate((0.2, 1.0)):
        for column, x in enumerate(images.tolist()):
            density = sum(
                math.exp(-((x[0] - s[0]) ** 2 + (x[1] - s[1]) ** 2) / (2 * sigma**2))
                / (2 * math.pi * sigma**2)
                for s in samples.tolist()
            )
            assert found[row, column].item() == pytest.approx(math.log(density / 3), rel=1e-6)


def test_nothing_overflows_in_many_dimensions() -> None:
    """784 dimensions and a narrow window: exp alone would be 0; chunks change nothing."""
    images = torch.rand(600, 784, generator=stream(0, "x"))
    found = log_likelihoods(images, images[:50] * 0.5, [0.1])
    assert torch.isfinite(found).all()
    apart = torch.cat(
        [log_likelihoods(part, images[:50] * 0.5, [0.1]) for part in images.split(7)], 1
    )
    torch.testing.assert_close(found, apart, rtol=1e-12, atol=0)


def test_a_known_gaussian_scores_what_calculus_says() -> None:
    """Many samples of N(0.5, 0.2^2) in 2 dimensions: the window tends to N(0.5, v), v = 0.2^2 +
    sigma^2, whose mean log-likelihood is -log(2 pi v) - 0.2^2 / v, with deviation 0.2^2 / v.
    """
    drawn = {
        name: torch.randn(n, 2, generator=stream(0, name)) * 0.2 + 0.5
        for name, n in (("samples", 20_000), ("validation", 200), ("test", 2_000))
    }
    mean, error, sigma = parzen(*drawn.values())
    assert sigma == SIGMAS[0]  # so many samples: the narrowest
    v = 0.2**2 + sigma**2
    assert error == pytest.approx(0.2**2 / v / math.sqrt(2_000), rel=0.1)
    assert mean == pytest.approx(-math.log(2 * math.pi * v) - 0.2**2 / v, abs=3 * error)


def test_sigma_is_the_best_of_the_range_for_the_validation_images() -> None:
    """Few samples far apart want a wide window."""
    samples = torch.rand(20, 30, generator=stream(0, "s"))
    validation, test = torch.rand(2, 200, 30, generator=stream(0, "x")).unbind()
    _, _, sigma = parzen(samples, validation, test)
    means = [log_likelihoods(validation, samples, [s]).mean().item() for s in SIGMAS]
    assert sigma == SIGMAS[int(np.argmax(means))]
    assert SIGMAS[0] < sigma < SIGMAS[-1]


def test_the_best_row_of_a_likelihood_is_the_highest() -> None:
    rows = [
        {"step": k, "headline": "ll", "scores": {"ll": s}, "higher_is_better": True}
        for k, s in ((1, -5.0), (2, 7.0), (3, 7.0))
    ]
    assert best(rows) == rows[1]
    assert best([row | {"higher_is_better": False} for row in rows])["step"] == 1  # type: ignore[index]


# -- the theorems -------------------------------------------------------------------------------


def test_a_short_game_shows_the_theorems(tmp_path: Path) -> None:
    """Proposition 1: D trained alone comes to D*. Theorem 1: C(G) falls to -log 4, V follows."""
    torch.set_num_threads(1)
    moments = theory.play(seed=0, steps=400)
    first, alone, moved, last = moments
    assert first.off_best > alone.off_best
    assert alone.off_best < 0.1
    assert alone.value == pytest.approx(-math.log(4) + 2 * alone.jsd, abs=0.01)  # equation 6
    assert alone.jsd == first.jsd  # G has not moved
    assert moved.jsd < alone.jsd
    assert last.jsd < 0.01 < first.jsd
    assert last.value == pytest.approx(-math.log(4), abs=0.02)
    assert last.off_half < 0.25
    for moment in moments:
        assert moment.value <= -math.log(4) + 2 * moment.jsd + 1e-6  # D* is the maximum
        assert moment.p_g.sum() * (theory.RIGHT - theory.LEFT) / theory.BINS == pytest.approx(
            1, abs=0.02
        )
    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    assert theory.draw(moments)[:8] == b"\x89PNG\r\n\x1a\n"
    numbers = theory.summary(moments, 0, 400)
    assert json.loads(json.dumps(numbers))["moments"][3]["value"] == last.value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.jpg"], "must end in .png"),
        (["--out", "x.png", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_mistakes_of_theory_are_one_message(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.theory", *words],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

"""What the papers measure: Parzen windows, the theorems in one dimension, probes, filters."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import pixels_of, write_shards
from evaluating import add_checkpoint, evaluated, make_run
from launching import REPO, environment
from PIL import Image

from pipeline import filters, theory
from pipeline.checkpoint import load_snapshot
from pipeline.decode import encode
from pipeline.errors import EvaluationError
from pipeline.filters import guided_gradients
from pipeline.ledger import best, read_rows
from pipeline.linear_probe import standing
from pipeline.parzen import SIGMAS, log_likelihoods, parzen, pixels
from pipeline.probe import open_pair
from pipeline.reader import Cache, Reader
from pipeline.sampling import generate, stream, z_rows
from pipeline.scores import chosen_ids
from pipeline.shards import read_index, scan, write_index

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


def test_the_command_scores_a_run_by_its_parzen_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger's row is what the functions give for the same images; again, nothing is added."""
    run = make_run(tmp_path, steps=(10, 20))
    write_shards(tmp_path / "held-out", [40], (32, 32, 1))
    words = ("--run", run, "--metrics", "parzen", "--pending")
    with pytest.raises(EvaluationError, match=r"eval.parzen_shards \(empty\): .* --split test"):
        evaluated(*words)
    with pytest.raises(EvaluationError, match=r"must not be data\.shards"):
        evaluated(*words, f"eval.parzen_shards={tmp_path / 'shards'}")
    for _ in range(2):
        evaluated(*words, f"eval.parzen_shards={tmp_path / 'held-out'}")
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [10, 20]
    assert "LOG-LIK." in capsys.readouterr().out
    network, config = load_snapshot(run / "snapshots" / "step_00000020")
    samples = generate(network, z_rows(config.model, 0, "evaluation", 0, 100))
    index = read_index(str(tmp_path / "held-out"))
    images = np.empty((40, 32, 32, 1), np.uint8)
    Reader(index, Cache(index, "")).read(chosen_ids(40, 40), images)
    held_out = pixels(images)["pixels"]
    expected = parzen(pixels(samples)["pixels"], held_out[:4], held_out[4:])
    assert tuple(rows[1]["scores"].values()) == pytest.approx(expected)
    assert next(iter(rows[1]["scores"])) == rows[1]["headline"] == "eval/parzen_100"


# -- what D has learned -------------------------------------------------------------------------


@pytest.fixture
def labelled_run(tmp_path: Path) -> Path:
    """A checkpoint, and shards whose classes differ in brightness: any features can tell them."""
    run = make_run(tmp_path, steps=())
    add_checkpoint(run, 10)
    for name, count in (("shards", 200), ("test", 100)):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with wds.TarWriter(str(folder / "shard-000000.tar"), encoder=False, mtime=0) as tar:
            for k in range(count):
                image = pixels_of(k + len(name), (32, 32, 1)) // 4 + 60 * (k % 3)
                field = {"npy": encode(image.astype(np.uint8), "npy"), "cls": b"%d" % (k % 3)}
                tar.write({"__key__": f"{k:06d}", **field})
        write_index(folder, [scan(folder / "shard-000000.tar")], (32, 32, 1), {"test": name})
    return run


def test_the_probe_compares_d_with_a_random_one_and_with_pixels(
    labelled_run: Path, tmp_path: Path
) -> None:
    """Through ``evaluate probe``: three rows, easy classes found by all, the numbers as JSON."""
    pytest.importorskip("sklearn", reason="the extra probe is not installed")
    out = tmp_path / "probe.json"
    words = ["probe", "--run", labelled_run, "--test", tmp_path / "test", "--out", out, "--C", "1"]
    done = subprocess.run(
        [sys.executable, str(REPO / "pipeline" / "evaluate.py"), *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["outcomes"]] == ["D", "random D", "pixels"]
    # 16 places of every feature map: 4, 8 and 16 maps.
    assert [one["dim"] for one in found["outcomes"]] == [16 * (4 + 8 + 16)] * 2 + [32 * 32]
    assert all(one["accuracy"] == 1 for one in found["outcomes"])
    assert "100.00%" in done.stdout


def test_guided_gradients_are_zero_where_nothing_excites(labelled_run: Path) -> None:
    """The gradient of a response with respect to the image, units of either sign shut by the rule;
    for a single layer it is the filter itself at the place of the response.
    """
    _, _, D, random = open_pair(labelled_run, None, 0)
    x = torch.rand(3, 1, 32, 32, generator=stream(0, "x")) * 2 - 1
    standing(D, np.zeros((64, 32, 32, 1), np.uint8))
    responses, gradients = guided_gradients(D, x, 2)
    assert responses.shape == (3,)
    assert gradients.shape == x.shape
    assert torch.isfinite(gradients).all()
    one = torch.nn.Module()
    conv = torch.nn.Conv2d(1, 2, 4, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(random.layers[0].weight[:2])  # type: ignore[index, union-attr]
    one.layers = torch.nn.Sequential(conv, torch.nn.LeakyReLU(0.2), torch.nn.Identity())
    responses, gradients = guided_gradients(one, x, 1)
    maps = conv(x)[:, 1]
    for k in range(3):
        assert responses[k] == maps[k].max()
        y, left = divmod(int(maps[k].argmax()), 16)
        whole = torch.zeros(34, 34)
        whole[2 * y : 2 * y + 4, 2 * left : 2 * left + 4] = conv.weight[1, 0].detach()
        torch.testing.assert_close(gradients[k, 0], whole[1:33, 1:33])


def test_filters_are_drawn_beside_those_of_a_random_d(labelled_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "filters.png"
    words = ["--run", str(labelled_run), "--out", str(out), "--num-images", "100", "--count", "2"]
    out.write_bytes(filters.picture(filters.parse([*words, "--features", "3", "--scale", "1"])))
    with Image.open(out) as picture:
        width, height = picture.size
    assert width == 2 * 4 * 32 + 2 * filters.GAP
    assert height == 14 + filters.GAP + 3 * 32  # four filters of 4x4, enlarged and framed, in a row


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
    from pipeline.theory_figure import draw

    assert draw(moments)[:8] == b"\x89PNG\r\n\x1a\n"
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

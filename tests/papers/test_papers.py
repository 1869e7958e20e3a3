"""Experiments of the papers: Parzen window, the theorems in one dimension, probe and filters."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import CountingServer, pixels_of, write_shards
from evaluating import (
    MODEL,
    add_checkpoint,
    add_snapshot,
    evaluated,
    generator_of,
    make_config,
    make_run,
)
from launching import REPO, STATE, environment
from PIL import Image

from pipeline import evaluate
from pipeline.config.loading import dump, load
from pipeline.data.cache import Cache
from pipeline.data.codecs import encode
from pipeline.data.index_writer import write_index
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.data.tar_scan import scan
from pipeline.evaluation.candidates import chosen_ids
from pipeline.evaluation.parzen import SAMPLES, SIGMAS, log_likelihoods, parzen
from pipeline.models.dcgan import init_weights, make_discriminator
from pipeline.models.noise import rng, z_rows
from pipeline.models.sampling import draw_images
from pipeline.papers import gan_1d, guided_backprop, linear_probe, probe
from pipeline.papers.guided_backprop import guided_gradients
from pipeline.papers.linear_probe import check_memory, set_batchnorm_statistics
from pipeline.papers.probe import load_discriminators
from pipeline.runs import checkpoint
from pipeline.runs.results import best, read_rows
from pipeline.runs.snapshot import load_snapshot
from pipeline.runs.step_folders import step_of
from pipeline.runtime.errors import DataError, EvaluationError, GenerationError, UserError

# -- Parzen window ------------------------------------------------------------------------------


def test_the_window_is_the_formula_by_hand() -> None:
    """Three samples, two images and two dimensions, against sums of Gaussians written out."""
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
    """Values are finite in 784 dimensions, where exp alone is 0, and do not depend on chunks."""
    images = torch.rand(600, 784, generator=rng(0, "x"))
    found = log_likelihoods(images, images[:50] * 0.5, [0.1])
    assert torch.isfinite(found).all()
    apart = torch.cat(
        [log_likelihoods(part, images[:50] * 0.5, [0.1]) for part in images.split(7)], 1
    )
    torch.testing.assert_close(found, apart, rtol=1e-12, atol=0)


def test_more_samples_than_fit_are_processed_in_parts() -> None:
    """The sum over parts equals the formula on all distances, also with a part far away."""
    samples = torch.rand(2 * SAMPLES + 7, 5, generator=rng(0, "s"))
    samples[:SAMPLES] += 1000
    images = torch.rand(30, 5, generator=rng(0, "x"))
    found = log_likelihoods(images, samples, [0.1, 0.5])
    for row, sigma in enumerate((0.1, 0.5)):
        squares = torch.cdist(images.double(), samples.double()).square()
        sums = torch.logsumexp(-squares / (2 * sigma**2), 1)
        expected = sums - math.log(len(samples)) - 5 / 2 * math.log(2 * math.pi * sigma**2)
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-7)


def test_a_known_gaussian_scores_what_calculus_says() -> None:
    """Samples of N(0.5, 0.2^2) in 2 dimensions have the density N(0.5, v) with v = 0.2^2 + sigma^2.

    Its mean log-likelihood is -log(2 pi v) - 0.2^2 / v, with standard deviation 0.2^2 / v.
    """
    drawn = {
        name: torch.randn(n, 2, generator=rng(0, name)) * 0.2 + 0.5
        for name, n in (("samples", 20_000), ("validation", 200), ("test", 2_000))
    }
    mean, error, sigma = parzen(*drawn.values())
    assert sigma == SIGMAS[0]  # the smallest, because there are many samples
    v = 0.2**2 + sigma**2
    assert error == pytest.approx(0.2**2 / v / math.sqrt(2_000), rel=0.1)
    assert mean == pytest.approx(-math.log(2 * math.pi * v) - 0.2**2 / v, abs=3 * error)


def test_sigma_is_the_best_of_the_range_for_the_validation_images() -> None:
    """With few samples far apart it is neither the smallest nor the largest value."""
    samples = torch.rand(20, 30, generator=rng(0, "s"))
    validation, test = torch.rand(2, 200, 30, generator=rng(0, "x")).unbind()
    _, _, sigma = parzen(samples, validation, test)
    means = [log_likelihoods(validation, samples, [s]).mean().item() for s in SIGMAS]
    assert sigma == SIGMAS[int(np.argmax(means))]
    assert SIGMAS[0] < sigma < SIGMAS[-1]


def test_the_best_row_of_a_likelihood_is_the_highest() -> None:
    """The earliest of equal rows is best; without higher_is_better it is the lowest."""
    rows = [
        {"step": k, "headline": "ll", "scores": {"ll": s}, "higher_is_better": True}
        for k, s in ((1, -5.0), (2, 7.0), (3, 7.0))
    ]
    assert best(rows) == rows[1]
    assert best([row | {"higher_is_better": False} for row in rows])["step"] == 1  # type: ignore[index]


def test_the_command_scores_a_run_by_its_parzen_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row has the value of ``parzen`` for the same images. A second run adds nothing."""
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
    samples = draw_images(network, z_rows(config.model, 0, "evaluation", 0, 100))
    index = read_index(str(tmp_path / "held-out"))
    images = np.empty((40, 32, 32, 1), np.uint8)
    Reader(index, Cache(index, "")).read(chosen_ids(40, 40), images)
    held_out, drawn = (torch.from_numpy(x).flatten(1).double() / 255 for x in (images, samples))
    expected = parzen(drawn, held_out[:4], held_out[4:])
    assert tuple(rows[1]["scores"].values()) == pytest.approx(expected)
    assert next(iter(rows[1]["scores"])) == rows[1]["headline"] == "eval/parzen_100"


def run_module(module: str, *words: object, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )


def test_a_sigma_at_the_end_of_the_range_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out images almost equal to those of a constant G want the smallest sigma."""
    run = make_run(tmp_path, steps=())
    G = generator_of(10)
    with torch.no_grad():
        G.layers.to_image.weight.zero_()
    add_snapshot(run, make_config(tmp_path), 10, G)
    (tmp_path / "grey").mkdir()
    with wds.TarWriter(str(tmp_path / "grey" / "0.tar"), encoder=False, mtime=0) as tar:
        for k in range(20):
            image = np.full((32, 32, 1), 118 + k, np.uint8)
            tar.write({"__key__": f"{k}", "npy": encode(image, "npy")})
    write_index(tmp_path / "grey", [scan(tmp_path / "grey" / "0.tar")], (32, 32, 1), {})
    words = ("--run", run, "--metrics", "parzen", f"eval.parzen_shards={tmp_path / 'grey'}")
    evaluated(*words)
    assert read_rows(run)[0]["scores"]["eval/parzen_sigma_100"] == SIGMAS[0]
    assert "sigma = 0.1 is at the end of the range" in capsys.readouterr().err


# -- what D has learned -------------------------------------------------------------------------


@pytest.fixture
def labelled_run(tmp_path: Path) -> Path:
    """A run with a checkpoint, and labelled shards whose classes differ in brightness."""
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
    """``evaluate probe`` prints and writes three rows; these easy classes are all recognised."""
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
    # 16 positions of every feature map: 4, 8 and 16 maps.
    assert [one["dim"] for one in found["outcomes"]] == [16 * (4 + 8 + 16)] * 2 + [32 * 32]
    assert all(one["accuracy"] == 1 for one in found["outcomes"])
    assert "100.00%" in done.stdout


def probed(run: Path, *words: object) -> dict[str, Any]:
    """Run ``evaluate probe`` in this process and return its JSON document."""
    pytest.importorskip("sklearn", reason="the extra probe is not installed")
    options = evaluate.parse([str(word) for word in ("probe", "--run", run, "--C", "1", *words)])
    return probe.probe(options)[1]


def test_the_probe_is_also_a_module(tmp_path: Path) -> None:
    """``python -m pipeline.papers.probe`` runs, and answers a mistake with exit code 2."""
    pytest.importorskip("sklearn", reason="the extra probe is not installed")
    done = run_module("pipeline.papers.probe", "--run", tmp_path, "--test", tmp_path)
    assert done.returncode == 2
    assert f"--run ({tmp_path}): the folder has no config.yaml" in done.stderr


def reconfigured(run: Path, section: str, **values: Any) -> Path:
    """Change the configuration in the run folder."""
    config = load(run / "config.yaml")
    changed = replace(config, **{section: replace(getattr(config, section), **values)})
    (run / "config.yaml").write_text(dump(changed))
    return run


def test_training_images_are_refused_as_test_images(labelled_run: Path, tmp_path: Path) -> None:
    """Those of the SVM, and those of D, which the checkpoint names by their fingerprint."""
    with pytest.raises(
        EvaluationError, match=r"--test .* these are training images of D or of the SVM"
    ):
        probed(labelled_run, "--test", tmp_path / "shards")
    seen = {"stream": {"fingerprint": read_index(str(tmp_path / "test")).fingerprint}}
    D = load_discriminators(labelled_run, None, 0)[2]
    checkpoint.save(labelled_run, 20, {"D": D}, {}, STATE | seen)
    with pytest.raises(
        EvaluationError, match=r"--test .* these are training images of D or of the SVM"
    ):
        probed(labelled_run, "--test", tmp_path / "test")


def test_mistakes_of_the_probe_are_one_message(labelled_run: Path, tmp_path: Path) -> None:
    """Each names the option, its value and the remedy."""

    def refused(error: type[UserError], message: str, *words: object, run: Path) -> None:
        with pytest.raises(error, match=message):
            probed(run, *words)

    test = ("--test", tmp_path / "test")
    write_shards(tmp_path / "large", [40], (64, 64, 1))
    refused(DataError, r"--test .* --size 32", "--test", tmp_path / "large", run=labelled_run)
    nothing = ("--test", tmp_path / "nothing")
    refused(DataError, r"--test .*nothing\): no such folder", *nothing, run=labelled_run)
    (tmp_path / "bare").mkdir()
    with wds.TarWriter(str(tmp_path / "bare" / "0.tar"), encoder=False, mtime=0) as tar:
        for k in range(40):
            tar.write({"__key__": f"{k}", "npy": encode(pixels_of(k, (32, 32, 1)), "npy")})
    write_index(tmp_path / "bare", [scan(tmp_path / "bare" / "0.tar")], (32, 32, 1), {})
    bare = ("--train", tmp_path / "bare")
    refused(
        EvaluationError,
        r"--train .*: every sample must have a label",
        *test,
        *bare,
        run=labelled_run,
    )
    few = ("--num-train", 1)
    refused(
        EvaluationError,
        r"--num-train \(1\): .* fewer than two classes",
        *test,
        *few,
        run=labelled_run,
    )
    (tmp_path / "x.json").write_text("mine")
    existing = ("--out", tmp_path / "x.json")
    refused(GenerationError, "x.json.*exists already", *test, *existing, run=labelled_run)
    nowhere = ("--out", "/proc/nowhere/x.json")  # checked before the run is opened
    refused(GenerationError, "cannot be written", *test, *nowhere, run=tmp_path / "no run")
    mlp = make_config(tmp_path).model
    mlp = replace(mlp, architecture="mlp", ngf=8, ndf=8)
    reconfigured(labelled_run, "model", architecture="mlp", ngf=8, ndf=8)
    checkpoint.save(labelled_run, 20, {"D": make_discriminator(mlp)}, {}, STATE)
    refused(EvaluationError, "mlp, whose D has no convolutional layers", *test, run=labelled_run)
    words = ["--run", str(labelled_run), "--out", str(tmp_path / "f.png")]
    with pytest.raises(EvaluationError, match="mlp, whose D has no convolutional layers"):
        guided_backprop.make_figure(guided_backprop.parse(words))


def test_the_discriminators_are_that_of_the_checkpoint_and_a_random_one(
    labelled_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged newer checkpoint is skipped and named on stderr."""
    broken = add_checkpoint(labelled_run, 20) / "D.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    _, found, trained, random = load_discriminators(labelled_run, None, 5)
    assert "step_00000020: D.safetensors is damaged" in capsys.readouterr().err
    assert step_of(found.path) == 10
    kept, first = checkpoint.read(found.path).weights["D"], make_discriminator(MODEL)
    init_weights(first, rng(5, "probe"))
    for name, value in trained.state_dict().items():
        assert torch.equal(value, kept[name])
        assert torch.equal(random.state_dict()[name], first.state_dict()[name])
    assert not torch.equal(trained.layers[0].weight, random.layers[0].weight)  # type: ignore[index, union-attr]


def test_features_that_do_not_fit_into_memory_are_refused() -> None:
    """60,000 images of configs/dcgan_64.yaml with 30,720 features of 28 bytes are 48 GiB."""
    dim = 16 * (128 + 256 + 512 + 1024)
    with pytest.raises(
        EvaluationError, match=r"take 48 GiB, but this machine has 16 GiB.* most 19972"
    ):
        check_memory(60_000, 0, dim, 16 << 30)
    check_memory(19_972, 0, dim, 16 << 30)


def test_shards_of_a_url_are_downloaded_into_data_cache_dir(
    labelled_run: Path,
    tmp_path: Path,
    serve: Callable[[Path], CountingServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for two commands, and not into the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server = serve(tmp_path / "test")
    cache = tmp_path / "cache"
    run = reconfigured(labelled_run, "data", cache_dir=str(cache))
    probed(run, "--test", server.url)
    words = ["--shards", server.url, "--num-images", "64", "--count", "1", "--features", "1"]
    guided_backprop.make_figure(
        guided_backprop.parse(["--run", str(run), "--out", "f.png", *words])
    )
    assert len(list(cache.glob("*.tar"))) == 1
    assert server.gets["shard-000000.tar"] == 1
    assert not list((tmp_path / "here").iterdir())


def test_the_last_fifth_of_the_training_images_chooses_the_svm() -> None:
    """C and accuracy equal those of scikit-learn, although the features are scaled and shifted."""
    svm = pytest.importorskip("sklearn.svm", reason="the extra probe is not installed")
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 3, 300)
    x = (draws.normal(size=(300, 20)) + np.eye(3, 20)[labels] * 2).astype(np.float32)
    length = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    scaled, strengths = (x - x.mean(0)) / length, [1e-4, 1e-2, 1.0, 1e4]
    scores = [
        svm.LinearSVC(C=C, tol=1e-6, max_iter=100_000, dual=False)
        .fit(scaled[:240], labels[:240])
        .score(scaled[240:], labels[240:])
        for C in strengths
    ]
    best_of_them = strengths[int(np.argmax(scores))]
    assert best_of_them not in (strengths[0], strengths[-1])
    moved, test = x * 50 + 7, x[:100] * 50 + 7
    found = linear_probe.train_and_test("x", (moved, labels), (test, labels[:100]), strengths)
    assert vars(found)["C"] == best_of_them
    again = svm.LinearSVC(C=best_of_them, tol=1e-6, dual=False).fit(scaled, labels)
    assert found.accuracy == pytest.approx(again.score(scaled[:100], labels[:100]), abs=0.011)


def test_batchnorm_statistics_of_d_are_the_mean_over_its_batches(labelled_run: Path) -> None:
    """Mean and unbiased variance of each batch of 64 inputs, averaged; D is in eval mode."""
    _, _, D, _ = load_discriminators(labelled_run, None, 0)
    images = np.stack([pixels_of(k, (32, 32, 1)) for k in range(128)])
    set_batchnorm_statistics(D, images)
    assert not any(module.training for module in D.modules())
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    before_norm = torch.nn.Sequential(*list(D.layers)[:3])  # type: ignore[arg-type]
    with torch.no_grad():
        parts = [before_norm(part).transpose(0, 1).flatten(1) for part in x.split(64)]
    (norm, *_) = [m for m in D.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(norm.running_mean, sum(part.mean(1) for part in parts) / 2)
    torch.testing.assert_close(norm.running_var, sum(part.var(1) for part in parts) / 2)


def test_features_are_every_activation_max_pooled_to_four_by_four(labelled_run: Path) -> None:
    """They equal a max-pooling written out by reshapes, layer after layer."""
    _, _, D, _ = load_discriminators(labelled_run, None, 0)
    images = np.stack([pixels_of(k, (32, 32, 1)) for k in range(70)])
    set_batchnorm_statistics(D, images)
    expected, h = [], torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        for layer in D.layers:  # type: ignore[union-attr]
            h = layer(h)
            if isinstance(layer, torch.nn.LeakyReLU):
                size = h.shape[-1] // 4
                places = h.unflatten(3, (4, size)).unflatten(2, (4, size))
                expected.append(places.amax((3, 5)).flatten(1))
    found = linear_probe.conv_features(D, images)
    np.testing.assert_allclose(found, torch.cat(expected, 1).numpy(), rtol=1e-4, atol=1e-5)


def test_guided_gradients_pass_active_units_with_a_positive_gradient_only() -> None:
    """Of four units, active or not and with positive gradient or not, one passes its gradient."""
    first, second = torch.nn.Conv2d(1, 4, 1, bias=False), torch.nn.Conv2d(4, 1, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([2.0, -3.0, 1.0, -1.0]).view(4, 1, 1, 1))
        second.weight.copy_(torch.tensor([5.0, 7.0, -2.0, -4.0]).view(1, 4, 1, 1))
    D = torch.nn.Module()
    D.layers = torch.nn.Sequential(first, torch.nn.LeakyReLU(0.2), second, torch.nn.Identity())
    responses, gradients = guided_gradients(D, torch.ones(1, 1, 1, 1), 0)
    assert responses.item() == pytest.approx(5 * 2 + 7 * -3 * 0.2 - 2 * 1 - 4 * -1 * 0.2)
    assert gradients.item() == 2 * 5


def test_first_filters_are_the_weights_around_grey(labelled_run: Path) -> None:
    """A weight of 0 is grey, the largest of a filter is white or black."""
    _, _, D, _ = load_discriminators(labelled_run, None, 0)
    weight = next(iter(D.layers)).weight.detach()  # type: ignore[arg-type]
    found = guided_backprop.first_filters(D)
    assert found.shape == (4, 4, 4, 1)
    for k in range(4):
        scaled = weight[k, 0] / weight[k, 0].abs().max()
        expected = (127.5 + 127.5 * scaled).round().to(torch.uint8)
        assert np.array_equal(found[k, :, :, 0], expected.numpy())
        assert found[k].min() == 0 or found[k].max() == 255


def test_guided_gradients_of_one_layer_are_its_filter_where_it_responds(labelled_run: Path) -> None:
    """The gradient of a single layer is its filter, where the response is largest.

    Through a whole D the shapes are right and all values finite.
    """
    _, _, D, random = load_discriminators(labelled_run, None, 0)
    x = torch.rand(3, 1, 32, 32, generator=rng(0, "x")) * 2 - 1
    set_batchnorm_statistics(D, np.zeros((64, 32, 32, 1), np.uint8))
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
        padded = torch.zeros(34, 34)
        padded[2 * y : 2 * y + 4, 2 * left : 2 * left + 4] = conv.weight[1, 0].detach()
        torch.testing.assert_close(gradients[k, 0], padded[1:33, 1:33])


def test_top_images_are_drawn_left_of_their_gradients(labelled_run: Path) -> None:
    """Each feature has a row, with the largest response first."""
    _, _, D, _ = load_discriminators(labelled_run, None, 0)
    images = np.stack([pixels_of(k, (32, 32, 1)) for k in range(70)])
    set_batchnorm_statistics(D, images)
    found = guided_backprop.draw_top_images(D, images, features=3, count=2)
    assert found.shape == (3 * 32, 4 * 32, 1)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for feature in range(3):
        row = found[feature * 32 :][:32]
        with torch.no_grad():
            h = torch.nn.Sequential(*list(D.layers)[:-1])(x)  # type: ignore[arg-type]
        best = h[:, feature].amax((1, 2)).argsort(descending=True)[:2]
        _, slopes = guided_gradients(D, x[best], feature)
        for k, image in enumerate(best.tolist()):
            assert np.array_equal(row[:, 64 * k : 64 * k + 32], images[image])
            scaled = (slopes[k, 0] / slopes[k].abs().max()).numpy()
            right = row[:, 64 * k + 32 : 64 * k + 64, 0]
            np.testing.assert_allclose(right, 127.5 + 127.5 * scaled, atol=0.51)


def test_filters_are_drawn_beside_those_of_a_random_d(labelled_run: Path, tmp_path: Path) -> None:
    """Two halves, each of filters above rows of pairs; what is beside the filters is white."""
    out = tmp_path / "filters.png"
    words = ["--run", str(labelled_run), "--out", str(out), "--num-images", "100", "--count", "2"]
    out.write_bytes(
        guided_backprop.make_figure(
            guided_backprop.parse([*words, "--features", "3", "--scale", "1"])
        )
    )
    with Image.open(out) as picture:
        width, height = picture.size
        pixels = np.asarray(picture)
    assert width == 2 * 4 * 32 + 2 * guided_backprop.GAP
    filters = 4 * 3 + 2  # 4x4, enlarged by 3, with a frame of 1
    assert height == filters + guided_backprop.GAP + 3 * 32
    assert (pixels[:filters, 4 * filters : 4 * 32] == 255).all()
    assert (pixels[:filters, 4 * 32 + 2 * guided_backprop.GAP + 4 * filters :] == 255).all()


def test_mistakes_of_filters_are_one_message(labelled_run: Path, tmp_path: Path) -> None:
    """An existing file, shards of another shape, and more images in a row than were read."""
    out = tmp_path / "f.png"
    write_shards(tmp_path / "large", [70], (64, 64, 1))
    for words, message in (
        (["--shards", str(tmp_path / "large")], r"--shards .* --size 32"),
        (["--num-images", "64", "--count", "65"], r"--count \(65\): must be at most .* is 64"),
    ):
        with pytest.raises(UserError, match=message):
            guided_backprop.make_figure(
                guided_backprop.parse(["--run", str(labelled_run), "--out", str(out), *words])
            )
    out.write_text("mine")
    done = run_module("pipeline.papers.guided_backprop", "--run", labelled_run, "--out", out)
    assert done.returncode == 2
    assert "exists already; give another name" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_text() == "mine"


# -- the theorems -------------------------------------------------------------------------------


def test_a_short_game_shows_the_theorems(tmp_path: Path) -> None:
    """D trained alone approaches D* (proposition 1); C(G) and V fall to -log 4 (theorem 1)."""
    torch.set_num_threads(1)
    moments = gan_1d.play(seed=0, steps=400)
    first, alone, moved, last = moments
    assert first.off_best > alone.off_best
    assert alone.off_best < 0.1
    assert alone.value == pytest.approx(-math.log(4) + 2 * alone.jsd, abs=0.01)  # equation 6
    assert alone.jsd == first.jsd  # G has not moved
    assert moved.jsd < alone.jsd
    assert last.jsd < 0.01 < first.jsd
    assert last.value == pytest.approx(-math.log(4), abs=0.02)
    assert last.off_half < 0.03 < first.off_half  # D ends near 1/2, and did not start there
    for moment in moments:
        assert moment.value <= -math.log(4) + 2 * moment.jsd + 1e-6  # D* is the maximum
        assert moment.p_g.sum() * (gan_1d.RIGHT - gan_1d.LEFT) / gan_1d.BINS == pytest.approx(
            1, abs=0.02
        )
    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    from pipeline.papers.theory import draw

    assert draw(moments)[:8] == b"\x89PNG\r\n\x1a\n"
    numbers = gan_1d.summary(moments, 0, 400)
    assert json.loads(json.dumps(numbers))["moments"][3]["value"] == last.value


def fixed(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """Return a network that computes ``function``."""
    network = torch.nn.Module()
    network.forward = function  # type: ignore[method-assign]
    return network


def test_the_value_of_a_d_that_is_sure_is_exact() -> None:
    """V = -softplus(-l) - softplus(l) for a constant logit l, also where D rounds to 0 or 1.

    The table warns if p_g lies outside the interval of integration.
    """
    for logit in (18.0, 40.0, -40.0):
        D = fixed(lambda x, logit=logit: torch.full_like(x, logit))  # type: ignore[misc]
        moment = gan_1d.measure("x", fixed(lambda z: z * 0.3), D)
        assert moment.value == pytest.approx(-abs(logit), rel=1e-3)
        assert moment.outside == 0
        assert "outside" not in gan_1d.table([moment])
    wide = gan_1d.measure("x", fixed(lambda z: z * 2), fixed(torch.zeros_like))
    assert wide.outside == pytest.approx(0.2113, abs=1e-3)  # P(|z| > 1.25)
    assert "21 % of p_g lies outside [-2.5, 2.5]" in gan_1d.table([wide])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.jpg"], "must end in .png"),
        (["--out", "x.png", "--steps", "0"], "--steps: 0: must be a whole number from 1"),
        (["--out", "/proc/nowhere/x.png"], "cannot be written"),
        (["--out", "there.png"], "there.json): exists already"),
    ],
)
def test_mistakes_of_theory_are_one_message(words: list[str], message: str, tmp_path: Path) -> None:
    """They are reported before the training, and no file is written."""
    (tmp_path / "there.json").write_text("mine")
    done = run_module("pipeline.papers.theory", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"

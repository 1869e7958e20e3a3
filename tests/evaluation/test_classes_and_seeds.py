"""Frechet distances of single classes, and scores as mean and deviation over seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from evaluating import MODEL, TINY, add_snapshot, evaluated, make_config, make_run
from PIL import Image
from ranks import on_ranks
from scipy.linalg import sqrtm

from pipeline.config.loading import dump
from pipeline.evaluation.metrics import class_fid, over_seeds
from pipeline.models.dcgan import Generator, init_weights
from pipeline.models.noise import rng
from pipeline.runs.results import best, read_rows
from pipeline.runtime.errors import EvaluationError

CLASSES = "eval.metrics=[class_fid]"
PER_CLASS = "eval/class_fd_tiny-extractor-Tiny_16_100_full_undersampled"


def make_conditional_run(folder: Path) -> Path:
    """Write shards of 10 classes, 13 images each, and a run whose G knows them."""
    write_shards(folder / "shards", [70, 60], (32, 32, 1))
    model = dataclasses.replace(MODEL, num_classes=10)
    config = dataclasses.replace(make_config(folder), model=model)
    G = Generator(model)
    init_weights(G, rng(0, "test"))
    run = add_snapshot(folder / "run", config, 10, G).parents[1]
    (run / "config.yaml").write_text(dump(config))
    return run


def exact(a: np.ndarray, b: np.ndarray) -> float:
    x, y = (np.cov(v, rowvar=False) for v in (a, b))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(x + y - 2 * np.real(sqrtm(x @ y))))


def test_the_distance_of_each_class_is_that_of_its_images() -> None:
    """And the score is their mean; classes may have different numbers of images."""
    draw = np.random.default_rng(0).normal
    generated, real = draw(0, 1, (300, 4)), draw(0.3, 1.2, (200, 4))
    classes = np.arange(300) % 3, np.minimum(np.arange(200) % 4, 2)
    found = class_fid(torch.from_numpy(generated), torch.from_numpy(real), classes)
    expected = [exact(generated[classes[0] == k], real[classes[1] == k]) for k in range(3)]
    assert list(found.values())[1:] == pytest.approx(expected, rel=1e-6)
    assert found["class_fid"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_run_with_classes_has_a_distance_of_each(tmp_path: Path) -> None:
    """Of too few images they are refused, or forced and named undersampled."""
    run = make_conditional_run(tmp_path)
    with pytest.raises(EvaluationError, match=r"class_fid: needs 32 .* of each class, not 10"):
        evaluated("--run", run, CLASSES)
    evaluated("--run", run, CLASSES, "eval.force=true")
    evaluated("--run", run, CLASSES, "eval.force=true", "eval.labels=uniform")
    data, uniform = read_rows(run)
    assert data["headline"] == PER_CLASS
    assert len(data["scores"]) == len(uniform["scores"]) == 11
    each = [data["scores"][PER_CLASS.replace("fd_", f"fd_c{k}_")] for k in range(10)]
    assert np.mean(each) == pytest.approx(data["scores"][PER_CLASS])
    assert data["settings"]["class_images"] == 10


def test_what_has_no_classes_has_no_distance_of_them(tmp_path: Path) -> None:
    """Neither a G without classes nor a folder of images."""
    (tmp_path / "plain").mkdir()
    with pytest.raises(EvaluationError, match="class_fid: needs a class-conditional G"):
        evaluated("--run", make_run(tmp_path / "plain"), CLASSES)
    run = make_conditional_run(tmp_path)
    with pytest.raises(EvaluationError, match=r"class_fid.*classes of images are unknown"):
        evaluated("--run", run, CLASSES, "eval.force=true", *few_images(tmp_path))


def few_images(folder: Path) -> tuple[str, ...]:
    (folder / "images").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (100, 32, 32), np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
    return "--images", str(folder / "images")


def test_several_seeds_are_one_row_of_means_and_deviations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean and sample deviation of the rows of the single seeds; the table has both."""
    run = make_run(tmp_path, (10,))
    capsys.readouterr()
    evaluated("--run", run, "eval.seeds=[0,5,9]")
    assert " +-" in capsys.readouterr().out
    for seed in (0, 5, 9):
        evaluated("--run", run, f"eval.seeds=[{seed}]")
    evaluated("--run", run)  # seed 0, which has a row
    together, *alone = read_rows(run)
    assert len(alone) == 3
    assert together["settings"]["seeds"] == [0, 5, 9]
    for key in alone[0]["scores"]:
        values = [row["scores"][key] for row in alone]
        assert together["scores"][key] == np.mean(values)
        if "_std_" not in key:
            assert together["scores"][f"{key}_sd"] == np.std(values, ddof=1)
    assert together["headline"] == alone[0]["headline"]
    assert best([together]) == together


def test_one_seed_has_no_deviation() -> None:
    assert over_seeds([{"eval/fid": 1.0}]) == {"eval/fid": 1.0}


def test_two_processes_have_the_same_mean_over_seeds(tmp_path: Path) -> None:
    run = make_run(tmp_path, (10,))
    words = ("--run", str(run), "eval.seeds=[1,2]", f"eval.extractor={TINY}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # linear algebra rounds by their number
    evaluated(*words, "eval.batch_size=16")
    torch.set_num_threads(threads)
    (alone,) = read_rows(run)
    (run / "evaluations.jsonl").unlink()
    on_ranks(2, evaluated, *words, "eval.batch_size=16")
    assert read_rows(run)[0]["scores"] == alone["scores"]

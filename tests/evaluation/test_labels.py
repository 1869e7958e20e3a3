"""Classes of generated images follow the shares that they have in the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from evaluating import MODEL, add_snapshot, evaluated, make_config

from pipeline.config.loading import dump
from pipeline.data.shards import Index
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import classes_like
from pipeline.models.dcgan import Generator, init_weights
from pipeline.models.noise import rng, z_rows
from pipeline.runs.results import read_rows
from pipeline.runtime.errors import EvaluationError


def index_of(labels: list[int]) -> Index:
    table = np.zeros(len(labels), [("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])
    table["label"] = labels
    return Index("shards", "npy", (32, 32, 1), (), table)


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        ([0] * 60 + [1] * 30 + [2] * 10, 50, [30, 15, 5]),
        ([0] * 60 + [1] * 30 + [2] * 10, 7, [4, 2, 1]),  # 4.2, 2.1, 0.7
        ([0, 1, 2], 4, [2, 1, 1]),  # equal remainders: the lower number
        ([0, 0, 2], 6, [4, 0, 2]),
    ],
)
def test_the_numbers_of_images_are_the_shares_by_largest_remainder(labels, count, expected):
    classes = classes_like(index_of(labels), 3, count)
    assert np.bincount(classes, minlength=3).tolist() == expected
    assert torch.equal(classes, classes_like(index_of(labels), 3, count))


def test_classes_are_mixed():
    """IS is a mean over parts of the images, KID over subsets: no part may be of one class."""
    classes = classes_like(index_of([0] * 500 + [1] * 500), 2, 1000)
    assert all(30 < int(part.sum()) < 70 for part in classes.split(100))


def test_a_row_of_the_noise_table_keeps_its_z_with_any_class():
    model = replace(MODEL, num_classes=3)
    classes = torch.tensor([2] * 70)
    plain, chosen = (z_rows(model, 0, "test", 60, 10, c) for c in (None, classes))
    assert torch.equal(plain[:, : model.z_dim], chosen[:, : model.z_dim])
    assert chosen[:, model.z_dim :].argmax(1).tolist() == [2] * 10
    assert plain[:, model.z_dim :].argmax(1).tolist() == [k % 3 for k in range(60, 70)]


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, 3]])
def test_labels_that_do_not_fit_the_generator_are_refused(labels):
    with pytest.raises(EvaluationError, match=r"labels .* has the classes 0 to 2.*uniform"):
        classes_like(index_of(labels), 3, 10)


def test_a_perfect_generator_of_skewed_classes_scores_well():
    """It has the features of the data. With equally many of each class they are of another law."""
    rng_ = np.random.default_rng(0)
    centres = rng_.normal(0, 5, (3, 4))
    index = index_of([0] * 1800 + [1] * 900 + [2] * 300)
    real = centres[index.table["label"]].mean(0)
    like = centres[classes_like(index, 3, 3000)].mean(0)
    uniform = centres[np.arange(3000) % 3].mean(0)
    assert np.abs(like - real).max() < 1e-12
    assert np.abs(uniform - real).max() > 0.1


def test_the_protocol_of_a_run_names_the_rule(tmp_path: Path):
    write_shards(tmp_path / "shards", [70, 60], (32, 32, 1))
    model = replace(MODEL, num_classes=10)
    config = replace(make_config(tmp_path), model=model)
    G = Generator(model)
    init_weights(G, rng(0, "test"))
    run = add_snapshot(tmp_path / "run", config, 10, G).parents[1]
    (run / "config.yaml").write_text(dump(config))
    evaluated("--run", run)
    evaluated("--run", run, "eval.labels=uniform")
    by_rule = {row["settings"]["labels"]: row for row in read_rows(run)}
    assert set(by_rule) == {"data", "uniform"}
    assert by_rule["data"]["protocol"] != by_rule["uniform"]["protocol"]
    G, model = candidates.open_generator(
        candidates.find_in_run(run, "ema")[-1], run, "ema", torch.device("cpu")
    )
    images = candidates.generated_images(G, model, 0, torch.tensor([3] * 10))
    assert not np.array_equal(images(0, 10), candidates.generated_images(G, model, 0)(0, 10))

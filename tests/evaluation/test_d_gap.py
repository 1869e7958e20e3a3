"""D's mean logit of training images is compared with that of held-out and of generated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import MODEL, add_checkpoint, evaluated, generator_of, make_config, make_run
from test_memorization import write_held_out

from pipeline.data.shards import read_index
from pipeline.evaluation.candidates import chosen_ids, find_in_run, with_generator
from pipeline.evaluation.d_gap import d_gap, open_discriminator
from pipeline.models.dcgan import Generator
from pipeline.models.sampling import make_sampler
from pipeline.runs import checkpoint
from pipeline.runs.results import read_rows

CPU = torch.device("cpu")


def test_the_ledger_has_the_gap_of_a_step_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A snapshot beside the checkpoint with its G has it too; without D a line says so."""
    run = make_run(tmp_path, (10,))
    for step in (20, 30):
        add_checkpoint(run, step)
    held_out = write_held_out(tmp_path / "held-out", 1000)
    words = ("eval.metrics=[memorization]", f"eval.held_out={held_out}")
    evaluated("--run", run, "--pending", *words)
    without, *others = read_rows(run)
    assert "eval/d_gap" not in without["scores"]
    said = capsys.readouterr().err
    assert "step 10: left out: eval/d_gap: no checkpoint of this step has this G" in said
    assert "step 20: D's mean logit of training images is" in said
    for row in others:
        assert {"eval/d_gap", "eval/d_margin"} <= set(row["scores"])


def test_only_the_checkpoint_with_the_same_generator_counts(tmp_path: Path) -> None:
    """The checkpoint of a step that was trained anew has another G, so its D is not taken."""
    run = make_run(tmp_path, (20,))
    add_checkpoint(run, 20)  # its G_ema is another than that of the snapshot
    (found,) = (with_generator(c, run, "ema") for c in find_in_run(run, "ema"))
    assert open_discriminator(found, MODEL, run, "ema", CPU) is None
    stated = checkpoint.generators(run / "checkpoints" / "step_00000020")["G_ema"]
    assert open_discriminator(replace(found, generator=stated), MODEL, run, "ema", CPU) is not None


class Brightness(torch.nn.Module):
    """A D whose logit is the mean of the pixels, plus 10 for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None, _: None) -> torch.Tensor:
        return self.weight * x.double().mean((1, 2, 3)) + (0 if y is None else 10 * (y == 1))


def test_the_gap_is_that_of_the_means(tmp_path: Path) -> None:
    """Of whole batches of the first images of each set, and with their classes."""
    make_run(tmp_path)
    config = make_config(tmp_path, num_images=100)
    training = read_index(str(tmp_path / "shards"))
    held_out = read_index(str(write_held_out(tmp_path / "held-out", 1000)))
    G = make_sampler(MODEL, generator_of(10).state_dict())
    found = d_gap(Brightness(), G, MODEL, config, training, held_out)
    assert 0 < abs(found["eval/d_gap"]) < 0.01  # noise of the same distribution
    # Labels are 0 to 9: class 1 adds 10 to its share of the images.
    labelled = replace(MODEL, num_classes=10)
    config = replace(config, model=labelled)
    shares = [
        np.mean(index.labels[chosen_ids(index.num_samples, 64)] == 1)
        for index in (training, held_out)
    ]
    weights = Generator(labelled).state_dict()
    G = make_sampler(labelled, weights)
    with_classes = d_gap(Brightness(), G, labelled, config, training, held_out)
    difference = with_classes["eval/d_gap"] - found["eval/d_gap"]
    assert difference == pytest.approx(10 * (shares[0] - shares[1]))

"""Generated images are compared with held-out ones by their distance to the training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from conftest import label_of, pixels_of, write_shard
from evaluating import evaluated, make_config, make_run
from PIL import Image
from scipy.spatial.distance import cdist

from pipeline.data.index_writer import write_index
from pipeline.data.tar_scan import scan
from pipeline.evaluation import memorization
from pipeline.evaluation.candidates import real_images
from pipeline.evaluation.memorization import nearest
from pipeline.evaluation.scorer import Scorer
from pipeline.runs.results import read_rows
from pipeline.runtime.errors import EvaluationError

CPU = torch.device("cpu")
ASKED = "eval.metrics=[memorization]"


def cloud(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(100, 1, (count, 6))).float()


TRAINING, HELD_OUT, OTHERS = cloud(500, 0), cloud(300, 1), cloud(200, 2)


def compared(generated: torch.Tensor) -> dict[str, float]:
    parts = [nearest(x, TRAINING, CPU).distances[:, 0] for x in (generated, HELD_OUT)]
    return memorization.memorization(*parts)


@pytest.mark.parametrize("blocks", [(1024, 8192), (37, 41), (64, 3)])
def test_the_nearest_are_those_of_all_distances(
    blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of any size, of features with a large mean."""
    monkeypatch.setattr(memorization, "ROWS", blocks[0])
    monkeypatch.setattr(memorization, "COLUMNS", blocks[1])
    found, exact = nearest(OTHERS, TRAINING, CPU), cdist(OTHERS.double(), TRAINING.double())
    assert np.array_equal(found.ids, np.argsort(exact, 1)[:, :4])
    np.testing.assert_allclose(found.distances.sqrt(), np.sort(exact)[:, :4], rtol=1e-9)


@pytest.mark.parametrize("copies", [0, 20, 200])
def test_the_statistics_are_those_of_scipy(copies: int) -> None:
    """The Mann-Whitney test of the distances, also of images that are nearly copies."""
    generated = torch.cat([TRAINING[:copies] + 1e-4 * OTHERS[:copies], OTHERS[copies:]])
    found = compared(generated)
    q, p = (cdist(x.double(), TRAINING.double()).min(1) for x in (generated, HELD_OUT))
    theirs = scipy.stats.mannwhitneyu(q, p, use_continuity=False)
    assert found["memorization"] == pytest.approx(1 - theirs.statistic / (200 * 300))
    z = scipy.stats.norm.isf(theirs.pvalue / 2) * np.sign(theirs.statistic - 200 * 300 / 2)
    assert found["memorization_zu"] == pytest.approx(z, rel=1e-6)
    assert found["copies"] == (q < np.sort(p)[3]).mean()


def test_copies_are_flagged_and_held_out_images_are_not() -> None:
    """Also if one image in ten is a copy: that share is then above the expected 1 %."""
    good, bad = compared(OTHERS), compared(TRAINING[:200] + 1e-4)
    assert abs(good["memorization_zu"]) < 3
    assert good["copies"] < 0.03
    assert bad["memorization"] == bad["copies"] == 1
    assert bad["memorization_zu"] < -15
    some = compared(torch.cat([TRAINING[:20], OTHERS[20:]]))
    assert some["copies"] >= 0.1


def test_equal_distances_count_half() -> None:
    """Of two sets of copies neither is nearer."""
    zeros = memorization.memorization(torch.zeros(200), torch.zeros(100))
    assert zeros == {"memorization": 0.5, "memorization_zu": 0, "copies": 0}


def write_held_out(folder: Path, first: int, count: int = 120) -> Path:
    """Write shards of the images with numbers from ``first`` on, as ``write_shards`` draws them."""
    folder.mkdir()
    with write_shard(folder / "shard-000000.tar", "npy") as tar:
        for sample in range(first, first + count):
            tar.add(f"{sample:06d}", pixels_of(sample, (32, 32, 1)), label_of(sample))
    write_index(folder, [scan(folder / "shard-000000.tar")], (32, 32, 1), {"test": True})
    return folder


def test_a_set_of_training_images_is_flagged_and_shown_beside_its_originals(tmp_path: Path) -> None:
    """Images of the distribution of the data are not; the reference file is read again."""
    make_run(tmp_path)
    held_out = write_held_out(tmp_path / "held-out", 1000)
    config = make_config(tmp_path, metrics=["memorization"], held_out=str(held_out))
    values, pictures = [], []
    for _ in range(2):
        scorer = Scorer(config, Accelerator(cpu=True))
        scorer.load_reference()
        for index in (scorer.index, scorer.held_out):
            assert index is not None
            images = real_images(index, config.data, index.num_samples)
            values += scorer.score(images, "test")
            pictures.append(scorer.picture)
        scorer.close()
    copies, others = values[:2]
    assert values == [copies, others] * 2
    assert copies["eval/memorization_tiny-extractor-Tiny_16_100_full"] == 1
    assert copies["eval/copies_tiny-extractor-Tiny_16_100_full"] == 1
    assert others["eval/memorization_tiny-extractor-Tiny_16_100_full"] == pytest.approx(
        0.5, abs=0.1
    )
    assert pictures[0].shape == (320, 160, 1)
    assert np.array_equal(pictures[0][:, :32], pictures[0][:, 32:64])
    assert not np.array_equal(pictures[1][:, :32], pictures[1][:, 32:64])


def test_the_ledger_and_the_run_folder_have_the_score_and_the_picture(tmp_path: Path) -> None:
    """Rows without the metric keep the protocol that they had."""
    run = make_run(tmp_path, (10,))
    held_out = write_held_out(tmp_path / "held-out", 1000)
    evaluated("--run", run, ASKED, f"eval.held_out={held_out}")
    evaluated("--run", run, f"eval.held_out={held_out}")
    evaluated("--run", run)
    first, second = read_rows(run)
    assert first["headline"] == "eval/memorization_tiny-extractor-Tiny_16_100_full"
    assert len(first["scores"]) == 3
    assert first["settings"]["reference"]["held_out"].endswith(":120")
    assert "memorization" not in second["headline"]
    with Image.open(run / "evaluations" / "step_00000010_nearest.png") as picture:
        assert picture.size == (5 * 32, 10 * 32)


def test_without_held_out_images_there_is_one_message(tmp_path: Path) -> None:
    """Neither with the training images in their place, nor with too few."""
    run = make_run(tmp_path)
    with pytest.raises(EvaluationError, match=r"memorization: needs 100 images .* eval.held_out"):
        evaluated("--run", run, ASKED)
    with pytest.raises(EvaluationError, match=r"held_out .* must not be data.shards"):
        evaluated("--run", run, ASKED, f"eval.held_out={tmp_path / 'shards'}")
    few = write_held_out(tmp_path / "few", 1000, 99)
    with pytest.raises(EvaluationError, match=r"needs 100 images .* not 99"):
        evaluated("--run", run, ASKED, f"eval.held_out={few}")

"""Several extractors score the same images in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import TINY, evaluated, make_run

from pipeline.config.loading import load
from pipeline.config.values import Unasked
from pipeline.evaluation import candidates
from pipeline.models.sampling import Images
from pipeline.runs.results import Ledger, read_rows
from pipeline.runtime.errors import ConfigError, EvaluationError

OTHER, CHANGED = "tiny_extractor:OtherTiny", "tiny_extractor:Changed"
BOTH = f"eval.more_extractors=[{OTHER}]"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # linear algebra rounds by their number


def test_each_has_the_row_of_an_evaluation_of_its_own_from_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, and every image is made once."""
    run = make_run(tmp_path, (10,))
    evaluated("--run", run)
    evaluated("--run", run, f"eval.extractor={OTHER}")
    alone = read_rows(run)
    (run / "evaluations.jsonl").unlink()
    drawn: list[tuple[int, int]] = []
    original = candidates.generated_images

    def counted(*arguments: object) -> Images:
        images = original(*arguments)  # type: ignore[arg-type]

        def draw(start: int, stop: int) -> np.ndarray:
            drawn.append((start, stop))
            return images(start, stop)

        return draw

    monkeypatch.setattr(candidates, "generated_images", counted)
    capsys.readouterr()
    evaluated("--run", run, BOTH)
    assert drawn == [(0, 64), (64, 100)]
    together = read_rows(run)
    for name in ("scores", "protocol", "settings", "headline", "generator"):
        assert [row[name] for row in together] == [row[name] for row in alone]
    output = capsys.readouterr().out
    assert output.count("best") == output.count("protocol ") == 2
    evaluated("--run", run, BOTH)
    assert len(drawn) == 2
    assert len(read_rows(run)) == 2


def test_only_the_missing_rows_are_computed(tmp_path: Path) -> None:
    """An evaluation with one more extractor leaves the rows of the first as they are."""
    run = make_run(tmp_path)
    evaluated("--run", run, "--pending")
    before = read_rows(run)
    evaluated("--run", run, "--pending", BOTH)
    after = read_rows(run)
    assert after[:2] == before
    assert [row["step"] for row in after[2:]] == [10, 20]
    assert Ledger(run).rows(after[2]["protocol"]) == after[2:]


def test_a_run_cannot_ask_for_further_modules(tmp_path: Path) -> None:
    """A name in its configuration is refused, as ``eval.extractor`` is."""
    run = make_run(tmp_path, (10,), more_extractors=["evil:Class"])
    (name,) = load(run / "config.yaml", saved=True).eval.more_extractors
    assert isinstance(name, Unasked)
    with pytest.raises(EvaluationError, match="this would execute the module"):
        evaluated("--run", run)
    with pytest.raises(ConfigError, match="must be of different extractors"):
        load(run / "config.yaml", [f"eval.more_extractors=[{TINY},{TINY}]"])

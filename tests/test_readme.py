"""The README, walked by the letter."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import REPO, environment
from PIL import Image

TINY = (
    "train.total_steps=2 train.checkpoint_every=2 train.sample_every=1 train.precision=fp32 "
    "data.batch_size=8 data.workers=0 model.ngf=4 model.ndf=4"
)
"""Words that make a training cheap."""


def test_the_readme_fits_on_a_screen() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 110


@pytest.mark.slow
def test_the_way_from_photos_to_a_report(tmp_path: Path) -> None:
    """Each command of "Your own photos" in turn, with small networks, from an empty folder."""
    section = (REPO / "README.md").read_text().partition("## Your own photos\n")[2]
    text = "".join(re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL))
    plan = []
    for line in text.replace("num_images=1000", "num_images=24").splitlines():
        program, command, *words = shlex.split(line, comments=True)
        assert program == "dcgan"
        more = TINY.split() if command == "train" else []
        plan.append([f"pipeline.{command}", *words, *more])
    commands = [words[0].partition(".")[2] for words in plan]
    assert commands == ["prepare", "train", "train", "evaluate", "generate", "train", "report"]
    (tmp_path / "photos").mkdir()
    for k in range(24):
        pixels = np.random.default_rng(k).integers(0, 256, (80, 100, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"IMG_{k}.JPG")
    settings = {"HOME": str(tmp_path), "PYTHONPATH": str(REPO), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, REPO / "tests" / "page_walk.py"],
        input=json.dumps(plan),
        cwd=tmp_path,
        env=environment() | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    for words, (code, output) in zip(plan, ended, strict=True):
        assert code == 0, f"{shlex.join(words)}\n{output}"
        assert "Traceback" not in output
    said = [output for _, output in ended]
    assert "24 samples in 1 shards, 64x64x3 npy: data/photos-64" in said[0]
    assert "nothing was written; the same command without --dry-run trains" in said[1]
    assert "finished at step 2" in said[2]
    assert (tmp_path / "runs/photos_64/evaluations.jsonl").read_text().count("\n") == 1
    for name in ("data/photos-64/preview.png", "grid.png", "runs/photos_64/samples/reals.png"):
        assert (tmp_path / name).is_file(), name
    page = (tmp_path / "report.html").read_text()
    assert "photos_64" in page
    assert "slow" in page

"""The README, walked by the letter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import REPO, TIMEOUT, environment
from PIL import Image

SMALL = """
dcgan() {
  [ "$1" != train ] || set -- "$@" $TINY
  "$PYTHON" -m pipeline.cli "$@"
}
set -e
"""
TINY = (
    "train.total_steps=2 train.checkpoint_every=2 train.sample_every=1 tracking.wandb=disabled "
    "data.batch_size=8 data.workers=1 model.ngf=4 model.ndf=4"
)


def test_the_readme_fits_on_a_screen() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 110


@pytest.mark.slow
def test_the_way_from_photos_to_a_report(tmp_path: Path) -> None:
    """Each command of "Your own photos" in turn, with small networks, from an empty folder."""
    section = (
        (REPO / "README.md").read_text().partition("## Your own photos\n")[2].partition("## ")[0]
    )
    lines = "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    assert len(lines.splitlines()) == 7
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for k in range(24):
        pixels = rng.integers(0, 256, (80, 100, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"IMG_{k}.JPG")
    settings = {"HOME": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": str(REPO)}
    settings["TINY"] = TINY
    done = subprocess.run(
        ["bash", "-c", SMALL + lines.replace("num_images=1000", "num_images=24")],
        cwd=tmp_path,
        env=environment() | settings,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert "24 samples in 1 shards, 64x64x3 npy: data/photos-64" in said
    assert "nothing was written; the same command without --dry-run trains" in said
    assert "finished at step 2" in said
    assert (tmp_path / "runs/photos_64/evaluations.jsonl").read_text().count("\n") == 1
    for name in ("data/photos-64/preview.png", "grid.png", "runs/photos_64/samples/reals.png"):
        assert (tmp_path / name).is_file(), name
    page = (tmp_path / "report.html").read_text()
    assert "photos_64" in page
    assert "slow" in page

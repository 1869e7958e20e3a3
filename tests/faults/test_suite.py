"""A seeded sample of every harm of the suite; `make faults-long` runs all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("mutations", "hostile", "fuzz", "server", "starvation", "kills", "rivals")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("part", PARTS)
def test_every_harm_is_detected_or_harmless(part: str) -> None:
    """Nothing silent, no traceback, no hang, no secret; the output says how to reproduce a case."""
    words = [sys.executable, str(Path(__file__).parent), "--part", part]
    suite = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    print(suite.stdout.splitlines()[-1:])
    assert suite.returncode == 0, suite.stdout + suite.stderr

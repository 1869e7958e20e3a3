"""The cache of compiled networks: kept after a clean end, dropped after a kill or damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path
from pipeline.runtime import compile_cache
line = compile_cache.use(Path(sys.argv[1]), "node")
cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
print(sorted(p.name for p in cache.rglob("*.so")), line, flush=True)
(cache / sys.argv[2]).write_text("code")
exec(sys.argv[3])
"""


def process(base: Path, name: str, then: str = "") -> str:
    """What a process finds in the cache before it writes the file ``name`` and does ``then``."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base / "run"), name, then],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(base / "cache")},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


@pytest.mark.parametrize(
    "then", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "raise ImportError"]
)
def test_what_an_unclean_end_leaves_is_not_used(then: str, tmp_path: Path) -> None:
    assert process(tmp_path, "a.so") == "[]"
    assert process(tmp_path, "b.so", then) == "['a.so']"
    assert process(tmp_path, "c.so", "sys.exit(2)") == "[]"
    assert process(tmp_path, "d.so") == "['c.so']"


def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    process(tmp_path, "a.so")
    (file,) = (tmp_path / "cache").rglob("a.so")
    file.write_text("")
    assert process(tmp_path, "b.so") == "[]"


def test_a_process_beside_does_not_take_the_cache_away(tmp_path: Path) -> None:
    """The last of them signs it, if no other was killed."""
    process(tmp_path, "a.so")
    beside = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "b.so", "sys.stdin.read()"],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert beside.stdout is not None
    assert beside.stdout.readline().strip() == b"['a.so']"
    found = process(tmp_path, "c.so")
    assert found in ("['a.so']", "['a.so', 'b.so']")
    beside.send_signal(signal.SIGKILL)
    beside.communicate()
    assert process(tmp_path, "d.so") == "[]"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert "cannot be written; compiled networks are cached in" in process(tmp_path, "a.so")

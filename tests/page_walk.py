"""Run commands one after the other, each in a fork of this process, which imports torch once.

    python tests/page_walk.py < commands.json > results.json

A command is a list of words: a module and its arguments, or ["-c", code]. ``~`` and ``*`` are
expanded. This process never computes with torch: a fork of a process with threads may hang.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

WARM = (
    *("pipeline.training.run", "pipeline.training.gan", "pipeline.training.rehearsal"),
    *("pipeline.evaluation.run_scores", "pipeline.evaluation.scorer", "pipeline.reports.page"),
    *("pipeline.generation.image_sets", "pipeline.generation.figures", "pipeline.data.packing"),
)


def run(words: list[str]) -> tuple[int, str]:
    """Return the exit code of a command, and what it printed."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            become(words, output.fileno())
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def expanded(word: str) -> list[str]:
    """Return a word as a shell would expand it."""
    found = sorted(map(str, Path().glob(word))) if "*" in word else []
    return found or [str(Path(word).expanduser()) if word.startswith("~") else word]


def become(words: list[str], output: int) -> None:
    """Run a command in this new process, and end it."""
    code: object = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if words[0] == "-c":
            exec(compile(words[1], "page", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [name for word in words for name in expanded(word)]
            runpy.run_module(words[0], run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    for name in WARM:
        importlib.import_module(name)
    json.dump([run(words) for words in json.load(sys.stdin)], sys.stdout)

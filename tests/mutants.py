"""Mutation testing: do the tests notice when a line of these modules is changed?

    make mutants                        all modules of MODULES
    make mutants MODULES="data/order"   one

mutmut changes one operator, constant or argument at a time and runs the tests that call the changed
function. It works in a copy below build/mutants/, which also shows the survivors:
`cd build/mutants/data/order && mutmut browse`. The tests are those that run in one process and in
seconds; a test that starts a command would take minutes for each mutant.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MODULES = {
    "data/order": "tests/data/test_order.py",
    "data/reader": "tests/data/test_reader.py",
    "runs/checkpoint": "tests/runs/test_checkpoint.py",
    "runs/identity": "tests/runs/test_run_folder.py",
    "runs/results": "tests/runs/test_results.py",
    "runs/run_folder": "tests/runs/test_run_folder.py",
    "runtime/signals": "tests/runtime/test_signals.py",
    "training/finite_guard": "tests/training/test_finite_guard.py",
}
"""The modules that hold the promises, and the tests that run for each of their mutants."""
SETTINGS = """
[tool.mutmut]
source_paths = ["pipeline"]
only_mutate = ["pipeline/{module}.py"]
also_copy = ["configs"]
pytest_add_cli_args = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
"""


def copy(module: str, folder: Path) -> None:
    """Make a tree in ``folder`` in which mutmut mutates this module alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("pipeline", "tests", "configs"):
        shutil.copytree(REPO / name, folder / name)
    settings = SETTINGS.format(module=module, tests=json.dumps(MODULES[module].split()))
    (folder / "pyproject.toml").write_text((REPO / "pyproject.toml").read_text() + settings)
    # mutmut leaves decorated functions alone: decorate at the end of the module instead.
    path = folder / "pipeline" / f"{module}.py"
    decorated = r"^@contextmanager\ndef (\w+)"
    text = path.read_text()
    names = re.findall(decorated, text, re.MULTILINE)
    text = re.sub(decorated, r"def \1", text, flags=re.MULTILINE)
    path.write_text(text + "".join(f"\n{name} = contextmanager({name})\n" for name in names))


def run(module: str) -> str:
    """Mutate a module, print its survivors, and return a line with its score."""
    folder = REPO / "build" / "mutants" / module
    copy(module, folder)
    mutants = folder / "mutants"
    mutants.mkdir()  # before Python starts: it remembers what is missing from its search path
    env = os.environ | {"PYTHONPATH": str(mutants), "OMP_NUM_THREADS": "1", "CI": "1"}

    def mutmut(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "mutmut", *words], cwd=folder, env=env, check=True)

    mutmut("run")
    mutmut("results")
    mutmut("export-cicd-stats")
    stats = json.loads((mutants / "mutmut-cicd-stats.json").read_text())
    killed = stats["killed"] + stats["timeout"] + stats["segfault"]
    total = stats["total"] - stats["skipped"]
    return f"{module}: {killed} of {total} mutants killed, {killed / total:.0%}"


if __name__ == "__main__":
    print("\n".join([run(module) for module in sys.argv[1:] or MODULES]))

"""Distributed DCGAN training: images to shards, shards to checkpoints, checkpoints to scores."""

import os
import sys
from pathlib import Path


def _leave_working_folder() -> None:
    """Take the working folder off the search path of modules, unless this package lies in it.

    ``python -m`` puts it first, so that a json.py beside a downloaded run would be executed.
    """
    here = Path.cwd() if sys.argv[:1] == ["-m"] else None  # as it is while Python finds the module
    if here and sys.path[:1] == [str(here)] and not here.samefile(Path(__file__).parents[1]):
        del sys.path[0]


_leave_working_folder()


def require_own_package(script: str) -> None:
    """Exit with code 2 if ``script`` belongs to another checkout; else prepare the process for it.

    ``python B/pipeline/train.py`` searches ``B/pipeline`` for imports, not ``B``. Where checkout A
    is installed (``pip install -e A``), the script of B would run with the modules of A.
    """
    path, imported = Path(script).resolve(), Path(__file__).resolve().parent
    if imported in path.parents:
        from pipeline.runtime import startup

        return startup.prepare()
    own = next((p.parent for p in path.parents if p.name == "pipeline"), path.parent)
    same_script = imported.parent / path.relative_to(own)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"error: {path}: Python imports the package pipeline from {imported.parent}, not from "
            f"{own}. Install this one with `pip install -e {own}`, or set PYTHONPATH={own}, or run "
            f"{same_script}.",
            file=sys.stderr,
        )
    sys.exit(2)

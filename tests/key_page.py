"""Write docs/configuration.md from the dataclasses of the configuration: ``make keys``."""

from __future__ import annotations

from launching import REPO

from pipeline.config.keys import to_markdown

PAGE = REPO / "docs" / "configuration.md"
INTRODUCTION = """\
# Which options are there?

<!-- written by make keys -->

Every key of a configuration. Write `section.key=value` on the command line, or in a YAML file. In
a terminal, `python -m pipeline.train --keys WORD` prints the keys that have WORD in their name.
[options.md](options.md) says when to set which.

*On resume*: what may change when a run is started again in its folder. `fixed` keys decide what is
computed, so a change needs a new run. `with run.accept_changes`: the run takes the change on and
notes it in its checkpoints.
"""


def page() -> str:
    """Return the page of today."""
    return INTRODUCTION + to_markdown()


if __name__ == "__main__":
    PAGE.write_text(page())

"""Write docs/configuration.md from the dataclasses of the configuration: ``make keys``."""

from __future__ import annotations

from launching import REPO

from pipeline.config.keys import all_keys

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
    lines: list[str] = []
    section = ""
    for key in all_keys():
        if (here := key.name.partition(".")[0]) != section:
            section = here
            lines += ["", f"## {section}", ""]
            lines += ["| key | value | default | on resume | meaning | set in |"]
            lines += ["| --- | --- | --- | --- | --- | --- |"]
        files = "; ".join(f"`{value}` in {names}" for value, names in key.by_value().items())
        cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.on_resume, key.text, files)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([INTRODUCTION.rstrip("\n"), *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page())

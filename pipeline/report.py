"""Compare runs in one page for a browser, which needs no account and no network.

    python -m pipeline.report runs/* --out report.html
    python -m pipeline.report runs/* --out report.html --png curves.png     # and a picture

The page has a table of the runs with the settings in which they differ, best and last scores by
protocol, curves over steps, images or hours, sample grids side by side, and what happened to each
run. Runs that are still training are reported as far as they are. A folder that is not a run's, or
is damaged, is left out with a message. Exit code 2: none could be read.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
from collections import Counter
from pathlib import Path

from pipeline.runtime.arguments import HelpFormatter, adder, file_ending_in
from pipeline.runtime.console import printable, say
from pipeline.runtime.errors import UserError, exit_on_user_error
from pipeline.runtime.files import check_output_path, write_atomic


def report(folders: list[Path], out: Path, png: Path | None = None) -> None:
    """Write the page of some runs.

    Args:
        folders: of the runs; one given twice counts once.
        out: the page.
        png: also a picture of its curves.

    Raises:
        UserError: no folder could be read, a library is missing, or a file cannot be written.
    """
    from pipeline.reports import charts, page, still
    from pipeline.reports.run_facts import read_run

    charts.require_bokeh()
    out = check_output_path(out, replace=True)
    if png is not None:
        png = check_output_path(png, replace=True)
    folders = list({path.resolve(): path for path in folders}.values())
    names = Counter(path.resolve().name for path in folders)
    runs, left_out = [], []
    for path in folders:
        name = path.resolve().name
        try:
            runs.append(read_run(path, printable(name if names[name] == 1 else str(path))))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError("\n".join(left_out))
    for reason in left_out:
        say(f"left out: {reason}")
    content = page.render(runs, left_out).encode("utf-8", "backslashreplace")
    write_atomic(out, content)
    say(f"{out}: {len(runs)} run(s), {len(content) / 1e6:.1f} MB; open it in a browser")
    if png is not None:
        write_atomic(png, still.render(runs))
        say(f"{png}: the curves")


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description=__doc__, formatter_class=HelpFormatter
    )
    add = adder(parser)
    add("runs RUN", "report the runs in these folders, e.g. runs/*", nargs="+", type=Path)
    out = "write the page into this file, in place of one that exists"
    add("--out FILE", out, type=file_ending_in(".html"), default=Path("report.html"))
    add("--png FILE", "also write the curves as a picture", type=file_ending_in(".png"))
    options = parser.parse_args()
    with exit_on_user_error():
        report(options.runs, options.out, options.png)


if __name__ == "__main__":
    main()

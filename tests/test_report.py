"""pipeline.report: one page on several runs, from the files that real trainings left."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import REPO, environment, train
from PIL import Image

from pipeline.report import report
from pipeline.reports.page import ordered
from pipeline.runs.alarms import Alarm, record
from pipeline.runs.results import Ledger
from pipeline.runtime.documents import append_rows
from pipeline.runtime.errors import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=document.title='pwned'>"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, training_settings: list[str]
) -> Path:
    """A folder with two runs: `slow` was resumed with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*training_settings, "train.log_every=2", "train.sample_every=6"]
    for name, *own in (
        ("slow", "train.total_steps=12", "optim.g_lr=2e-3"),
        ("slow", "train.total_steps=24", "run.accept_changes=true"),
        ("fast", "optim.g_lr=4e-3"),
    ):
        train(1, tiny_config, *options, f"run.dir={folder / name}", *own)
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of both, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def score(run: Path, step: int, fid: float, **more: object) -> None:
    """Record a score as evaluate does."""
    ledger = Ledger(run)
    row = {"step": step, "weights": "ema", "protocol": "5f0cabcd", "headline": "eval/fid_50k_full"}
    ledger.append(row | {"scores": {"eval/fid_50k_full": fid}, "generator": f"g{step}"} | more)
    ledger.close()


def page_of(*folders: Path) -> str:
    out = folders[0].parent / "report.html"
    report(list(folders), out)
    return out.read_text()


class Cells(html.parser.HTMLParser):
    """Collects table rows as lists of texts, and what the attributes of a page refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("th", "td")
        if self._open:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


def data_of(page: str) -> Any:
    found = re.search(r'id="page-data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_table_has_differing_settings_only(trained: Path) -> None:
    """Runs, states, steps and hardware; of the configuration, the one key that differs."""
    cells = Cells(page_of(trained / "slow", trained / "fast"))
    head, slow, fast = cells.rows[:3]
    assert head == ["run", "state", "step", "images/s", "hardware", "optim.g_lr"]
    assert [slow[:3], slow[4:]] == [["slow", "finished", "24 of 24"], ["1 x CPU", "0.001"]]
    assert [fast[0], fast[5]] == ["fast", "0.004"]
    assert float(slow[3]) > 0


def test_of_one_run_the_table_has_the_settings_other_than_the_default(trained: Path) -> None:
    """optim.g_lr, but not optim.beta1: a row for each, since a row of all would be too wide."""
    rows = Cells(page_of(trained / "fast")).rows
    assert rows[0] == ["run", "state", "step", "images/s", "hardware"]
    settings = dict(row for row in rows if len(row) == 2)
    assert settings["optim.g_lr"] == "0.004"
    assert "optim.beta1" not in settings


def test_a_run_that_train_watch_ended_says_so(runs: Path) -> None:
    """State and alarm in the first table; the line of the log among the events."""
    alarm = Alarm(20, 10, "watch/diversity", 0.01, "stop")
    record(runs / "fast", alarm)
    (runs / "fast/FINISHED").rename(runs / "fast/COLLAPSED")
    with (runs / "fast/log.txt").open("a") as log:
        log.write(f"2026-11-30 12:00:00  {alarm.text}\n")
    rows = Cells(page_of(runs / "fast")).rows
    assert rows[1][1] == "collapsed; G makes almost one image (step 20, stopped)"
    assert rows[-1] == ["fast", "2026-11-30 12:00:00", alarm.text]


def test_curves_grids_and_events(trained: Path) -> None:
    """Each logged value is a curve over steps and hours; grids, resume and change are there."""
    page = page_of(trained / "slow", trained / "fast")
    data = data_of(page)
    rows = [json.loads(line) for line in (trained / "slow/metrics.jsonl").read_text().splitlines()]
    axis, values = data["runs"][0]["curves"]["loss/G"]
    steps, hours = data["runs"][0]["axes"][axis]
    assert steps == [row["step"] for row in rows]
    assert values == pytest.approx([row["loss/G"] for row in rows], rel=1e-3)
    assert hours == pytest.approx([(row["time"] - rows[0]["time"]) / 3600 for row in rows], rel=0.1)
    assert data["runs"][0]["images_per_step"] == 32
    assert data["steps"] == [0, 6, 12, 18, 24] == [int(step) for step in data["grids"][1]]
    events = [row[2] for row in Cells(page).rows if row[0] == "slow" and len(row) == 3]
    assert any(re.fullmatch(r"resuming run \S+ in .* at step 12 of 24", e) for e in events)
    assert any(e.endswith("changed from step 12 on:\n  optim.g_lr: 0.002 -> 0.001") for e in events)
    assert events[-1] == "finished at step 24"


def test_best_and_last_scores_by_protocol(runs: Path) -> None:
    """Protocols have tables of their own, best run first; a superseded row is not in them."""
    for step, fid in ((6, 40.0), (12, 30.5), (18, 35.25)):
        score(runs / "slow", step, fid)
    score(runs / "slow", 24, 1.5, superseded=True)
    score(runs / "fast", 18, 20.0)
    score(runs / "fast", 24, 99.0, protocol="77770000")
    page = page_of(runs / "slow", runs / "fast")
    rows = Cells(page).rows
    head = ["run", "best eval/fid_50k_full", "at step", "last", "at step", "weights"]
    first = rows.index(head)
    assert rows[first + 1 : first + 3] == [
        ["fast", "20", "18", "20", "18", "ema"],
        ["slow", "30.5", "12", "35.25", "18", "ema"],
    ]
    assert rows[rows.index(head, first + 1) + 1] == ["fast", "99", "24", "99", "24", "ema"]
    assert "Scores of protocol 77770000" in page
    assert data_of(page)["runs"][0]["curves"]["eval/fid_50k_full [5f0cabcd]"][1] == [
        40,
        30.5,
        35.25,
    ]


def test_a_run_that_is_being_written(runs: Path) -> None:
    """A line cut short is left out, a run without rows and grids has no curves."""
    new = runs / "new"
    new.mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(runs / "slow" / name, new)
    (runs / "fast/FINISHED").unlink()
    with (runs / "fast/metrics.jsonl").open("rb+") as file:
        file.truncate(file.seek(0, 2) - 20)
    rows = Cells(page_of(runs / "fast", new)).rows
    assert [rows[1][0], rows[1][2]] == ["fast", "22 of 24"]
    assert re.fullmatch(r"unfinished; last row \d{4}-\d\d-\d\d \d\d:\d\d", rows[1][1])
    assert rows[2][:3] == ["new", "unfinished; last row none", "0 of 24"]
    assert "No metrics yet." in page_of(new)


def test_folders_of_others_are_left_out_with_a_message(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has one line, also in the page; the command fails if no run is left."""
    (runs / "photos").mkdir()
    with (runs / "slow/config.yaml").open("a") as file:
        file.write("nonsense: [\n")
    page = page_of(runs / "photos", runs / "slow", runs / "fast", runs / "none")
    said = capsys.readouterr().err
    for name in ("photos", "none"):
        assert f"left out: RUN ({runs / name}): is not the folder of a run" in said
        assert f"Left out: RUN ({runs / name}): is not the folder of a run" in page
    assert f"left out: RUN ({runs / 'slow'}): its configuration cannot be used: " in said
    with pytest.raises(UserError, match=r"photos\): is not the folder of a run"):
        page_of(runs / "photos")


def test_damaged_files_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and pictures that are damaged are left out; so is a run with a FIFO."""
    with (runs / "slow/metrics.jsonl").open("a") as file:
        file.write('{"step": true}\n[1]\n{"step": 26, "loss/G": NaN, "check": "0"}\n')
    (runs / "slow/samples/step_0000024.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    (runs / "slow/run.json").write_text("{")
    (runs / "fast/log.txt").unlink()
    os.mkfifo(runs / "fast/log.txt")
    page = page_of(runs / "slow", runs / "fast")
    assert Cells(page).rows[1][2] == "24 of 24"
    assert list(data_of(page)["grids"][0]) == ["0", "6", "12", "18"]
    assert f"left out: {runs / 'fast/log.txt'}: is no regular file" in capsys.readouterr().err


def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    """Exit code 2 and no traceback, for a folder that is not there and without Bokeh."""

    def command(*words: object, **env: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.report", *map(str, words)],
            cwd=REPO,
            env=environment() | {"PYTHONPATH": str(REPO)} | env,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    code, said = command(tmp_path / "none", "--out", tmp_path / "r.html")
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith(f"error: RUN ({tmp_path / 'none'}): is not the folder of a run")
    (tmp_path / "bokeh.py").write_text("raise ImportError\n")
    code, said = command(tmp_path, "--out", tmp_path / "r.html", PYTHONPATH=f"{tmp_path}:{REPO}")
    assert (code, said.count("\n")) == (2, 1), said
    assert "pip install 'dcgan-pipeline[report]'" in said


def test_twenty_long_runs_fit_into_five_megabytes(trained: Path, tmp_path: Path) -> None:
    """3,000 rows each and grids of pure noise, 1024 pixels wide, which JPEG cannot shrink."""
    rng = np.random.default_rng(0)
    last = json.loads((trained / "slow/metrics.jsonl").read_text().splitlines()[-1])
    folders = [Path(shutil.copytree(trained / "slow", tmp_path / f"{n:02}")) for n in range(20)]
    noise = Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png", compress_level=1)
    for folder in folders:
        with (folder / "metrics.jsonl").open("ab", buffering=0) as file:
            numbers = [key for key, value in last.items() if isinstance(value, float)]
            values = last["time"] + rng.random((3000, len(numbers)))
            append_rows(
                file,
                (
                    {"step": 25 + n} | dict(zip(numbers, map(float, row), strict=True))
                    for n, row in enumerate(values)
                ),
            )
        for step in range(1000, 1008):
            (folder / "samples" / f"step_{step:07d}.png").symlink_to(tmp_path / "noise.png")
    page = page_of(*folders)
    assert len(page) <= 5_000_000
    data = data_of(page)
    assert all("1007" in grids for grids in data["grids"])
    axis, values = data["runs"][0]["curves"]["loss/G"]
    assert data["runs"][0]["axes"][axis][0][-1] == 3024
    assert len(values) > 200


@pytest.fixture
def hostile(runs: Path) -> Path:
    """A run in whose name, log and metrics there is a script."""
    run = runs / "slow"
    with (run / "log.txt").open("a") as log:
        log.write(f"2026-01-01 00:00:00  {EVIL}\n")
    with (run / "metrics.jsonl").open("ab", buffering=0) as file:
        append_rows(file, [{"step": 25, EVIL: 1.0, "time": 1e300, "loss/G": float("1e308")}])
    return run.rename(runs / "<script>document.title='pwned'<!--")


def test_texts_of_a_run_are_escaped(hostile: Path) -> None:
    """The page loads nothing, and has its own scripts only."""
    page = page_of(hostile)
    plain = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "document.title" in plain
    assert "<script>document.title" not in page
    assert "<img src=x" not in page
    assert not [link for link in Cells(plain).links if link and not link.startswith("data:")]


def test_a_standard_deviation_is_no_first_curve() -> None:
    """The panels begin with the distances; kid_std and the like can be chosen."""
    keys = ["eval/kid_5k_full [a]", "eval/kid_std_5k_full [a]", "loss/G"]
    assert ordered(keys) == [keys[0], "loss/G", keys[1]]


PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const model = id => Bokeh.documents[0].get_model_by_id(id);
  const [source, line] = page.panels[0].runs[0].map(model), image = document.querySelector("img");
  const found = {title: document.title, shown: line.visible, last: image.src.length};
  found.panels = document.querySelectorAll(".bk-Figure").length;
  axis.value = "images"; axis.dispatchEvent(new Event("change"));
  found.x = [...source.data.x];
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  found.first = document.querySelector("figcaption span").textContent;
  document.querySelector(".legend button").click();
  found.hidden = [!line.visible, document.querySelector("figure").checkVisibility()];
  const buttons = document.querySelectorAll(".legend button");
  const double = r => buttons[r].dispatchEvent(new Event("dblclick"));
  double(1); found.all = [...shown]; double(0); found.alone = [...shown];
  found.loaded = performance.getEntriesByType("resource").map(e => e.name)
    .filter(n => !n.startsWith("data:"));
  const pre = document.createElement("pre");
  pre.id = "found"; pre.textContent = JSON.stringify(found); document.body.append(pre);
}, 1500));
</script>
"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """A function that opens a page in Chromium and returns what it prints."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (Debian's package chromium)")

    def open_page(path: Path, *options: str) -> str:
        # No sandbox: it cannot start in a container or as root. The page is the test's own.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
        done = subprocess.run(
            [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *options, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return open_page


@pytest.mark.slow
def test_in_a_browser(hostile: Path, browse: Callable[..., str]) -> None:
    """Curves are drawn, axis, slider and legend work, nothing is loaded, no text is run."""
    page = hostile.parent / "report.html"
    report([hostile, hostile.parent / "fast"], page)
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    shown = re.search(r'<pre id="found">(.*?)</pre>', browse(page, "--dump-dom"), re.S)
    assert shown is not None
    found = json.loads(html.unescape(shown[1]))
    assert found["title"] == "2 runs"
    assert found["panels"] == 6
    assert found["shown"]
    assert found["x"][:2] == [64, 128]
    assert found["first"] == "step 0"
    assert found["hidden"] == [True, False]
    assert found["all"] == [True, True]
    assert found["alone"] == [True, False]
    assert found["last"] > 1000
    assert found["loaded"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "brightness"), [("0", (0, 60)), ("1", (250, 255))])
def test_the_page_follows_the_theme(
    theme: str,
    brightness: tuple[int, int],
    trained: Path,
    tmp_path: Path,
    browse: Callable[..., str],
) -> None:
    """Dark or light as the browser asks; curves in their colours are on it."""
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    report([trained / "slow", trained / "fast"], page)
    options = (f"--blink-settings=preferredColorScheme={theme}", "--window-size=1200,1400")
    browse(page, *options, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert brightness[0] <= pixels[2, 2].mean() <= brightness[1]
    blue = np.abs(pixels - np.array([0x1F, 0x77, 0xB4])).sum(axis=2) < 12
    assert blue.sum() > 1000


def test_the_curves_are_also_a_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the runs are called; the same runs give the same picture."""
    score(runs / "fast", 24, 3.0)
    (runs / "slow").rename(runs / "_$x^2$ \u5341")
    folders = sorted(runs.iterdir())
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    for png in (first, again):
        report(folders, tmp_path / "report.html", png)
    assert f"{again}: the curves" in capsys.readouterr().err
    assert first.read_bytes() == again.read_bytes()
    with Image.open(first) as picture:
        width, height = picture.size
    assert width == 1440
    assert height > 600


def test_a_picture_of_runs_without_rows_is_empty(runs: Path, tmp_path: Path) -> None:
    (runs / "fast" / "metrics.jsonl").unlink()
    report([runs / "fast"], tmp_path / "report.html", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 1440

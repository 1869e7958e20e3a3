"""The commands and the code of the pages for beginners run, on few images and steps."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from launching import REPO, environment
from PIL import Image

from pipeline.runtime.help_links import PAGE, SECTIONS, link_of

pytestmark = pytest.mark.slow
Walk = list[tuple[str, int, str]]
SMALL = {
    "train": "data.batch_size=8 data.workers=0 model.ngf=4 model.ndf=4 train.precision=fp32",
    "evaluate": "",
}
"""Words that make a command of the pages cheap."""
STEPS = {"photos": 2, "wandb": 3}
"""Last step of a training: on the second page the run of the first goes on."""
PHOTOS = 40


def blocks(page: str, kind: str) -> list[str]:
    text = (REPO / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def lines(page: str) -> list[list[str]]:
    """The words of each command line of a page."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def small(page: str, words: list[str]) -> list[str]:
    """The command as page_walk.py takes it, with fewer steps and images."""
    assert words[:2] == ["python", "-m"], words
    command = words[2].rpartition(".")[2]
    more = SMALL.get(command, "").split()
    if command == "train":
        more.append(f"train.total_steps={STEPS[page]}")
    kept = ["eval.num_images=32" if w.startswith("eval.num_images=") else w for w in words[2:]]
    return [*kept, *more]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Walk]]:
    """(the working folder, what each command of each page ended with), in the order of reading."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "home" / "photos").mkdir(parents=True)
    for k in range(PHOTOS):
        pixels = np.random.default_rng(k).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "home" / "photos" / f"{k}.jpg")
    (folder / "configs").mkdir()
    for path in REPO.glob("configs/*.yaml"):
        shutil.copy(path, folder / "configs")
    wandb = "import json\nfrom wandb.cli.cli import cli\nprint(json.dumps(list(cli.commands)))"
    code = "".join(blocks("api", "python")).replace("step_00020000", f"step_{STEPS['photos']:08d}")
    plan = [("photos", small("photos", words)) for words in lines("photos")]
    plan += [("api", small("api", words)) for words in lines("api")]
    plan += [("api", ["-c", code])]
    ours = [words for words in lines("wandb") if words[0] == "python"]
    plan += [("wandb", small("wandb", words)) for words in ours]
    plan += [("wandb", ["-c", wandb])]
    done = subprocess.run(
        [sys.executable, REPO / "tests" / "page_walk.py"],
        input=json.dumps([words for _, words in plan]),
        cwd=folder,
        env=environment()
        | {"PYTHONPATH": str(REPO), "HOME": str(folder / "home"), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Walk] = {"photos": [], "api": [], "wandb": []}
    for (page, words), (code_of, output) in zip(plan, json.loads(done.stdout), strict=True):
        found[page].append((shlex.join(words), code_of, output))
    return folder, found


@pytest.mark.parametrize("page", ["photos", "api", "wandb"])
def test_every_command_of_a_page_runs(page: str, walk: tuple[Path, dict[str, Walk]]) -> None:
    """Each ends with exit code 0, in the order of the page."""
    folder, found = walk
    assert found[page], "the page has no commands"
    for words, code, output in found[page]:
        assert code == 0, f"{words}\n{output}"
    made = {
        "photos": ["data/photos-64/preview.png", "runs/photos_64/samples/reals.png", "grid.png",
                   "walk.gif", "pictures", "runs/photos_64/evaluations.jsonl", "report.html"],
        "api": ["images.png"],
        "wandb": ["runs/photos_64/wandb"],
    }  # fmt: skip
    for name in made[page]:
        assert (folder / name).exists(), name


def test_the_commands_of_wandb_exist(walk: tuple[Path, dict[str, Walk]]) -> None:
    """Those that need a terminal or an account are commands of the installed wandb."""
    folder, found = walk
    known = json.loads(found["wandb"][-1][2].splitlines()[-1])
    named = {words[1] for words in lines("wandb") if words[0] == "wandb"}
    assert {"login", "leet", "sync", "sweep", "agent"} == named
    assert named <= set(known)
    assert list(folder.glob("runs/*/wandb/offline-run-*"))


def test_leet_shows_an_offline_run(walk: tuple[Path, dict[str, Walk]]) -> None:
    """The dashboard of the page, in a terminal: the run that was just trained; q leaves it."""
    folder, _ = walk
    [words] = [words for words in lines("wandb") if words[:2] == ["wandb", "leet"]]
    [run] = folder.glob(f"{words[2]}/offline-run-*")
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (34, 160))
    program = [sys.executable, "-m", "wandb", *words[1:]]
    settings = {"HOME": str(folder / "home"), "TERM": "xterm-256color"}
    shown, deadline = b"", time.monotonic() + 120
    with subprocess.Popen(
        program, cwd=folder, env=environment() | settings, stdin=side, stdout=side
    ) as process:
        os.close(side)
        while select.select([terminal], [], [], 120.0)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # its other side is closed
                break
            if run.name[:24].encode() in shown or time.monotonic() > deadline:
                os.write(terminal, b"q")
        os.close(terminal)
    assert process.returncode == 0, shown.decode(errors="replace")
    assert run.name[:24].encode() in shown


def test_links_of_messages_lead_to_sections() -> None:
    """Every anchor is a heading of the page, and its first words in quotes find the section."""
    text = (REPO / PAGE).read_text()
    sections = dict(re.findall(r"^### (.*?)\n\n(.*?)(?=\n\n)", text, re.M | re.S))
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): body
        for title, body in sections.items()
    }
    assert not SECTIONS.keys() - anchors.keys()


@pytest.mark.parametrize(
    ("message", "anchor"),
    [
        ("out of memory: CUDA out of memory. Lower it.", "out-of-memory"),
        ("run.dir (runs/a): in use by process 7 on n1; wait", "the-run-folder-is-in-use"),
        ("loss/D became NaN or infinite at step 7 on rank 0; no", "a-loss-became-nan"),
        ("/data/x: No space left on device: Make room.", "no-space-left"),
        ("data.shards (x): no such folder. Make it", "no-shards-there"),
        ("optim.g_lr (x): must be a number", ""),
    ],
)
def test_a_message_has_the_link_to_its_section(message: str, anchor: str) -> None:
    """One link, or none where the message says it all."""
    assert link_of(message) == (f" ({PAGE}#{anchor})" if anchor else "")

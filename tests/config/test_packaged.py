"""The configurations that the package carries, in a checkout and in a wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import pixels_of
from launching import REPO, TIMEOUT, environment
from PIL import Image

from pipeline.config import loading
from pipeline.config.loading import load
from pipeline.runtime.errors import ConfigError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder outside the checkout, in a process that has said nothing yet."""
    monkeypatch.chdir(tmp_path)
    loading._say_once.cache_clear()
    return tmp_path


@pytest.mark.parametrize("name", ["demo.yaml", "configs/demo.yaml"])
def test_a_carried_configuration_is_found_from_any_folder(
    name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its relative paths count from the current folder; one line says which file is used."""
    config = load(name)
    assert config.data.shards == str(elsewhere / "data" / "fashion-mnist-32")
    assert config.run.dir == str(elsewhere / "runs" / "demo")
    used = REPO / "configs" / "demo.yaml"
    assert capsys.readouterr().err == (
        f"--config {name}: no such file; using {used}, which the package carries.\n"
    )


def test_one_rank_says_which_file_is_used(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other ranks of a launcher are silent."""
    monkeypatch.setenv("RANK", "1")
    load("demo.yaml")
    assert capsys.readouterr().err == ""


def test_a_file_of_the_user_wins(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package's file serves only where no such file exists."""
    Path("demo.yaml").write_text("run: {dir: mine}\n")
    assert load("demo.yaml").run.dir == str(elsewhere / "mine")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["other/demo.yaml", "configs/more/demo.yaml", "demos.yaml", "."])
def test_any_other_missing_file_is_refused(name: str, elsewhere: Path) -> None:
    """A path into another folder names a file of the user, even if its name is a carried one."""
    with pytest.raises(ConfigError, match=f"--config {name}: "):
        load(name)
    with pytest.raises(ConfigError, match="no such file"):
        load(elsewhere / "configs" / "demo.yaml")


@pytest.mark.slow
def test_a_wheel_prepares_trains_and_evaluates(tmp_path: Path) -> None:
    """Outside the checkout, from an empty folder, with a configuration that the wheel carries."""
    source, env, work = tmp_path / "source", tmp_path / "env", tmp_path / "work"
    for folder in ("pipeline", "configs"):
        shutil.copytree(
            REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    clean = {k: v for k, v in environment().items() if k != "PYTHONPATH"}

    def run(*words: str, cwd: Path = work) -> str:
        result = subprocess.run(
            words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    work.mkdir()
    build = "import setuptools.build_meta as backend; backend.build_wheel('.')"
    run(sys.executable, "-c", build, cwd=source)
    # The environment has the libraries of this one, but not what is installed editable in it.
    venv.create(env, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(env)}))
    libraries = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "libraries.pth").write_text("\n".join(sorted(libraries)))
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(
        wheel
    ) as archive:  # installing a wheel without scripts is no more than this
        archive.extractall(packages)
    shutil.rmtree(source)
    python, dcgan = str(env / "bin" / "python"), env / "bin" / "dcgan"
    (entries,) = packages.glob("dcgan_pipeline-*/entry_points.txt")
    assert "dcgan = pipeline.cli:main" in entries.read_text()
    dcgan.write_text(f"#!{python}\nfrom pipeline.cli import main\nmain()\n")  # as pip would
    dcgan.chmod(0o755)
    found = run(python, "-c", "import pipeline.data.loader as module; print(module.__file__)")
    assert found.strip() == str(packages / "pipeline" / "data" / "loader.py")

    (work / "photos").mkdir()
    for k in range(640):
        Image.fromarray(pixels_of(k, (32, 32, 1))[:, :, 0]).save(work / "photos" / f"{k}.png")
    size = ("--size", "32", "--channels", "1")
    run(str(dcgan), "prepare", "photos", "--out", "data/fashion-mnist-32", *size)
    short = ("train.total_steps=3", "train.checkpoint_every=3", "data.batch_size=16")
    small = ("eval.num_images=640", "eval.reference_images=640")
    output = run(str(dcgan), "train", "--config", "configs/demo.yaml", *short, *small)
    assert f"using {packages}/pipeline/configs/demo.yaml" in output
    run(str(dcgan), "evaluate", "--run", "runs/demo", "--pending")
    (row,) = (work / "runs" / "demo" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 3

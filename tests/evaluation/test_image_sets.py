"""``evaluate --images A --against B``: sets that other programs wrote, and what is done to them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import write_shards
from evaluating import TINY, evaluated, make_config
from imagecodecs import bmp_encode, png_encode
from launching import REPO, environment, free_port
from PIL import Image

from pipeline.config.loading import dump
from pipeline.data.cache import Cache
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.evaluation.candidates import chosen_ids
from pipeline.evaluation.moments import npz_id
from pipeline.runtime.errors import DataError, EvaluationError, UserError

N = 40
PIXELS = np.random.default_rng(0).integers(0, 256, (2 * N, 16, 16, 3), np.uint8)
A, B = PIXELS[:N], PIXELS[N:] // 2
Write = Callable[[Path, np.ndarray], Path]


def png_folder(path: Path, pixels: np.ndarray) -> Path:
    path.mkdir()
    for k, one in enumerate(pixels):
        Image.fromarray(one).save(path / f"{k:03d}.png")
    return path


def codecs_folder(path: Path, pixels: np.ndarray) -> Path:
    """PNG and BMP files of imagecodecs, PPM files as their specification says."""
    path.mkdir()
    for k, one in enumerate(pixels):
        ppm = b"P6\n%d %d\n255\n" % one.shape[1::-1] + one.tobytes()
        kind = ("bmp", "ppm", "png")[k % 3]
        content = {"bmp": bmp_encode, "ppm": lambda _, p=ppm: p, "png": png_encode}[kind](one)
        (path / f"{k:03d}.{kind}").write_bytes(content)
    return path


def zip_archive(path: Path, pixels: np.ndarray) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k, one in enumerate(pixels):
            stored = io.BytesIO()
            Image.fromarray(one).save(stored, "png")
            archive.writestr(f"images/{k:03d}.png", stored.getvalue())
    return path


def adm_npz(path: Path, pixels: np.ndarray) -> Path:
    """As guided-diffusion's samplers write it."""
    np.savez(path.with_suffix(".npz"), pixels)
    return path.with_suffix(".npz")


def npz_with_labels(path: Path, pixels: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), pixels, np.arange(len(pixels)))
    return path.with_suffix(".npz")


def npy(path: Path, pixels: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), pixels)
    return path.with_suffix(".npy")


def gnu_tar(path: Path, pixels: np.ndarray) -> Path:
    folder = png_folder(path.with_name(f"{path.name}-files"), pixels)
    tar = path.with_suffix(".tar")
    subprocess.run(["tar", "--sort=name", "-cf", tar, "-C", folder, "."], check=True)
    return tar


def webdataset_tars(path: Path, pixels: np.ndarray) -> Path:
    """Two tars of the stock writer."""
    from webdataset import TarWriter

    path.mkdir()
    for number, part in enumerate(np.array_split(pixels, 2)):
        with TarWriter(str(path / f"{number}.tar")) as writer:
            for k, one in enumerate(part):
                writer.write({"__key__": f"{number}-{k:03d}", "png": one, "cls": k % 3})
    return path


KINDS = [
    codecs_folder,
    zip_archive,
    adm_npz,
    npz_with_labels,
    npy,
    gnu_tar,
    webdataset_tars,
]


def scored(tmp_path: Path, *words: object) -> dict[str, Any]:
    """The JSON that the command prints; the references lie beside the test."""
    out = io.StringIO()
    overrides = (f"eval.extractor={TINY}", f"eval.cache_dir={tmp_path / 'references'}")
    with patch.object(sys, "__stdout__", out), redirect_stdout(io.StringIO()):
        evaluated("--json", *words, *overrides)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected")
    a, b = png_folder(folder / "x", A), png_folder(folder / "y", B)
    return scored(folder, "--images", a, "--against", b)


@pytest.mark.parametrize("write", KINDS)
def test_a_set_has_the_same_scores_in_every_form(
    write: Write, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """As A and as B, also under the same protocol: the identity of B is its pixels."""
    plain_a, plain_b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    found = scored(tmp_path, "--images", write(tmp_path / "p", A), "--against", plain_b)
    assert found["scores"][0]["scores"] == expected["scores"][0]["scores"]
    found = scored(tmp_path, "--images", plain_a, "--against", write(tmp_path / "q", B))
    assert found["scores"][0]["scores"] == expected["scores"][0]["scores"]
    assert found["protocol"] == expected["protocol"]
    assert found["against"]["sha256"] == expected["against"]["sha256"]


def test_shards_and_our_own_npz_are_sets(tmp_path: Path) -> None:
    """Shards as A and B have the scores of the same pixels as PNG files."""
    a, b = write_shards(tmp_path / "s", [25, 15]), write_shards(tmp_path / "t", [50])

    def pixels(index: Any) -> np.ndarray:
        out = np.empty((index.num_samples, *index.shape), np.uint8)
        Reader(index, Cache(index, "")).read(np.arange(index.num_samples), out)
        return out

    plain = scored(
        tmp_path, "--images", png_folder(tmp_path / "x", pixels(a)),
        "--against", png_folder(tmp_path / "y", pixels(b)),
    )  # fmt: skip
    found = scored(tmp_path, "--images", a.location, "--against", b.location)
    assert found["scores"][0]["scores"] == plain["scores"][0]["scores"]
    assert found["against"]["sha256"] == read_index(b.location).fingerprint


def test_mu_and_sigma_are_the_real_images(tmp_path: Path, expected: dict[str, Any]) -> None:
    """FID of an npz of statistics is that of the images which they are of."""
    a = png_folder(tmp_path / "x", A)
    shards = write_shards(tmp_path / "shards", [50], (32, 32, 1))
    config = make_config(tmp_path)
    (tmp_path / "c.yaml").write_text(dump(config))
    npz = tmp_path / "theirs.npz"
    evaluated("reference", "--config", tmp_path / "c.yaml", "--out", npz)
    found = scored(tmp_path, "--images", a, "--against", npz)
    key = f"eval/fd_tiny-extractor-Tiny_16_40_ref-{npz_id(npz)[:8]}"
    assert list(found["scores"][0]["scores"]) == [key]
    assert found["against"] == {"location": str(npz), "kind": "mu and sigma"}
    assert shards.num_samples == 50


def test_every_file_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, Any]
) -> None:
    """Unreadable files are skipped and counted, others named; the scores are of what is left."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    (a / "010a.png").write_bytes(b"no image")
    (a / "011.jpg").write_bytes((a / "011.png").read_bytes()[:200])
    (a / "notes.txt").write_text("x")
    found = scored(tmp_path, "--images", a, "--against", b)
    assert found["scores"][0]["scores"] == expected["scores"][0]["scores"]
    said = capsys.readouterr().err
    assert "43 files: 40 used; 2 cannot be read; 1 not used: 1 .txt" in said
    assert "010a.png: not a readable image" in said
    assert (found["images"]["images"], found["images"]["unreadable"]) == (40, 2)


def refused(tmp_path: Path, *words: object, kind: type[UserError] = EvaluationError) -> str:
    with pytest.raises(kind) as caught:
        scored(tmp_path, *words)
    return str(caught.value)


def test_images_of_several_sizes_are_resized_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a set, and between the two sets. The line says how many were cropped and resized."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    (a / "000.png").write_bytes(png_encode(np.full((20, 24, 3), 200, np.uint8)))
    words = ("--images", a, "--against", b)
    message = refused(tmp_path, *words)
    assert f"--images ({a}): its images have 2 different sizes: 16x16 (39), 24x20 (1)" in message
    found = scored(tmp_path, *words, "--size", 16)
    assert found["images"]["done"] == {"cropped to the central square": 1, "resized": 1}
    assert "1 of them cropped to the central square; 1 of them resized" in capsys.readouterr().err
    small = png_folder(tmp_path / "z", B[:, :8, :12])
    message = refused(tmp_path, "--images", b, "--against", small)
    assert "has images of 16x16, the real ones" in message
    assert "are 12x8" in message
    found = scored(tmp_path, "--images", small, "--against", small)
    assert found["images"]["size"] == [12, 8]  # of one size they need not be square


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("real", "fake"), "real/ (20), fake/ (20)"),
        (("x/train", "x/test"), "train/ (20), test/ (20)"),
        (("one", "two"), "two/ (20), one/ (20)"),
        (("", "thumbnails"), "thumbnails/ (20), 20 beside them"),
        (("cats", "dogs", "generated"), "generated/ (13), dogs/ (13), cats/ (14)"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_folders_that_look_like_sets_are_one_only_if_asked(
    folders: tuple[str, ...], said: str, zipped: bool, tmp_path: Path
) -> None:
    a, b = tmp_path / "p", png_folder(tmp_path / "y", B)
    for k, one in enumerate(A):
        path = a / folders[k % len(folders)] / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)
    if zipped:
        with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
            for path in a.rglob("*.png"):
                archive.write(path, path.relative_to(a))
        a = tmp_path / "p.zip"
    message = refused(tmp_path, "--images", a, "--against", b)
    assert f"holds images in {said}, which may be several sets" in message
    assert scored(tmp_path, "--images", a, "--against", b, "--subfolders")["images"]["images"] == 40


def test_classes_are_one_set(tmp_path: Path) -> None:
    """Three folders or more, none of which has the name of a set."""
    a, b = tmp_path / "p", png_folder(tmp_path / "y", B)
    for k, one in enumerate(A):
        path = a / f"n0{k % 4}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)
    assert scored(tmp_path, "--images", a, "--against", b)["images"]["images"] == 40


def test_transparency_needs_a_background(tmp_path: Path) -> None:
    """A full alpha channel is no transparency."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    full = np.concatenate([A[1], np.full((16, 16, 1), 255, np.uint8)], axis=2)
    Image.fromarray(full).save(a / "001.png")
    scored(tmp_path, "--images", a, "--against", b)
    (a / "000.png").write_bytes(png_encode(np.full((16, 16, 4), 128, np.uint8)))
    words = ("--images", a, "--against", b)
    assert "1 of 40 images have transparent pixels" in refused(tmp_path, *words)
    white = scored(tmp_path, *words, "--background", "white")
    black = scored(tmp_path, *words, "--background", "#000000")
    assert white["images"]["done"] == {"composited on the background": 1}
    assert white["images"]["sha256"] != black["images"]["sha256"]


def test_of_more_images_a_fixed_choice_of_the_whole_set_is_scored(tmp_path: Path) -> None:
    """eval.num_images on the command line; without it all images are scored."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    chosen = png_folder(tmp_path / "z", A[np.sort(chosen_ids(N, 35))])
    found = scored(tmp_path, "--images", a, "--against", b, "eval.num_images=35")
    whole = scored(tmp_path, "--images", chosen, "--against", b)
    assert found["scores"][0]["scores"] == whole["scores"][0]["scores"]


def test_a_file_of_equal_size_in_b_makes_another_reference(tmp_path: Path) -> None:
    """A reference in the cache belongs to pixels, not to names and sizes of files."""
    a, b = png_folder(tmp_path / "x", A), tmp_path / "y.npy"
    np.save(b, B)
    first = scored(tmp_path, "--images", a, "--against", b)
    np.save(b, B[::-1] + 1)
    second = scored(tmp_path, "--images", a, "--against", b)
    assert first["protocol"] != second["protocol"]


def test_scores_are_written_as_csv(tmp_path: Path, expected: dict[str, Any]) -> None:
    """A row for each set, a column for each score; other programs read it."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    scored(tmp_path, "--images", a, "--against", b, "--csv", tmp_path / "s.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text()))
    assert row["name"] == str(a)
    for key, value in expected["scores"][0]["scores"].items():
        assert float(row[key]) == value
    with pytest.raises(EvaluationError, match="--csv"):
        scored(tmp_path, "--images", a, "--against", b, "--csv", tmp_path / "none" / "s.csv")


@pytest.mark.parametrize("damage", ["empty", "missing", "no images", "all unreadable", "no npz"])
def test_a_set_that_is_none_is_one_message(damage: str, tmp_path: Path) -> None:
    b = png_folder(tmp_path / "y", B)
    a = tmp_path / "x"
    if damage != "missing":
        a.mkdir()
    if damage == "no images":
        (a / "x.txt").write_text("x")
    if damage == "all unreadable":
        (a / "x.png").write_text("x")
    if damage == "no npz":
        a = tmp_path / "x.npz"
        a.write_text("x")
    message = refused(tmp_path, "--images", a, "--against", b, kind=DataError)
    assert f"--images ({a})" in message
    assert "SOURCE" not in message


def test_a_damaged_tar_is_one_message(tmp_path: Path) -> None:
    a, b = gnu_tar(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    a.write_bytes(a.read_bytes()[:5000])
    with pytest.raises(UserError):
        scored(tmp_path, "--images", a, "--against", b)
    with tarfile.open(tmp_path / "z.tar", "w"):
        pass
    assert "z.tar" in refused(
        tmp_path, "--images", tmp_path / "z.tar", "--against", b, kind=DataError
    )


@pytest.mark.slow
def test_the_command_prints_json_alone_on_two_processes(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    """stdout of the real command is one JSON document, with the scores of one process."""
    a, b = png_folder(tmp_path / "x", A), png_folder(tmp_path / "y", B)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["--master_port", str(free_port()), "--", str(REPO / "pipeline" / "evaluate.py")]
    words += ["--json", "--images", str(a), "--against", str(b), f"eval.extractor={TINY}"]
    done = subprocess.run(
        [sys.executable, *words, f"eval.cache_dir={tmp_path / 'references'}"],
        env=environment() | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"][0]["scores"] == expected["scores"][0]["scores"]

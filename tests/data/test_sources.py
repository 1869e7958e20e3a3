"""Every file or member of a source is used, or a line says why not."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from launching import REPO, environment
from PIL import Image
from test_pictures import icc, picture, stored

from pipeline.data.index_writer import write_index
from pipeline.data.labels import NO_LABEL
from pipeline.data.shards import read_index
from pipeline.data.source import Choice, Source
from pipeline.data.sources import find, reader
from pipeline.data.squares import Square
from pipeline.data.tar_scan import scan
from pipeline.runtime.errors import DataError

CHOICE = Choice(download=False)


def prepare(*words: object, code: int = 0) -> str:
    """Run the real command; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    return said


def jpg(seed: int) -> bytes:
    return stored(picture(16, 16, seed), "JPEG")


def images(folder: Path, *names: str) -> Path:
    """A folder of pictures with these names."""
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpg(k))
    return folder


def gnu_tar(folder: Path, to: Path, *options: str) -> Path:
    """A tar of a folder's files, sorted, by GNU tar."""
    to.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    subprocess.run(["tar", "-cf", to, *options, "-C", folder, *names], check=True)
    return to


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def seeds(source: Source) -> list[int]:
    """Which of the pictures each row is."""
    read = reader(source, Square(16, 3))
    known = [np.asarray(Image.open(io.BytesIO(jpg(k)))) for k in range(32)]
    found = [read(row)[0] for row in range(len(source.names))]
    return [next(k for k, one in enumerate(known) if np.array_equal(one, here)) for here in found]


# -- tars ---------------------------------------------------------------------------------------


def test_keys_with_dots_lose_no_image(tmp_path: Path) -> None:
    """webdataset would make one sample of each pair, and one of all the screenshots."""
    names = [f"img_{k}{dot}.jpg" for k in range(3) for dot in ("", ".v2")]
    names += [f"Screenshot 2024-01-05 at 10.{k}.01.jpg" for k in range(3)]
    gnu_tar(images(tmp_path / "files", *names), tmp_path / "tars" / "a.tar")
    source = find(str(tmp_path / "tars"), CHOICE)
    assert sorted(seeds(source)) == list(range(9))
    assert any("9 images share" in line and "--image-field" in line for line in source.said)
    one = find(str(tmp_path / "tars"), Choice(image_field="v2.jpg"))
    assert seeds(one) == [1, 3, 5]
    assert one.left_out["jpg"] == 3


def test_repeated_names_hard_links_and_links_are_images(tmp_path: Path) -> None:
    folder = images(tmp_path / "files", "a.jpg", "b.jpg")
    (folder / "hard.jpg").hardlink_to(folder / "a.jpg")
    (folder / "soft.jpg").symlink_to("b.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    path = gnu_tar(folder, tmp_path / "tars" / "a.tar")
    subprocess.run(["tar", "-rf", path, "-C", folder, "a.jpg"], check=True)  # appended once more
    source = find(str(tmp_path / "tars"), CHOICE)
    assert sorted(seeds(source)) == [0, 0, 0, 1, 1]
    assert source.left_out == {"link to nothing in the tar": 1}
    said = " ".join(source.said)
    assert "1 images have the name of another" in said
    assert "2 images are links" in said


def test_every_extension_of_an_image_is_one(tmp_path: Path) -> None:
    kinds = {"jfif": "JPEG", "jp2": "JPEG2000", "avif": "AVIF", "webp": "WEBP", "PNG": "PNG"}
    members = [
        (f"{k}.{end}", stored(picture(16, 16), kind)) for k, (end, kind) in enumerate(kinds.items())
    ]
    tar_of(tmp_path / "tars" / "a.tar", *members, ("notes.txt", b"no image"))
    source = find(str(tmp_path / "tars"), CHOICE)
    assert len(source.names) == len(kinds)
    assert source.left_out == {"txt": 1}
    said = prepare(tmp_path / "tars")  # a set of several formats, indexed where it is
    assert "indexed 5 samples" in said
    assert read_index(str(tmp_path / "tars")).field == "mixed"
    assert "ok: 5 samples" in prepare("--verify", tmp_path / "tars")


def test_labels_may_come_after_all_images_or_in_json(tmp_path: Path) -> None:
    late = [(f"{k}.jpg", jpg(k)) for k in range(4)] + [
        (f"{k}.cls", b"%d" % (3 - k)) for k in range(4)
    ]
    tar_of(tmp_path / "late" / "a.tar", *late)
    assert find(str(tmp_path / "late"), CHOICE).labels.tolist() == [3, 2, 1, 0]
    documents: list[Any] = [{"label": 2}, {"class": 0}, {"caption": "none"}, {"label": "5"}]
    mixed = [(f"{k}.jpg", jpg(k)) for k in range(4)]
    mixed += [(f"{k}.json", json.dumps(one).encode()) for k, one in enumerate(documents)]
    tar_of(tmp_path / "json" / "a.tar", *mixed)
    source = find(str(tmp_path / "json"), CHOICE)
    assert source.labels.tolist() == [2, 0, NO_LABEL, 5]
    assert any("1 of 4 images are unlabelled" in line for line in source.said)
    other = [("a.jpg", jpg(0)), ("a.json", b'{"label": 1, "style": 7}')]
    tar_of(tmp_path / "other" / "a.tar", *other)
    assert find(str(tmp_path / "other"), Choice(label_field="style")).labels.tolist() == [7]


def test_named_labels_of_several_tars_are_numbered_as_one_set(tmp_path: Path) -> None:
    """Written by webdataset; the names are kept in the index."""
    for part, names in enumerate((("cat", "dog"), ("ant", "cat"))):
        path = tmp_path / "tars" / f"{part}.tar"
        path.parent.mkdir(exist_ok=True)
        with wds.TarWriter(str(path), encoder=False) as writer:
            for k, name in enumerate(names):
                writer.write({"__key__": f"{part}{k}", "jpg": jpg(k), "cls": name.encode()})
    prepare(tmp_path / "tars")
    index = read_index(str(tmp_path / "tars"))
    assert index.table["label"].tolist() == [1, 2, 0, 1]
    assert index.made_by["classes"] == ["ant", "cat", "dog"]
    assert "ok: 4 samples" in prepare("--verify", tmp_path / "tars")
    said = prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 16)
    assert "3 classes" in said
    assert read_index(str(tmp_path / "out")).made_by["classes"] == ["ant", "cat", "dog"]


def test_a_label_that_nobody_understands_does_not_refuse_the_set(tmp_path: Path) -> None:
    labels = [b"3", b"-1", b"0 1 0", b"\xff\xfe", b""]
    members = [
        (f"{k}.{end}", jpg(k) if end == "jpg" else text)
        for k, text in enumerate(labels)
        for end in ("jpg", "cls")
    ]
    tar_of(tmp_path / "tars" / "a.tar", *members)
    source = find(str(tmp_path / "tars"), CHOICE)
    assert source.labels.tolist() == [3, NO_LABEL, 1, NO_LABEL, NO_LABEL]
    assert sum(source.left_out.values()) == 2


def test_tars_in_place_that_need_work_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Turned and Display-P3 photos; obeyed, the remedy gives what a viewer shows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = stored(picture(16, 16), "JPEG", exif=exif, quality=100, subsampling=0)
    vivid = stored(picture(16, 16), "PNG", icc_profile=icc("Display P3"))
    tar_of(tmp_path / "tars" / "a.tar", ("0.jpg", turned), ("1.png", vivid), ("2.jpg", jpg(2)))
    said = prepare(tmp_path / "tars", code=2)
    assert "1 must be turned upright by EXIF, 1 must be converted to sRGB" in said
    assert not (tmp_path / "tars" / "index.json").exists()
    # An index that was made before such images were looked for.
    write_index(
        tmp_path / "tars",
        [scan(tmp_path / "tars" / "a.tar")],
        (16, 16, 3),
        {"source_kind": "indexed"},
    )
    assert "1 must be converted to sRGB" in prepare("--verify", tmp_path / "tars", code=2)
    (tmp_path / "tars" / "index.json").unlink()
    said = prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 16)
    assert "3 files: 3 used; 1 of them turned upright by EXIF; 1 of them converted to sRGB" in said
    said = prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 16, "--strict", code=2)
    assert "--strict: 3 files: 3 used; 1 of them turned" in said


# -- folders and zip archives -------------------------------------------------------------------


def test_a_stray_picture_leaves_the_classes(tmp_path: Path) -> None:
    names = [f"{name}/{k}.jpg" for name in ("cat", "dog") for k in range(3)]
    source = find(str(images(tmp_path / "set", *names, "stray.jpg", "read.me")), CHOICE)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, NO_LABEL]
    assert any("1 images are unlabelled (beside the folders" in line for line in source.said)
    assert source.left_out == {".me": 1}
    said = prepare(tmp_path / "set", "--out", tmp_path / "out", "--size", 16, "--strict", code=2)
    assert "8 files: 7 used; 1 not used: 1 .me" in said
    assert "1 images are unlabelled" in said


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    names = [
        f"{part}/{name}/{k}.jpg" for part in ("train", "val") for name in "ab" for k in range(2)
    ]
    folder = images(tmp_path / "set", *names)
    with pytest.raises(
        DataError, match=r"train \(4 images\), val \(4 images\)\. Give --split train"
    ):
        find(str(folder), CHOICE)
    source = find(str(folder), Choice(split="val"))
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [0, 0, 1, 1])
    assert source.left_out == {"in train/": 4}
    everything = find(str(folder), Choice(split="all"))
    assert everything.labels.tolist() == [0, 0, 1, 1] * 2
    with pytest.raises(DataError, match=r"--split \(test\): .* has train, val"):
        find(str(folder), Choice(split="test"))


def test_one_name_six_times_in_a_zip_is_six_images(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicate name
        for k in range(6):
            archive.writestr("a.jpg", jpg(k))
    source = find(str(path), CHOICE)
    assert sorted(seeds(source)) == list(range(6))
    assert any("5 files have the name of another" in line for line in source.said)


def test_backslashes_in_a_zip_are_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k, name in enumerate(("set\\cat\\1.jpg", "set\\dog\\2.jpg", "set\\Thumbs.db")):
            archive.writestr(name, jpg(k))
    source = find(str(path), CHOICE)
    assert (source.classes, seeds(source)) == (("cat", "dog"), [0, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_the_labels_of_stylegan_are_read(tmp_path: Path, packed: bool) -> None:
    """``dataset.json`` as stylegan3's dataset_tool writes it; its buckets are no classes."""
    folder = images(tmp_path / "set", *(f"{k // 2:05d}/img{k:08d}.jpg" for k in range(4)))
    names = [f"{k // 2:05d}/img{k:08d}.jpg" for k in (0, 1, 3)]
    entries = [[name, k + 4] for k, name in enumerate(names)] + [["00009/gone.jpg", 1]]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    source = folder
    if packed:
        source = tmp_path / "set.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
    found = find(str(source), CHOICE)
    assert found.labels.tolist() == [4, 5, NO_LABEL, 6]
    assert found.classes == ()
    assert found.left_out == {"label in dataset.json without its image": 1}
    assert any("1 images are unlabelled (not in dataset.json)" in line for line in found.said)
    (folder / "dataset.json").write_text('{"labels": null}')
    assert set(find(str(folder), CHOICE).labels.tolist()) == {NO_LABEL}
    (folder / "dataset.json").write_text('{"labels": [3]}')
    with pytest.raises(DataError, match=r"dataset\.json must be .* Repair it, or remove it"):
        find(str(folder), CHOICE)


def test_one_folder_around_all_is_no_class(tmp_path: Path) -> None:
    """CelebA's layout."""
    source = find(
        str(images(tmp_path / "celeba", "img_align_celeba/1.jpg", "img_align_celeba/2.jpg")), CHOICE
    )
    assert (source.classes, source.labels.tolist()) == ((), [NO_LABEL, NO_LABEL])


def test_a_missing_plugin_is_named(tmp_path: Path) -> None:
    from pipeline.data.pictures import MISSING

    folder = images(tmp_path / "set", "a.jpg")
    for ending in MISSING:
        (folder / f"photo{ending}").write_bytes(b"not read")
    said = prepare(folder, "--out", tmp_path / "out", "--size", 16)
    for ending, package in MISSING.items():
        assert f"1 {ending} (pip install {package})" in said


@pytest.mark.parametrize(
    ("first", "second"), [("train2017", "val2017"), ("trainA", "trainB"), ("Training", "test")]
)
def test_splits_of_known_sets_are_no_classes(tmp_path: Path, first: str, second: str) -> None:
    images(tmp_path, f"{first}/a.jpg", f"{second}/b.jpg")
    with pytest.raises(DataError, match=f"--split {min(first, second)}"):
        find(str(tmp_path), Choice())
    assert find(str(tmp_path), Choice(split=second)).names == [f"{second}/b.jpg"]


def test_the_preview_has_the_samples_from_all_over_the_set(tmp_path: Path) -> None:
    source = images(tmp_path / "source", *(f"{k:02d}.jpg" for k in range(20)))
    prepare(source, "--out", tmp_path / "out", "--size", 16)
    shown = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    tiles = [shown[16 * (k // 8) :, 16 * (k % 8) :][:16, :16] for k in range(64)]
    packed = [np.asarray(Image.open(io.BytesIO(jpg(k)))) for k in range(20)]
    assert {tile.tobytes() for tile in tiles[:20]} == {one.tobytes() for one in packed}
    assert not np.any(tiles[20:])
    (tmp_path / "out" / "preview.png").unlink()
    assert "already complete" in prepare(source, "--out", tmp_path / "out", "--size", 16)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "preview.png")), shown)

    gnu_tar(source, tmp_path / "tars" / "a.tar")
    prepare(tmp_path / "tars")
    prepare(tmp_path / "tars", "--index", tmp_path / "other.json")
    beside = np.asarray(Image.open(tmp_path / "tars" / "preview.png"))
    assert np.array_equal(beside, np.asarray(Image.open(tmp_path / "other.preview.png")))
    assert beside.shape == (128, 128, 3)
    assert "already complete" in prepare(tmp_path / "tars")  # the picture is none of the source


def test_links_among_the_images_are_counted_and_followed(tmp_path: Path) -> None:
    images(tmp_path / "here", "a.jpg")
    images(tmp_path / "there", "b.jpg")
    (tmp_path / "here" / "b.jpg").symlink_to(tmp_path / "there" / "b.jpg")
    source = find(str(tmp_path / "here"), Choice())
    assert source.names == ["a.jpg", "b.jpg"]
    assert source.said == ["1 files are symbolic links, which are followed"]


def test_tars_in_folders_of_a_folder_are_one_set(tmp_path: Path) -> None:
    for part in ("x", "y"):
        images(tmp_path / "images" / part, "a.jpg", "b.jpg")
        (tmp_path / "tars" / part).mkdir(parents=True)
        gnu_tar(tmp_path / "images" / part, tmp_path / "tars" / part / "0.tar")
    (tmp_path / "tars" / "x" / "._0.tar").write_bytes(b"of macOS")
    source = find(str(tmp_path / "tars"), Choice())
    assert len(source.names) == len(set(source.names)) == 4
    assert {name.split("/")[0] for name in source.names} == {"x", "y"}
    prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 8)
    assert read_index(str(tmp_path / "out")).num_samples == 4


def test_a_source_that_is_none_says_what_it_is(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg\): is one image. Give the folder"):
        find(str(tmp_path / "a.jpg"), Choice())
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.write(tmp_path / "a.jpg", "a.jpg")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip\): not a readable zip archive: .*Get it again"):
        find(str(cut), Choice())
    (tmp_path / "packed").mkdir()
    whole.rename(tmp_path / "packed" / "whole.zip")
    with pytest.raises(DataError, match=r"holds no images, but archives \(1 \.zip\)"):
        find(str(tmp_path / "packed"), Choice())

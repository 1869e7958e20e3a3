"""Several sets as one, indexes elsewhere, tars behind URLs, and the commands that errors print."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import CountingServer, pixels_of, write_shards
from PIL import Image
from test_prepare import obeying_permissions, prepare

from pipeline.config.loading import load
from pipeline.data.cache import Cache, check_shards
from pipeline.data.locations import expanded, parts_of
from pipeline.data.reader import Reader
from pipeline.data.shards import INDEX_NAME, Index, read_index
from pipeline.runtime.errors import DataError

SHAPE = (8, 8, 3)


def images_of(index: Index, folder: Path | str = "") -> np.ndarray:
    """All images of a set, in the order of the ids."""
    out = np.zeros((index.num_samples, *index.shape), np.uint8)
    Reader(index, Cache(index, str(folder))).read(np.arange(index.num_samples), out)
    return out


def write_photos(folder: Path, count: int = 6, size: int = 40) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(pixels_of(k, (size, size, 3))).save(folder / f"{k}.png")


def write_tars(folder: Path, count: int = 3, each: int = 4, start: int = 0) -> None:
    """Tars of PNG files, as webdataset writes them, without an index."""
    folder.mkdir(parents=True)
    for number in range(count):
        with wds.TarWriter(str(folder / f"train-{number:03d}.tar")) as tar:
            for k in range(each):
                sample = start + number * each + k
                image = Image.fromarray(pixels_of(sample, (32, 32, 3)))
                tar.write({"__key__": f"{sample:05d}", "png": image, "cls": sample % 3})


# -- several sets -------------------------------------------------------------------------------


def test_braces_are_those_of_a_shell() -> None:
    """Compared with bash itself, padding and falling ranges included."""
    for text in (
        "a{00..03}b",
        "{1..10}",
        "{3..1}",
        "x{a,b}{1..2}",
        "{08..11}",
        "s{,-x}",
        "{x}",
        "{}",
    ):
        said = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True
        )
        assert expanded(text, "") == said.stdout.splitlines()
    with pytest.raises(DataError, match="more than 100000 files"):
        expanded("{0..999}{0..999}", "data.shards")
    with pytest.raises(DataError, match="more than once"):
        parts_of("a::b::a", "data.shards")
    with pytest.raises(DataError, match="empty location"):
        parts_of("a::", "data.shards")


def test_several_sets_are_read_as_one(
    serve: Callable[[Path], CountingServer], tmp_path: Path
) -> None:
    """Local and remote, npy and png; ids count through them, checks and caches work for each."""
    first = write_shards(tmp_path / "a", [3, 4])
    second = write_shards(tmp_path / "b", [5], field="png")
    server = serve(tmp_path / "b")
    joined = read_index(f"{first.location}::{server.url}")
    assert joined.num_samples == 12
    assert joined.is_remote
    expected = np.concatenate([images_of(first), images_of(second)])
    assert np.array_equal(images_of(joined, tmp_path / "cache"), expected)
    assert server.gets["shard-000000.tar"] == 1
    braces = read_index(f"{tmp_path}/{{a,b}}")
    assert np.array_equal(images_of(braces), expected)
    assert braces.fingerprint == joined.fingerprint
    assert braces.fingerprint != first.fingerprint
    check_shards(joined, "sha256")
    path = tmp_path / "a" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"shard-000001\.tar: its checksum differs"):
        check_shards(joined, "sha256")


def test_sets_of_two_shapes_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [3])
    write_shards(tmp_path / "b", [3], (8, 8, 1))
    with pytest.raises(
        DataError, match=r"one shape; .*/a has 8x8 with 3 channels, .*/b has 8x8 wi"
    ):
        read_index(f"{tmp_path}/a::{tmp_path}/b")


def test_a_list_of_sets_in_a_configuration(tmp_path: Path) -> None:
    """As YAML writes lists; each path is relative to the file, or to the working folder."""
    (tmp_path / "pyproject.toml").touch()
    file = tmp_path / "c.yaml"
    file.write_text("data:\n  shards: [data/a, 's3://bucket/b']\n")
    assert load(file).data.shards == f"{tmp_path}/data/a::s3://bucket/b"
    here = Path.cwd()
    for words in ("data.shards=[x,y]", "data.shards=x::y"):
        assert load(file, [words]).data.shards == f"{here}/x::{here}/y"


# -- an index elsewhere -------------------------------------------------------------------------


def test_tars_in_a_read_only_folder_get_an_index_elsewhere(tmp_path: Path) -> None:
    """Said before a tar is read, with a command that works; the index finds the tars from there."""
    write_tars(tmp_path / "tars")
    (tmp_path / "tars").chmod(0o555)
    prefix = obeying_permissions()
    try:
        said = prepare(tmp_path / "tars", code=2, prefix=prefix)
        assert "its index cannot be written there" in said
        assert "index: " not in said
        done = obey(said, tmp_path, prefix)
        assert "indexed 12 samples in 3 shards" in done
        again = prepare(tmp_path / "tars", "--index", tmp_path / "tars.json")
        assert "already complete" in again
        assert prepare("--verify", tmp_path / "tars.json").startswith("ok: 12 samples")
    finally:
        (tmp_path / "tars").chmod(0o755)
    index = read_index(str(tmp_path / "tars.json"))
    assert index.location == str(tmp_path / "tars")
    assert [int(image[0, 0, 0]) for image in images_of(index)] == [
        int(pixels_of(k, (32, 32, 3))[0, 0, 0]) for k in range(12)
    ]
    assert not (tmp_path / "tars" / INDEX_NAME).exists()


def test_tars_behind_a_url_get_an_index_without_a_copy(
    serve: Callable[[Path], CountingServer], tmp_path: Path
) -> None:
    """One GET for each, nothing is left; the training's reader finds them by the index."""
    write_tars(tmp_path / "tars", start=100)
    server = serve(tmp_path / "tars")
    source, index_file = f"{server.url}/train-{{000..002}}.tar", tmp_path / "train.json"
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    said = prepare(source, code=2)
    assert "give --index FILE.json" in said
    said = prepare(source, "--index", index_file, env=environment)
    assert "indexed 12 samples in 3 shards, 32x32x3 png" in said
    assert not list((tmp_path / "tmp").rglob("*.tar"))
    assert {name: server.gets[name] for name in server.gets} == {
        f"train-{k:03d}.tar": 1 for k in range(3)
    }
    index = read_index(str(index_file))
    assert index.location == server.url
    assert index.table["label"].tolist() == [sample % 3 for sample in range(100, 112)]
    images = images_of(index, tmp_path / "cache")
    assert np.array_equal(images[5], pixels_of(105, (32, 32, 3)))
    said = prepare(f"{server.url}/train-{{000..003}}.tar", "--index", tmp_path / "x.json", code=2)
    assert "train-003.tar: not found" in said
    assert not (tmp_path / "x.json").exists()


def test_the_message_for_tars_as_data_shards_names_a_command_that_works(
    serve: Callable[[Path], CountingServer], tmp_path: Path
) -> None:
    """A brace list of tars, local or behind a URL, is what users of webdataset write."""
    write_tars(tmp_path / "tars")
    server = serve(tmp_path / "tars")
    for location in (
        f"{tmp_path}/tars/train-{{000..002}}.tar",
        f"{server.url}/train-{{000..002}}.tar",
    ):
        with pytest.raises(DataError, match="names tars and no set") as caught:
            read_index(location)
        obey(str(caught.value), tmp_path)
        assert read_index(named_set(str(caught.value), tmp_path)).num_samples == 12


# -- what errors tell users to run --------------------------------------------------------------


def obey(message: str, folder: Path, prefix: list[str] | None = None) -> str:
    """Run the command that a message prints, in a folder, as a shell does; return what it says."""
    found = re.search(
        r"((?:rm -r .+? && )?python -m pipeline\.prepare .*?)(?= and set | \(or |\n|$)", message
    )
    assert found, message
    line = found[1].rstrip(".").replace("python -m", f"{shlex.quote(sys.executable)} -m")
    if prefix:
        line = f"{shlex.join(prefix)} {line}"
    run = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, (line, run.stderr)
    return run.stdout + run.stderr


def named_set(message: str, folder: Path) -> str:
    """The value of data.shards that a message tells to set."""
    found = re.search(r"set data\.shards=(\S+?)\.?$", message)
    assert found, message
    return str(folder / found[1])


def wids_index(folder: Path) -> None:
    """An index as wids writes it: names and numbers of samples, no offsets."""
    shards = [{"url": path.name, "nsamples": 4} for path in sorted(folder.glob("*.tar"))]
    document = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    (folder / INDEX_NAME).write_text(json.dumps(document))


SETS = {
    "photos": lambda folder: write_photos(folder),
    "photos with spaces": lambda folder: write_photos(folder / "my photos"),
    "tars": lambda folder: write_tars(folder),
    "index of wids": lambda folder: (write_tars(folder), wids_index(folder)),
    "damaged index": lambda folder: (
        write_shards(folder, [4, 5]),
        (folder / INDEX_NAME).write_text("{"),
    ),
    "damaged table": lambda folder: (
        write_shards(folder, [4, 5]),
        (folder / f"{INDEX_NAME}.samples.npy").write_bytes(b"x"),
    ),
    "missing table": lambda folder: (
        write_shards(folder, [4, 5]),
        (folder / f"{INDEX_NAME}.samples.npy").unlink(),
    ),
    "index that is a folder": lambda folder: (
        write_shards(folder, [4, 5]),
        (folder / INDEX_NAME).unlink(),
        (folder / INDEX_NAME).mkdir(),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_every_command_of_an_error_makes_a_set(name: str, tmp_path: Path) -> None:
    """Obeyed to the letter it works, and what it says to set then is a set."""
    place = tmp_path / "it's here" / "set"
    SETS[name](place)
    place = place / "my photos" if name == "photos with spaces" else place
    with pytest.raises(DataError, match=r"python -m pipeline\.prepare") as caught:
        read_index(str(place), "--size 32 --channels 3")
    obey(str(caught.value), tmp_path)
    if "set data.shards=" in str(caught.value):
        place = Path(str(caught.value).partition("set data.shards=")[2])
    assert read_index(str(place)).num_samples >= 6


@pytest.mark.parametrize(
    ("document", "tool"),
    [
        ({"shards": [{"format": "mds"}], "version": 2}, "mosaicml-streaming"),
        ({"chunks": [], "config": {"data_format": ["jpeg"]}}, "litdata"),
    ],
)
def test_the_index_of_another_tool_is_named(document: dict, tool: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps(document))
    with pytest.raises(DataError, match=f"It is of {tool}"):
        read_index(str(tmp_path))


# -- borders of prepare -------------------------------------------------------------------------


def test_shards_are_not_written_among_other_files(tmp_path: Path) -> None:
    """A foreign folder, a URL, a folder inside SOURCE: refused before anything is written."""
    write_photos(tmp_path / "photos")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "other" / ".DS_Store").touch()
    before = sorted(tmp_path.rglob("*"))
    for out, why in (
        (tmp_path / "other", r"holds 1 files of something else \(thesis.tex"),
        ("s3://bucket/set", "must be a local folder. Write the shards into one, then upload"),
        (tmp_path / "photos" / "shards", "lies inside SOURCE"),
    ):
        said = prepare(tmp_path / "photos", "--out", out, "--size", 32, code=2, cwd=tmp_path)
        assert re.search(why, said), said
        assert sorted(path for path in tmp_path.rglob("*") if ".prepare" not in str(path)) == before
    (tmp_path / "other" / "thesis.tex").unlink()
    prepare(tmp_path / "photos", "--out", tmp_path / "other", "--size", 32)


def test_a_source_of_tars_and_images_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path / "both")
    write_photos(tmp_path / "both" / "more")
    said = prepare(tmp_path / "both", "--out", tmp_path / "out", code=2)
    assert "holds 3 tars and also images, e.g. " in said
    shutil.move(tmp_path / "both" / "more", tmp_path / "photos")  # the remedy
    assert "12 samples" in prepare(tmp_path / "both", "--out", tmp_path / "out", "--size", 32)


def test_sizes_are_those_of_a_model(tmp_path: Path) -> None:
    """One that no model takes is refused; of another, the line to train with names the model."""
    write_photos(tmp_path / "photos", 2)
    assert "from 8 to 256" in prepare(tmp_path, "--out", "x", "--size", 512, code=2)
    said = prepare(tmp_path / "photos", "--out", tmp_path / "out", "--size", 24)
    assert "only model.architecture=mlp takes it; dcgan takes 32, 64, 128, 256" in said
    words = re.findall(r"(?:data|model)\.\w+=\S+", said.partition("train with:")[2])
    file = tmp_path / "c.yaml"
    file.touch()
    config = load(file, words)
    read_index(config.data.shards).require_shape(config.model.image_shape, "data.shards")


# -- stale sets ---------------------------------------------------------------------------------


def test_images_edited_to_the_same_size_are_found(tmp_path: Path) -> None:
    """By their contents, not by their times: touched files are still the same."""
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for k in range(8):
        Image.fromarray(pixels_of(k, (40, 40, 3))).save(source / f"{k}.bmp")
    words = (source, "--out", out, "--size", 32, "--shard-mib", 0.01)
    prepare(*words)
    os.utime(source / "3.bmp")
    assert "already complete" in prepare(*words)
    Image.fromarray(pixels_of(99, (40, 40, 3))).save(source / "3.bmp")
    said = prepare(*words, code=2)
    assert re.search(r"images of SOURCE were edited .* in 1 of \d+ shards", said)
    shutil.rmtree(out)  # the remedy
    prepare(*words)


def test_an_edit_amid_packing_packs_its_shard_again(tmp_path: Path) -> None:
    """The shards of two parts: a picture of a finished one is edited before the set is complete."""
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for k in range(8):
        Image.fromarray(pixels_of(k, (32, 32, 3))).save(source / f"{k}.bmp")
    words = (source, "--out", out, "--size", 32, "--shard-mib", 0.01)
    prepare(*words, "--part", "0/2")
    for k in range(8):
        Image.fromarray(pixels_of(50 + k, (32, 32, 3))).save(source / f"{k}.bmp")
    assert "changed since: they are packed again" in prepare(*words, "--part", "1/2")
    images = {image.tobytes() for image in images_of(read_index(str(out)))}
    assert images == {pixels_of(50 + k, (32, 32, 3)).tobytes() for k in range(8)}


def test_tars_rewritten_to_the_same_size_are_indexed_anew(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    write_tars(tmp_path / "other", start=300)
    prepare(tmp_path / "tars")
    before = read_index(str(tmp_path / "tars"))
    assert "already complete" in prepare(tmp_path / "tars")
    target, other = (tmp_path / name / "train-001.tar" for name in ("tars", "other"))
    assert target.stat().st_size == other.stat().st_size
    shutil.copyfile(other, target)
    assert "train-001.tar: its checksum differs" in prepare(tmp_path / "tars")
    assert read_index(str(tmp_path / "tars")).fingerprint != before.fingerprint


def test_files_of_macos_are_no_tars(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    (tmp_path / "tars" / "._train-000.tar").write_bytes(b"\0\5\26\7" + bytes(4092))
    assert "indexed 12 samples in 3 shards" in prepare(tmp_path / "tars")
    assert "ok: 12" in prepare("--verify", tmp_path / "tars")
    assert "12 samples" in prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 32)

"""Images to shards: every kind of source, every pixel mode, interruptions, damage and refusals."""

import fcntl
import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pipeline.data import packing
from pipeline.data.cache import Cache
from pipeline.data.pictures import DecodeError
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.data.source import Choice
from pipeline.data.sources import find, reader
from pipeline.data.squares import ENLARGED, Square
from pipeline.data.tar_scan import scan
from pipeline.runtime.documents import read_document, write_document
from pipeline.runtime.errors import DataError
from pipeline.runtime.work_folder import WorkFolder

WHITE = (255, 255, 255)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def command(*arguments):
    return [sys.executable, "-m", "pipeline.prepare", *map(str, arguments)]


def prepare(*arguments, code=0, prefix=(), **options):
    """Run the real command; returns its stdout and stderr, after a check of the exit code."""
    words = [*prefix, *command(*arguments)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    return run.stdout + run.stderr


def obeying_permissions():
    """The start of a command line whose process obeys permissions even if root runs it."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may read anything, and there is no setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def content(folder):
    """{path: bytes} of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels_by_key(folder):
    """{row of the listing: (pixels, label)} as the training reader delivers them."""
    index = read_index(str(folder))
    out = np.zeros((index.num_samples, *index.shape), np.uint8)
    labels = Reader(index, Cache(index, "")).read(np.arange(index.num_samples), out)
    keys = []
    for shard in index.shards:
        with tarfile.open(folder / shard.url) as tar:
            keys += [int(n.split(".")[0]) for n in tar.getnames() if not n.endswith(".cls")]
    return {key: (out[i], int(labels[i])) for i, key in enumerate(keys)}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder, images, labels, end=""):
    """IDX files as the original data set names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, array in (("images", images), ("labels", labels)):
        head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        raw = head + array.astype(np.uint8).tobytes()
        name = f"train-{what}-idx{array.ndim}-ubyte{end}"
        (folder / name).write_bytes(gzip.compress(raw) if end else raw)


def write_tar(path, samples, mtime=None):
    """A tar as any user of webdataset writes it; with the default mtime it has pax headers."""
    import webdataset

    with webdataset.TarWriter(str(path), mtime=mtime) as tar:
        for sample in samples:
            tar.write(sample)


def stock_samples(path):
    """{key: decoded sample} of a tar, by webdataset's own reading stages.

    The stages instead of ``WebDataset(path)``, which leaves the file open and pytest notices.
    """
    from webdataset import autodecode, tariterators

    decode = autodecode.Decoder([autodecode.imagehandler("rgb8")])
    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return {s["__key__"]: decode(s) for s in tariterators.group_by_keys(files)}


# -- pixels of one image ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(out, kind, exif=exif)
    with Image.open(out) as image:
        pixels, _ = Square(16, 3).of(image)
    with Image.open(out) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(pixels, expected)


def test_orientation_in_the_old_text_chunk_of_png_files_is_undone():
    """ImageMagick wrote EXIF as hex digits, before PNG had a chunk for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile, text, out = exif.tobytes(), PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("Raw profile type exif", f"\nexif\n{len(profile):8}\n{profile.hex()}\n")
    array = noise(16, 16, 3)
    Image.fromarray(array).save(out, "PNG", pnginfo=text)
    with Image.open(out) as image:
        assert np.array_equal(Square(16, 3).of(image)[0], np.rot90(array, -1))


@pytest.mark.parametrize("damaged", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0", b"noise" * 9])
def test_an_image_with_damaged_metadata_is_shown_as_stored(damaged):
    """Its pixels are whole; viewers show it too."""
    array, out = noise(16, 16, 3), io.BytesIO()
    Image.fromarray(array).save(out, "PNG", exif=damaged)
    with Image.open(out) as image:
        assert np.array_equal(Square(16, 3).of(image)[0], array)


def test_crop_is_central_and_comes_before_the_resize():
    wide = np.zeros((10, 31, 3), np.uint8)
    wide[:, 10:20] = (0, 255, 0)
    for array in (wide, wide.transpose(1, 0, 2)):
        for size in (10, 5, 20):
            pixels, enlarged = Square(size, 3).of(Image.fromarray(array))
            assert pixels.shape == (size, size, 3)
            assert (pixels == (0, 255, 0)).all()
            assert (ENLARGED in enlarged) == (size > 10)


def test_resize_is_antialiased():
    """One-pixel stripes average to gray; a filter that samples points would keep black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = Square(8, 1).of(Image.fromarray(stripes))
    assert np.abs(pixels[:, 1:-1].astype(int) - 128).max() <= 2


def test_hidden_colours_of_transparent_pixels_do_not_bleed():
    array = np.zeros((16, 16, 4), np.uint8)
    array[:, :8] = (255, 0, 0, 255)
    array[:, 8:] = (0, 255, 0, 0)  # green that nobody sees
    pixels, _ = Square(5, 3).of(Image.fromarray(array))
    assert np.array_equal(pixels[..., 1], pixels[..., 2])  # only mixtures of red and white
    assert (pixels[..., 0] == 255).all()


# -- packing ------------------------------------------------------------------------------------

ZOO = {
    "1.png": (Image.new("1", (9, 9), 1), {}, WHITE),
    "L.png": (Image.new("L", (9, 9), 100), {}, (100, 100, 100)),
    "LA.png": (Image.new("LA", (9, 9), (0, 128)), {}, (127, 127, 127)),
    "RGB.webp": (Image.new("RGB", (9, 9), (9, 8, 7)), {"lossless": True}, (9, 8, 7)),
    "RGB.bmp": (Image.new("RGB", (9, 9), (6, 5, 4)), {}, (6, 5, 4)),
    "RGBA.png": (Image.new("RGBA", (9, 9), (255, 0, 0, 128)), {}, (255, 127, 127)),
    "palette.png": (Image.new("RGB", (9, 9), (1, 2, 3)).quantize(4), {}, (1, 2, 3)),
    "clear.gif": (Image.new("P", (9, 9), 0), {"transparency": 0}, WHITE),
    "tRNS.png": (Image.new("RGB", (9, 9), BLUE), {"transparency": BLUE}, WHITE),
    "CMYK.jpg": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), {}, (254, 0, 0)),
    "16 bit.png": (Image.fromarray(np.full((9, 9), 0x8080, np.uint16)), {}, (128, 128, 128)),
    "16 bit.tiff": (Image.fromarray(np.full((9, 9), 0x4040, np.uint16)), {}, (64, 64, 64)),
    "moving.gif": (
        Image.new("RGB", (9, 9), RED),
        {"save_all": True, "append_images": [Image.new("RGB", (9, 9), BLUE)]},
        RED,
    ),
    "UPPER.PNG": (Image.new("RGB", (9, 9), (7, 7, 7)), {}, (7, 7, 7)),
}


def test_a_folder_of_every_mode_with_damage_among_it(tmp_path):
    source, out = tmp_path / "zoo", tmp_path / "shards"
    source.mkdir()
    for name, (image, options, _) in ZOO.items():
        image.save(source / name, **options)
    good = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(good, "JPEG")
    (source / "cut.jpg").write_bytes(good.getvalue()[:-500])
    (source / "no image.png").write_text("hello")
    (source / "float.tif").write_bytes(b"")
    Image.new("F", (9, 9), 0.5).save(source / "float.tif")
    (source / "notes.txt").write_text("not an image")
    (source / ".hidden.png").write_text("not listed")
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")

    said = prepare(source, "--out", out, "--size", 9, "--strict", code=2)
    bad = ["cut.jpg", "float.tif", "gone.png", "no image.png"]
    assert all(name in said for name in ["--strict: 4 images", *bad])
    assert not (out / "index.json").exists()

    said = prepare(source, "--out", out, "--size", 9)
    assert "warning: 4 images cannot be read" in said
    assert "continuing: 1 of 1 shards are finished" in said
    assert "1 .txt" in said
    listed = (out / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == bad
    assert all(line.split("\t")[1] for line in listed)
    index = read_index(str(out))
    assert index.made_by["skipped"] == 4
    assert not (out / ".prepare").exists()
    samples = pixels_by_key(out)
    rows = {row: name for row, name in enumerate(sorted([*ZOO, *bad])) if name in ZOO}
    assert sorted(samples) == sorted(rows)
    for row, name in rows.items():
        pixels, label = samples[row]
        difference = np.abs(pixels.astype(int) - ZOO[name][2]).max()
        assert difference <= (2 if name == "CMYK.jpg" else 0), name
        assert label == -1

    assert "4 images" in prepare(source, "--out", out, "--size", 9, "--strict", code=2)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(folder of nested class folders, its shards made by one worker): 3 classes, 60 images."""
    root = tmp_path_factory.mktemp("labelled")
    for i in range(60):
        path = root / "images" / "bca"[i % 3] / f"part{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, 3, seed=i)).save(path)
    arguments = ("--size", 16, "--format", "png", "--shard-mib", 0.02)
    prepare(root / "images", "--out", root / "one", *arguments, "--workers", 1)
    return root


def test_labels_are_those_of_image_folder_and_webdataset_reads_them(labelled):
    names = sorted(str(p.relative_to(labelled / "images")) for p in labelled.rglob("*/*/*/*.png"))
    index = read_index(str(labelled / "one"))
    assert index.made_by["classes"] == ["a", "b", "c"]
    assert len(index.shards) > 3
    assert max(index.sizes) - min(index.sizes) <= 1
    stock = {}
    for shard in index.shards:
        stock |= stock_samples(labelled / "one" / shard.url)
    ours = pixels_by_key(labelled / "one")
    assert len(stock) == len(ours) == len(names) == 60
    for row, name in enumerate(names):
        with Image.open(labelled / "images" / name) as image:
            expected = np.asarray(image)
        assert np.array_equal(stock[f"{row:08d}"]["png"], expected)
        assert np.array_equal(ours[row][0], expected)
        assert stock[f"{row:08d}"]["cls"] == ours[row][1] == "abc".index(name[0])
    assert list(ours) != sorted(ours)  # shuffled


def test_the_index_places_samples_where_the_headers_do(labelled):
    index = read_index(str(labelled / "one"))
    scans = [scan(labelled / "one" / shard.url) for shard in index.shards]
    assert np.array_equal(np.concatenate([one.table for one in scans]), index.table)
    assert [one.shard for one in scans] == list(index.shards)


def test_two_workers_write_the_bytes_of_one(labelled):
    arguments = ("--size", 16, "--format", "png", "--shard-mib", 0.02)
    prepare(labelled / "images", "--out", labelled / "two", *arguments, "--workers", 2)
    assert content(labelled / "two") == content(labelled / "one")


def test_the_same_command_again_does_nothing(labelled):
    before = {p: p.stat().st_mtime_ns for p in (labelled / "one").iterdir()}
    arguments = ("--size", 16, "--format", "png", "--shard-mib", 0.02)
    said = prepare(labelled / "images", "--out", labelled / "one", *arguments)
    assert "already complete, nothing to do: 60 samples" in said
    assert {p: p.stat().st_mtime_ns for p in (labelled / "one").iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused_by_name(labelled):
    said = prepare(labelled / "images", "--out", labelled / "one", "--size", 32, code=2)
    assert "size: was 16, is now 32" in said
    assert "format: was png, is now npy" in said
    assert "Give another --out" in said


@pytest.mark.parametrize("damaged", ["", "[]", '{"size": ', '{"size": 16}'])
def test_a_damaged_record_of_the_settings_is_one_message(labelled, tmp_path, damaged):
    """It is not taken for the settings of another set, and is no traceback."""
    (tmp_path / ".prepare").mkdir()
    (tmp_path / ".prepare" / "settings.json").write_text(damaged)
    said = prepare(labelled / "images", "--out", tmp_path, code=2)
    assert "settings.json: " in said
    assert f"Remove {tmp_path} and run the same command" in said


@pytest.fixture(scope="module")
def half(labelled):
    """The set of ``labelled`` when only part 0 of 2 is packed; not to be changed."""
    words = ("--size", 16, "--format", "png", "--shard-mib", 0.02, "--workers", 1)
    prepare(labelled / "images", "--out", labelled / "half", *words, "--part", "0/2")
    return labelled / "half"


@pytest.fixture
def unfinished(labelled, half, tmp_path):
    """(a copy of ``half``, a function that runs its command again)."""
    words = ("--size", 16, "--format", "png", "--shard-mib", 0.02, "--workers", 1)
    out = shutil.copytree(half, tmp_path / "out")
    return out, lambda *more, **options: prepare(
        labelled / "images", "--out", out, *words, *more, **options
    )


MARKER_HARM = {
    "another label": (".prepare/*0.tar.json", lambda raw: raw.replace(b", 1]", b", 2]", 1)),
    "another offset": (".prepare/*0.tar.json", lambda raw: raw.replace(b"[[", b"[[1", 1)),
    "cut": (".prepare/*0.tar.json", lambda raw: raw[:-9]),
    "empty": (".prepare/*0.tar.json", lambda _: b""),
    "no seal": (".prepare/*0.tar.json", lambda raw: raw.replace(b"digest", b"digesu")),
    "nested": (".prepare/*0.tar.json", lambda _: b"[" * 100_000),
    "not UTF-8": (".prepare/*0.tar.json", lambda raw: b"\xff" + raw),
    "of another shard": (".prepare/*0.tar.json", lambda raw: raw.replace(b"000000", b"000002")),
    "flipped shard": ("*0.tar", lambda raw: raw[:700] + bytes([raw[700] ^ 1]) + raw[701:]),
    "cut shard": ("*0.tar", lambda raw: raw[:-512]),
    "longer shard": ("*0.tar", lambda raw: raw + b"0"),
}


@pytest.mark.parametrize("harm", MARKER_HARM)
def test_a_damaged_marker_or_shard_is_set_aside_and_packed_again(labelled, unfinished, harm):
    """Never an index with another label or offset: the result is that of an undisturbed run."""
    out, run = unfinished
    pattern, change = MARKER_HARM[harm]
    path = min(out.glob(pattern))
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    said = run()
    assert f"{path}: " in said
    assert f"set aside as {path.name}.damaged, its part is made again" in said
    found = content(out)
    found.pop(f"{path.name}.damaged", None)
    assert found == content(labelled / "one")


def test_a_marker_sealed_anew_leads_nowhere_else(labelled, unfinished, tmp_path):
    """A forged marker that names a file outside, or no numbers, is damage; nothing is renamed."""
    out, run = unfinished
    mine = tmp_path / "mine"
    mine.write_text("mine")
    marker = min((out / ".prepare").glob("*.tar.json"))
    document = read_document(marker)
    (out / ".prepare" / "mine").write_text("mine")
    forged = [
        *({"files": files} for files in ({"../mine": [1, "0"]}, {"": [1, "0"]}, {"..": [1, "0"]})),
        *({"files": files} for files in ({}, 3, {marker.name.removesuffix(".json"): 3})),
        *({"table": table} for table in (3, [["a"]], [[2**70, 1, 1]], [[10**9, 1, 1]])),
        *(
            {"skipped": [3]},
            {"done": {"turned": "x"}},
            {"done": 3},
            {"source_files": {"a": "1"}},
            {"part": "other"},
            {"settings": "other"},
        ),
    ]
    work = WorkFolder(
        marker.parent, out, read_document(marker.parent / "settings.json"), {"source"}
    )
    for number, change in enumerate(forged):
        write_document(marker, document | change)
        assert not work.finished([marker.name], out, packing._packed), change
        assert len(list(marker.parent.glob("*.damaged*"))) == number + 1
    assert (mine.read_text(), (out / ".prepare" / "mine").read_text()) == ("mine", "mine")
    run()
    assert content(out) == content(labelled / "one")


def test_lost_settings_are_one_message(unfinished):
    """The tars are not called those of something else, nor overwritten."""
    out, run = unfinished
    before = content(out)
    settings = out / ".prepare" / "settings.json"
    settings.unlink()
    assert f"{settings}: is missing" in run(code=2)
    settings.symlink_to(settings)
    assert f"{settings}: Too many levels of symbolic links. Remove {out}" in run(code=2)
    settings.unlink()
    found = content(out)
    assert found == {
        name: raw for name, raw in before.items() if not name.endswith("settings.json")
    }


def test_a_changed_list_of_skipped_images_is_said(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"")
    words = (tmp_path / "images", "--out", tmp_path / "out", "--size", 8)
    assert "b.png: not a readable image" in prepare(*words)
    listed, index = tmp_path / "out" / "skipped.txt", tmp_path / "out" / "index.json"
    assert "checksum" not in prepare(*words)
    listed.write_bytes(listed.read_bytes().replace(b"b.png", b"\xff.png"))
    assert f"{listed}: was changed since it was written" in prepare(*words)
    listed.unlink()
    assert f"{listed}: is missing" in prepare(*words)
    os.mkfifo(listed)
    assert f"{listed}: is no regular file" in prepare(*words)
    raw = index.read_text()
    index.write_text(raw.replace('"skipped": 1', '"skipped": 0'))
    said = prepare(*words, code=2)
    assert f"{index}: not an index of this project (its content differs from its digest)" in said


def test_a_fifo_or_a_folder_in_place_of_a_marker_or_shard_is_set_aside(unfinished):
    out, run = unfinished
    marker, shard = out / ".prepare" / "shard-000000.tar.json", out / "shard-000002.tar"
    for path in (marker, shard):
        path.unlink()
        os.mkfifo(path)
    said = run("--part", "0/2")
    assert said.count(" set aside as ") == 2
    (out / "shard-000002.tar").unlink()
    (out / "shard-000002.tar").mkdir()
    assert "shard-000002.tar.damaged-2" in run()


def test_a_shard_changed_while_others_are_packed_is_not_published(labelled, unfinished, tmp_path):
    """The bytes are read once more before the index is written."""
    out, run = unfinished
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys\nfrom pipeline import prepare\n"
        "packing = prepare.pack\n"
        "def pack(job, number, report):\n"
        "    packing(job, number, report)\n"
        "    path = job.out / 'shard-000000.tar'\n"
        "    path.write_bytes(path.read_bytes()[:-512] + b'1' * 512)\n"
        "prepare.pack = pack\n"
        "prepare.main()\n"
    )
    words = ("--size", 16, "--format", "png", "--shard-mib", 0.02, "--workers", 1)
    again = subprocess.run(
        [sys.executable, slow, labelled / "images", "--out", out, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 2, again.stderr
    assert "1 shards were changed while others were packed. Run the same command" in again.stderr
    assert not (out / "index.json").exists()
    run()
    (out / "shard-000000.tar.damaged").unlink()
    assert content(out) == content(labelled / "one")


def test_a_marker_that_cannot_be_read_is_no_damage(unfinished):
    out, run = unfinished
    marker = out / ".prepare" / "shard-000000.tar.json"
    marker.chmod(0)
    said = run(code=2, prefix=obeying_permissions())
    assert "Permission denied" in said
    assert marker.exists()
    assert not list(out.rglob("*.damaged"))


def test_two_at_once_in_one_folder_the_second_refuses(labelled, tmp_path):
    (tmp_path / ".prepare").mkdir()
    with (tmp_path / ".prepare" / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another process is writing" in prepare(
            labelled / "images", "--out", tmp_path, code=2
        )


def test_parts_at_once_write_the_bytes_of_one_command(labelled, tmp_path):
    arguments = ("--size", 16, "--format", "png", "--shard-mib", 0.02, "--workers", 1)
    out = tmp_path / "parts"

    def part(number):
        words = command(labelled / "images", "--out", out, *arguments, "--part", f"{number}/3")
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    alone = part(2)
    assert "part 2/3 is packed" in alone.communicate(timeout=60)[0]
    assert not (out / "index.json").exists()
    # What a part was writing when it was killed belongs to that part alone.
    (out / "shard-000001.tar.7.tmp").touch()
    both = [part(0), part(1)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("60 samples in" in text for text in said) >= 1, said
    assert content(out) == content(labelled / "one")
    assert "already complete" in prepare(
        labelled / "images", "--out", out, *arguments, "--part", "1/3"
    )


SLOW_TO_CLEAN_UP = """
import sys, time
from pathlib import Path
from pipeline import prepare
from pipeline.data import packing
remove, packed, others = packing._remove, *map(Path, sys.argv[1:3])
def _remove(*arguments):
    deadline = time.monotonic() + 60
    while packed.exists() and not others.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    remove(*arguments)
packing._remove = _remove
sys.argv[1:] = sys.argv[3:]
prepare.main()
"""


@pytest.mark.faults
def test_parts_that_end_together_leave_a_complete_set(labelled, tmp_path):
    """Where cleaning up is slow, as on NFS: the first to pack ends last, and writes the index."""
    arguments = ("--size", 16, "--shard-mib", 0.04, "--workers", 1)
    out, others = tmp_path / "parts", tmp_path / "others-have-ended"
    words = command(labelled / "images", "--out", out, *arguments, "--part")
    packed = out / ".prepare" / "shard-000000.tar.json"
    slow = [sys.executable, "-c", SLOW_TO_CLEAN_UP, packed, others, *words[3:], "0/2"]
    with subprocess.Popen(slow, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 60
        while not (out / ".prepare" / "shard-000002.tar.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        said = prepare(labelled / "images", "--out", out, *arguments, "--part", "1/2")
        others.touch()
        assert "60 samples in 4 shards" in first.communicate(timeout=60)[0], said
    assert "another part completes" in said
    assert read_index(str(out)).num_samples == 60


def test_a_zip_archive_gives_the_samples_of_its_folder(labelled, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted((labelled / "images").rglob("*.png")):
            out.write(path, path.relative_to(labelled))  # all below one folder, images/
        out.writestr("__MACOSX/images/x.png", b"")
    zipped, folder = (find(str(p), Choice(download=False)) for p in (archive, labelled / "images"))
    assert zipped.classes == folder.classes
    assert np.array_equal(zipped.labels, folder.labels)
    for row in (0, 59):
        from_zip = reader(zipped, Square(16, 3))(row)[0]
        assert np.array_equal(from_zip, reader(folder, Square(16, 3))(row)[0])


def test_a_source_that_goes_away_is_not_a_folder_of_damaged_images(labelled, tmp_path):
    shutil.copytree(labelled / "images", tmp_path / "images")
    source = find(str(tmp_path / "images"), Choice(download=False))
    (tmp_path / "images" / source.names[0]).unlink()
    with pytest.raises(DecodeError, match="No such file"):
        reader(source, Square(16, 3))(0)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match="the same command continues"):
        reader(source, Square(16, 3))(1)


# -- interruptions ------------------------------------------------------------------------------


def children(pid):
    return [child.pid for child in psutil.Process(pid).children()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stopped_in_the_middle(arguments, out, number):
    """Start a real prepare, signal it when one more shard is finished; (stderr, exit code)."""

    def marked():
        return len(list((out / ".prepare").glob("shard-*.json")))

    before = marked()
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while marked() <= before and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not any(map(is_running, workers)), "workers outlive the command"
    assert not (out / "index.json").exists()
    return said, process.returncode


@pytest.mark.faults
def test_killed_and_stopped_runs_continue_to_the_bytes_of_an_uninterrupted_one(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6000, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "idx", images, rng.integers(0, 10, 6000), end=".gz")
    common = (tmp_path / "idx", "--size", 64, "--format", "png", "--shard-mib", 0.4)
    out = tmp_path / "killed"

    _, code = stopped_in_the_middle((*common, "--out", out), out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    whole = sorted((out / ".prepare").glob("shard-*.json"))
    damaged = out / whole[0].name.removesuffix(".json")
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as after a power cut: packed once more
    assert "of an interrupted prepare. Run the command again" in prepare(out, code=2)
    said = prepare(*common, "--size", 32, "--out", out, code=2)
    assert "size: was 64, is now 32" in said

    said, code = stopped_in_the_middle((*common, "--out", out), out, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert said.splitlines()[-1].startswith("interrupted: finished shards are kept")
    assert not list(out.glob("*.tmp"))

    assert "shards are finished" in prepare(*common, "--out", out)
    assert "set aside as shard-" in said
    damaged.with_name(f"{damaged.name}.damaged").unlink()
    prepare(*common, "--out", tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert read_index(str(out)).shape == (64, 64, 1)


@pytest.mark.faults
def test_a_full_disk_is_one_clear_message(labelled, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = (labelled / "images", "--out", tmp_path, "--size", 64)
    said = prepare(*arguments, "--workers", 1, code=2, preexec_fn=small_files)
    assert f"--out ({tmp_path}): cannot be read or written" in said
    assert "run the same command" in said
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


# -- tars of other tools ------------------------------------------------------------------------


def foreign(folder, sizes=((24, 24),), n=20, mtime=None):
    """Two tars of JPEG and cls as plain webdataset writes them; the encoded images by key."""
    folder.mkdir()
    images = {}
    for k in range(2):
        samples = []
        for i in range(n):
            out = io.BytesIO()
            Image.fromarray(noise(*sizes[i % len(sizes)], 3, seed=100 * k + i)).save(out, "JPEG")
            images[f"{k}-{i}"] = out.getvalue()
            samples.append({"__key__": f"{k}-{i}", "jpg": out.getvalue(), "cls": i % 10})
        write_tar(folder / f"part-{k}.tar", samples, mtime)
    return images


def test_tars_of_another_tool_are_indexed_where_they_lie(tmp_path):
    images = foreign(tmp_path / "tars")
    before = content(tmp_path / "tars")
    assert "indexed 40 samples in 2 shards, 24x24x3 jpg" in prepare(tmp_path / "tars")
    assert {k: v for k, v in content(tmp_path / "tars").items() if k in before} == before
    index = read_index(str(tmp_path / "tars"))
    out = np.zeros((40, *index.shape), np.uint8)
    labels = Reader(index, Cache(index, "")).read(np.arange(40), out)
    assert labels.tolist() == [i % 10 for i in range(20)] * 2
    for pixels, raw in zip(out, images.values(), strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(raw))))
    out_again = ("--out", tmp_path / "tars")
    assert "already complete" in prepare(tmp_path / "tars", *out_again)
    assert "ok: 40 samples" in prepare("--verify", tmp_path / "tars")


def test_tars_of_several_sizes_are_refused_with_the_way_out(tmp_path):
    images = foreign(tmp_path / "tars", sizes=((24, 24), (16, 32)))
    said = prepare(tmp_path / "tars", code=2)
    assert "20 of 24 x 24" in said
    assert "20 of 16 x 32" in said
    assert "--out OTHER --size 64" in said
    source = find(str(tmp_path / "tars"), Choice(download=False))
    assert source.labels.tolist() == [i % 10 for i in range(20)] * 2
    pixels, _ = reader(source, Square(8, 3))(1)
    with Image.open(io.BytesIO(list(images.values())[1])) as image:
        assert np.array_equal(pixels, Square(8, 3).of(image)[0])


@pytest.mark.parametrize("mtime", [None, 0])
@pytest.mark.parametrize("cut", ["in a member", "between members", "in a header"])
def test_a_truncated_tar_is_never_indexed_as_a_short_one(tmp_path, cut, mtime):
    """Without pax headers Python's tarfile takes two of these cuts for the end of the archive."""
    foreign(tmp_path / "tars", mtime=mtime)
    path = tmp_path / "tars" / "part-1.tar"
    offset = int(scan(path)[1]["offset"][10])
    at = {"in a member": offset + 99, "between members": offset - 512, "in a header": offset - 99}
    os.truncate(path, at[cut])
    said = prepare(tmp_path / "tars", code=2)
    assert "part-1.tar: truncated" in said
    assert not (tmp_path / "tars" / "index.json").exists()


# -- verify -------------------------------------------------------------------------------------


def test_verify_lists_every_fault_and_never_stops_at_the_first(labelled, tmp_path):
    shutil.copytree(labelled / "one", tmp_path / "bad")
    said = prepare("--verify", tmp_path / "bad")
    assert "ok: 60 samples" in said
    assert "16x16x3 png, labels 0 to 2" in said
    index = read_index(str(tmp_path / "bad"))
    flipped, cut, missing = (tmp_path / "bad" / index.shards[k].url for k in (0, 1, 2))
    row = index.table[3]
    with flipped.open("r+b") as file:
        file.seek(int(row["offset"]) + 200)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte[0] ^ 1,)))
    os.truncate(cut, cut.stat().st_size // 2)
    missing.unlink()
    said = prepare("--verify", tmp_path / "bad", code=2)
    assert f"{flipped}: its checksum is" in said
    assert f"at offset {row['offset']}: not a readable PNG" in said
    assert f"{cut}: its last" in said
    assert "truncated" in said
    assert f"{missing}: missing" in said
    assert f"3 of {len(index.shards)} shards damaged" in said


def test_verify_judges_the_tars_when_the_index_itself_is_damaged(labelled, tmp_path):
    shutil.copytree(labelled / "one", tmp_path / "bad")
    table = tmp_path / "bad" / "index.json.samples.npy"
    table.write_bytes(table.read_bytes()[:-1] + b"\x07")
    with (tmp_path / "bad" / "shard-000001.tar").open("r+b") as file:
        file.truncate(2000)
    said = prepare("--verify", tmp_path / "bad", code=2)
    assert "index.json.samples.npy: damaged" in said
    assert "shard-000001.tar" in said


# -- refusals and fashion-mnist -----------------------------------------------------------------


def test_sources_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    out = ("--out", tmp_path / "out")
    assert "found: no files" in prepare(tmp_path / "empty", *out, code=2)
    assert "found: 1 .txt" in prepare(tmp_path / "texts", *out, code=2)
    assert "no such folder" in prepare(tmp_path / "nowhere", *out, code=2)
    assert "--out: is missing" in prepare(tmp_path / "texts", code=2)
    assert not (tmp_path / "out").exists()


def test_a_folder_where_no_image_can_be_read_is_an_error(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"x")
    said = prepare(tmp_path / "bad", "--out", tmp_path / "out", code=2)
    assert "none of its 3 images can be read" in said
    assert "not an image of a known format" in said
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "--size", "0"), "--size: 0: must be a whole number from 8 to 256"),
        (("x", "--background", "whit"), "--background (whit): must be a colour"),
        (("x", "--workers", "0"), "--workers: 0: must be a whole number"),
        (("x", "--part", "3/3"), "--part: 3/3: must be I/N"),
        ((), "give either SOURCE"),
        (("--verify", "nowhere"), "no such folder"),
    ],
)
def test_impossible_options_are_refused(arguments, said):
    assert said in prepare(*arguments, code=2)


def test_fashion_mnist_missing_everywhere_names_all_three_ways(tmp_path):
    empty = {"FASHION_MNIST_FOLDER": str(tmp_path), "FASHION_MNIST_CACHE": str(tmp_path)}
    arguments = ("fashion-mnist", "--out", tmp_path / "out", "--no-download")
    said = prepare(*arguments, code=2, env=os.environ | empty)
    for way in ("--idx FOLDER", "apt-get install dataset-fashion-mnist", "torchvision"):
        assert way in said


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_read_and_their_labels_kept(tmp_path, end):
    images = noise(5, 28, 28)
    write_idx(tmp_path, images, np.arange(5), end)
    for name, idx in ((str(tmp_path), None), ("fashion-mnist", str(tmp_path))):
        source = find(name, Choice(idx=idx, download=False))
        assert source.labels.tolist() == [0, 1, 2, 3, 4]
        pixels_of = reader(source, Square(28, 1))
        assert all(np.array_equal(pixels_of(i)[0][:, :, 0], images[i]) for i in range(5))


def test_idx_files_that_lie_about_their_length_are_refused(tmp_path):
    write_idx(tmp_path, noise(5, 28, 28), np.arange(5))
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for raw in (whole[:-1], whole + b"\0", whole[:7], b"\0\0\x0b" + whole[3:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="IDX header"):
            find(str(tmp_path), Choice(download=False))
    write_idx(tmp_path, noise(5, 28, 28), np.arange(4))
    with pytest.raises(DataError, match="5 images and 4 labels"):
        find(str(tmp_path), Choice(download=False))


def test_the_index_records_how_the_images_were_made(labelled):
    made_by = json.loads((labelled / "one" / "index.json").read_text())["made_by"]
    wanted = ("source", "crop", "filter", "background", "pillow", "seed", "version", "format")
    assert all(key in made_by for key in wanted)

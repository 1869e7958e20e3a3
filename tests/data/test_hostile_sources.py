"""Sources from outside that may be anything: bombs, devices, lies in headers, names with escapes.

Each bad image is a line in skipped.txt. An error of the system is none: it ends the command.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from launching import REPO, environment
from PIL import Image

from pipeline.data import folders, idx_files, pictures, source_files
from pipeline.data.codecs import decoder, npy_image, read_npy, shape_of
from pipeline.data.pictures import DecodeError, Pixels
from pipeline.data.shards import read_index
from pipeline.data.source import Choice, Source
from pipeline.data.sources import find, reader
from pipeline.data.squares import Square
from pipeline.runtime.errors import DataError

WHITE = (255, 255, 255)
MOST_KB = 1_500_000
"""Memory of a command that refuses bombs: torch and the decoders alone take a third of it."""


def prepare(*words: object, code: int = 0, prefix: tuple[str, ...] = ()) -> str:
    """Run the real command; returns what it prints, after a check of exit code and memory."""
    program = (
        "import resource, runpy, sys\n"
        "try:\n    runpy.run_module('pipeline.prepare', run_name='__main__')\n"
        "finally:\n"
        "    most = [resource.getrusage(who).ru_maxrss for who in (0, resource.RUSAGE_CHILDREN)]\n"
        "    print('peak', max(most), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program, *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        timeout=120,
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    assert int(said.rpartition("peak ")[2]) < MOST_KB
    assert "\x1b" not in said
    return said


def skipped(out: Path) -> dict[str, str]:
    """{name: reason} of the images that could not be read."""
    raw = (out / "skipped.txt").read_bytes()
    assert b"\x1b" not in raw
    return dict(line.split("\t") for line in raw.decode().splitlines())  # type: ignore[misc]


def found_in(location: Path) -> Source:
    return find(str(location), Choice(download=False))


def read_of(source: Source) -> Callable[[int], tuple[Pixels, list[str]]]:
    return reader(source, Square(8, 3))


def good_png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (255, 0, 0)).save(out, "PNG")
    return out.getvalue()


# -- headers that lie, written byte by byte -----------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", data or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def webp(width: int, height: int) -> bytes:
    """A valid lossless file of one colour: its pixels take no bits at all."""
    bits = "".join(f"{n - 1:014b}"[::-1] for n in (width, height)) + "0000" + "000" + "1000" * 5
    packed = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8) + 8, "little")
    content = b"\x2f" + packed
    content += b"\0" * (len(content) % 2)
    chunk = b"VP8L" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def gif(width: int, height: int) -> bytes:
    """A small screen whose first frame is huge."""
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02\x44\x01\0;"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + frame


def tga(width: int, height: int) -> bytes:
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, width, height, 24, 0) + bytes(99)


def tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 278: height, 279: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def jpeg(width: int, height: int) -> bytes:
    """A real file whose frame header says another size."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    raw, at = out.getvalue(), out.getvalue().index(b"\xff\xc0")
    return raw[: at + 5] + struct.pack(">HH", height, width) + raw[at + 9 :]


BOMBS = {
    "13000.webp": (webp(13_000, 13_000), "has 13000 x 13000 pixels"),
    "wide.png": (png(2**31 - 1, 1), "pixels"),
    "square.png": (png(60_000, 60_000), "pixels"),
    "allowed by pillow.png": (png(12_000, 12_000), "has 12000 x 12000 pixels"),
    "big.bmp": (bmp(40_000, 40_000), "pixels"),
    "big.gif": (gif(65_535, 65_535), "pixels"),
    "big.tga": (tga(65_535, 65_535), "pixels"),
    "big.tif": (tiff(50_000, 50_000), "pixels"),
    "big.jpg": (jpeg(65_500, 65_500), "pixels"),
    "big.ppm": (b"P6 50000 50000 255\n", "pixels"),
    "empty.ppm": (b"P6 0 0 255\n", ""),
    "endless.ppm": (b"P6 " + b"1" * 5000 + b" 1 255\n", ""),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
    "drawing.png": (b"<svg width='9' height='9'/>", "known format"),
    "openexr.png": (b"v/1\x01\x02\0\0\0" + bytes(99), "known format"),
    "nothing.png": (b"", "known format"),
}


def test_a_webp_of_no_bits_per_pixel_is_a_valid_image() -> None:
    """So that the large one is refused for its size alone."""
    with pictures.open_pillow(memoryview(webp(300, 200))) as image:
        assert Square(8, 3).of(image)[0].shape == (8, 8, 3)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0"}])
@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 300)])
def test_the_size_of_a_webp_is_read_from_its_header(
    size: tuple[int, int], options: dict[str, object]
) -> None:
    """Before Pillow's plugin, which makes room for its pixels at once."""
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "WEBP", **options)
    assert pictures._webp_size(memoryview(out.getvalue())) == size


def test_bombs_devices_and_lies_in_a_folder_are_lines_of_skipped_txt(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.png").write_bytes(good_png())
    for name, (raw, _) in BOMBS.items():
        (source / name).write_bytes(raw)
    os.mkfifo(source / "fifo.png")
    (source / "zero.png").symlink_to("/dev/zero")
    (source / "random.jpg").symlink_to("/dev/urandom")
    (source / "terminal.gif").symlink_to("/dev/tty")
    (source / "loop.png").symlink_to(source / "loop.png")
    (source / "endless.png").symlink_to("/proc/kcore")
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (source / "folder.png").mkdir()
    (source / "folder.png" / "b.png").write_bytes(good_png())
    (tmp_path / "elsewhere.png").write_bytes(good_png())
    (source / "link.png").symlink_to(tmp_path / "elsewhere.png")
    with (source / "sparse.png").open("wb") as file:
        file.truncate(64 << 30)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(source / "socket.png"))
    for name in (b"\x1b[31mred\n\xff.png", "‮gnp.png".encode(), b"\x1b]0;title\x07.\x1b[2J"):
        (source / os.fsdecode(name)).write_bytes(b"hello")

    said = prepare(source, "--out", out, "--size", 8, "--workers", 2)
    bad = skipped(out)
    for name, (_, why) in BOMBS.items():
        assert why in bad.pop(name), name
    for name in ("fifo.png", "zero.png", "random.jpg", "terminal.gif", "socket.png"):
        assert bad.pop(name) == "is no regular file"
    assert "symbolic links" in bad.pop("loop.png")
    assert f"at most {source_files.LARGEST_FILE}" in bad.pop("sparse.png")
    assert bad.pop("gone.png") == "No such file or directory"
    bad.pop("endless.png", None)
    assert list(bad) == ["\\x1b[31mred\\x0a\\udcff.png", "\\u202egnp.png"]
    assert "\\x1b[2j" in said  # the extension of a file that is no image
    assert read_index(str(out)).num_samples == 3


def test_a_folder_without_an_image_says_what_it_holds_on_one_line(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"x.\x1b[2J{number}").write_text("")
    (tmp_path / f"y.{'long' * 50}").write_text("")
    with pytest.raises(DataError, match=r"holds no images \(found: .*1 .\\x1b\[2j") as caught:
        found_in(tmp_path)
    assert len(str(caught.value)) < 1000


def test_deep_folders_are_listed_and_links_in_circles_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, deep = Path.cwd(), tmp_path / "deep"
    deep.mkdir()
    try:
        os.chdir(deep)
        for _ in range(1500):  # deeper than Python calls functions
            Path("a").mkdir()
            os.chdir("a")
        Path("x.png").write_bytes(good_png())
        source = found_in(deep)
        assert len(source.names) == 1
        assert read_of(source)(0)[0].shape == (8, 8, 3)
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", deep], check=True)  # pytest would recurse as deep

    monkeypatch.setattr(folders, "MOST_FOLDERS", 1000)
    knot = tmp_path / "knot"
    for name in "abcdefgh":  # 8! ways through them
        (knot / name).mkdir(parents=True)
        for other in "abcdefgh":
            (knot / name / f"to {other}").symlink_to(knot / other)
    with pytest.raises(DataError, match="has more than 1000 folders; links may lead"):
        found_in(knot)


# -- zip archives -------------------------------------------------------------------------------


def test_bombs_and_odd_members_of_a_zip_are_lines_of_skipped_txt(tmp_path: Path) -> None:
    path, out = tmp_path / "x.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", good_png())
        archive.writestr("stored.png", good_png(), zipfile.ZIP_STORED)
        with archive.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(272):
                member.write(bytes(1 << 20))
        archive.writestr("bzip2.png", good_png(), zipfile.ZIP_BZIP2)
        archive.writestr("lzma.png", good_png(), zipfile.ZIP_LZMA)
        archive.writestr("flipped.png", good_png(), zipfile.ZIP_STORED)
        archive.writestr("\x1b[31mred\n.png", b"hello")
        archive.writestr("huge.webp", webp(13_000, 13_000))
        archive.writestr("/absolute.png", good_png())
        archive.writestr("../above.png", good_png())  # hidden, as names with a dot are
        archive.writestr("lies.png", bytes(5 << 20))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", good_png())
    raw = bytearray(path.read_bytes())
    at = raw.index(b"flipped.png") + 20
    raw[at + len(good_png()) // 2] ^= 1
    at = raw.rindex(b"lies.png") - 46  # its entry in the directory
    raw[at + 24 : at + 28] = struct.pack("<I", 100)  # unpacks to 5 MiB, says 100 bytes
    path.write_bytes(raw)

    said = prepare(path, "--out", out, "--size", 8)
    assert "7 images cannot be read" in said
    bad = skipped(out)
    assert f"at most {source_files.LARGEST_FILE} are read" in bad.pop("bomb.png")
    assert "unpack the archive first" in bad.pop("bzip2.png")
    assert "unpack the archive first" in bad.pop("lzma.png")
    assert "CRC" in bad.pop("flipped.png")
    assert "CRC" in bad.pop("lies.png")
    assert "has 13000 x 13000 pixels" in bad.pop("huge.webp")
    assert list(bad) == ["\\x1b[31mred\\x0a.png"]
    assert read_index(str(out)).num_samples == 4  # a.png twice
    assert "1 files have the name of another in the archive" in said
    assert not (tmp_path / "above.png").exists()


def test_an_encrypted_member_is_one_message_also_if_the_directory_denies_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", good_png())
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="encrypted; unpack it into a folder first"):
        found_in(path)


def test_every_mutation_of_a_zip_is_a_message_or_a_skipped_image(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b/c.png", "ä.png"):
            archive.writestr(name, good_png())
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    outcomes = set()
    for _ in range(600):
        raw = bytearray(whole)
        for at in rng.integers(
            directory if rng.random() < 0.7 else 0, len(raw), rng.integers(1, 4)
        ):
            raw[at] = rng.integers(256)
        path.write_bytes(raw[: rng.integers(len(raw)) if rng.random() < 0.1 else None])
        try:
            source = found_in(path)
            read = read_of(source)
        except DataError:
            outcomes.add("refused")
            continue
        for row in range(len(source.names)):
            try:
                read(row)
                outcomes.add("read")
            except DecodeError:
                outcomes.add("skipped")
            except DataError:
                outcomes.add("gone")
    assert {"refused", "read", "skipped"} <= outcomes


def test_a_zip_that_changes_after_it_was_listed_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", good_png())
    source = found_in(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.png", good_png())
    with pytest.raises(DataError, match=r"a\.png: cannot be read .* the archive was changed"):
        read_of(source)(0)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="the archive was changed: not a readable zip archive"):
        read_of(source)(0)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_of(source)(0)
    os.mkfifo(path)
    with pytest.raises(DataError, match="is no regular file"):
        read_of(source)(0)
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        found_in(path)


# -- IDX files ----------------------------------------------------------------------------------


def idx(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def packed(head: bytes, size: int) -> bytes:
    """A gzip file of a header and ``size`` zeros, made without holding them."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [squeeze.compress(head)]
    for start in range(0, size, 1 << 20):
        pieces.append(squeeze.compress(bytes(min(1 << 20, size - start))))
    return b"".join([*pieces, squeeze.flush()])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (packed(idx(2, 8, 8), 600 << 20), "do not fit an IDX header"),
        (packed(idx(*[2**32 - 1] * 3), 1000), f"at most {idx_files.LARGEST_IDX} are read"),
        (packed(idx(2**31, 2, 2**31), 1000), f"at most {idx_files.LARGEST_IDX} are read"),
        (packed(idx(2, 8, 8), 128)[:-9], "cannot be read"),
        (packed(idx(2, 8, 8), 128)[:-5] + b"12345", "cannot be read"),
        (gzip.compress(b"", mtime=0), "do not fit an IDX header"),
        (b"\x1f\x8b" + bytes(50), "cannot be read"),
        (bz2.compress(bytes(99)), "cannot be read"),
    ],
)
def test_idx_files_that_unpack_to_more_than_they_say_are_one_message(
    tmp_path: Path, raw: bytes, why: str
) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(2) + bytes(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=why):
        found_in(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000


# -- npy images in tars -------------------------------------------------------------------------


def npy(header: str, content: bytes = bytes(48), version: int = 1) -> bytes:
    text = header.encode("latin1") + b"\n"
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
        + content
    )


def described(shape: object, dtype: str = "'|u1'", order: bool = False) -> str:
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"


NPY = {
    "huge": npy(described((10**9, 10**9, 3))),
    "beyond 64 bits": npy(described((2**62, 2**62))),
    "negative": npy(described((-4, -4, 3))),
    "no numbers": npy(described("('a', 4)")),
    "objects": npy(described((4, 4, 3), "'|O'")),
    "structure": npy(described((4, 4), "[('a', '|u1'), ('b', '|O')]")),
    "wide": npy(described((3,), "'<f8'"), bytes(24)),
    "one axis": npy(described((48,))),
    "four axes": npy(described((1, 4, 4, 3))),
    "empty": npy(described((0, 4, 3)), b""),
    "seven channels": npy(described((1, 1, 48))),
    "nested": npy("(" * 5000),
    "minus": npy("-" * 9000 + "1"),
    "code": npy("__import__('os').system('touch /tmp/never')"),
    "long": npy(described((4, 4, 3)) + " " * 60_000),
    "version 9": npy(described((4, 4, 3)), version=9),
    "cut": npy(described((4, 4, 3)))[:40],
    "short": npy(described((4, 4, 3)), bytes(47)),
    "longer": npy(described((4, 4, 3)), bytes(49)),
    "header length": b"\x93NUMPY\x02\0\xff\xff\xff\xff" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("name", NPY)
def test_hostile_npy_is_a_decode_error_before_anything_is_allocated(name: str) -> None:
    for read in (npy_image, lambda raw: shape_of(raw, "npy"), decode_as_4x4):
        if name == "empty" and read is decode_as_4x4:
            continue
        with pytest.raises(DecodeError):
            read(memoryview(NPY[name]))


def decode_as_4x4(raw: memoryview) -> None:
    decoder("npy", (4, 4, 3))(raw, np.empty((4, 4, 3), np.uint8))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_npy_images_of_other_tools_are_read(shape: tuple[int, ...], order: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    out = io.BytesIO()
    np.save(out, np.asfortranarray(array) if order else array)
    raw = memoryview(out.getvalue())
    assert np.array_equal(read_npy(raw), array)
    assert np.asarray(npy_image(raw)).size == array.size


def test_hostile_members_of_tars_are_lines_of_skipped_txt(tmp_path: Path) -> None:
    """Tars that GNU tar packs, as another tool's, to be made smaller."""
    if not shutil.which("tar"):
        pytest.skip("needs tar")
    parts = tmp_path / "parts"
    parts.mkdir()
    good = io.BytesIO()
    np.save(good, np.zeros((9, 9, 3), np.uint8))
    (parts / "aaa.npy").write_bytes(good.getvalue())
    for name, raw in NPY.items():
        (parts / f"{name}.npy").write_bytes(raw)
    (tmp_path / "tars").mkdir()
    subprocess.run(
        [
            "tar",
            "--format=gnu",
            "-cf",
            tmp_path / "tars" / "x.tar",
            "--sort=name",
            "-C",
            parts,
            ".",
        ],
        check=True,
    )
    said = prepare(tmp_path / "tars", "--out", tmp_path / "out", "--size", 8)
    assert f"{len(NPY)} images cannot be read" in said
    assert read_index(str(tmp_path / "out")).num_samples == 1


def test_a_png_in_a_shard_is_not_decoded_if_its_header_says_another_size() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = png(9_000, 9_000, zlib.compress(bytes(9_000 * 27_001)))
    with pytest.raises(
        DecodeError, match=r"has shape \(9000, 9000, 3\), the index says \(8, 8, 3\)"
    ):
        decoder("png", (8, 8, 3))(memoryview(bomb), np.empty((8, 8, 3), np.uint8))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600_000  # of which this test's own 243 MB


# -- errors of the system -----------------------------------------------------------------------


@pytest.fixture
def no_more_files() -> Iterator[Callable[[], None]]:
    """A function after which this process can open no more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", ["folder", "zip", "tars", "listed"])
def test_too_many_open_files_is_never_a_damaged_image(
    kind: str, tmp_path: Path, no_more_files: Callable[[], None]
) -> None:
    location = tmp_path / "source"
    location.mkdir()
    (location / "a.png").write_bytes(good_png())
    if kind == "zip":
        location = tmp_path / "x.zip"
        with zipfile.ZipFile(location, "w") as archive:
            archive.writestr("a.png", good_png())
    if kind == "tars":
        with tarfile.open(location / "x.tar", "w") as tar:
            tar.add(location / "a.png", "a.png")
    source = found_in(location)
    read = read_of(source)
    no_more_files()
    if kind == "listed":
        with pytest.raises(OSError, match="Too many open files"):
            found_in(location)
        return
    with pytest.raises(DataError, match=r"Too many open files: open files are limited to .*ulimit"):
        read(0)


def test_a_plugin_that_cannot_be_loaded_is_no_unknown_format() -> None:
    """Pillow loads its plugins when it first meets an unusual format: with no file left to open."""
    code = (
        "import io, os, resource, sys\n"
        "from pipeline.data import pictures\n"
        "free = os.open('/dev/null', 0); os.close(free)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))\n"
        "try:\n"
        "    with pictures.open_pillow(memoryview(bytes.fromhex(sys.argv[1]))) as image:\n"
        "        image.load()\n"
        "except pictures.DecodeError as error: print('damaged', error)\n"
        "except (OSError, ImportError) as error: print('system', error)\n"
    )
    words = [sys.executable, "-c", code, webp(16, 16).hex()]
    done = subprocess.run(words, env=environment() | {"PYTHONPATH": str(REPO)}, capture_output=True)
    assert b"damaged" not in done.stdout, done.stdout


@pytest.mark.parametrize(("size", "kind"), [(4000, "webp"), (4000, "png"), (9, "damaged")])
def test_too_little_memory_is_never_a_damaged_image(size: int, kind: str) -> None:
    """Some decoders report a failed allocation like damage."""
    code = (
        "import io, resource, sys\n"
        "from PIL import Image\n"
        "from pipeline.data import pictures\nfrom pipeline.data.squares import Square\n"
        "Image.init()\n"
        "raw = memoryview(bytes.fromhex(sys.stdin.read()))\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]),) * 2)\n"
        "try:\n"
        "    with pictures.open_pillow(raw) as image: Square(8, 3).of(image)\n"
        "except pictures.DecodeError as error: print('damaged', error)\n"
        "except MemoryError: print('memory')\n"
        "else: print('read')\n"
    )
    raw = {"webp": webp(size, size), "png": png(size, size), "damaged": b"hello"}[kind]
    for extra in (2 << 20, 40 << 20):
        done = subprocess.run(
            [sys.executable, "-c", code, str(extra)],
            input=raw.hex(),
            env=environment() | {"PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        wanted = "damaged" if (size, extra) == (9, 40 << 20) else "memory"
        assert done.stdout.startswith(wanted), (extra, done.stdout, done.stderr)


def test_a_file_that_may_not_be_read_ends_the_command(tmp_path: Path) -> None:
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read anything, and there is no setpriv")
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.png").write_bytes(good_png())
    (source / "b.png").chmod(0)
    said = prepare(source, "--out", out, "--size", 8, code=2, prefix=prefix)
    assert "b.png: cannot be read from" in said
    assert "Permission denied: Give permission, then run the same command again" in said
    assert not (out / "skipped.txt").exists()
    assert not (out / "index.json").exists()
    (source / "b.png").chmod(0o600)
    prepare(source, "--out", out, "--size", 8, prefix=prefix)
    assert read_index(str(out)).num_samples == 2


def test_an_input_output_error_ends_the_command(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.png").write_bytes(good_png())
    (source / "b.png").symlink_to("/proc/self/mem")  # a regular file whose first byte is none
    said = prepare(source, "--out", out, "--size", 8, code=2)
    assert "b.png: cannot be read from" in said
    assert "Input/output error" in said
    assert not (out / "skipped.txt").exists()


def test_a_converted_image_does_not_depend_on_the_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images are converted some rows at a time, with the same pixels."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (50, 40, 4), np.uint8)),
        Image.fromarray(rng.integers(0, 256, (50, 40, 2), np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (50, 40), np.uint16)),
    ]
    palette = Image.fromarray(rng.integers(0, 256, (50, 40), np.uint8)).convert("P")
    palette.info["transparency"] = 7
    for image in [*images, palette]:
        for channels in (1, 3):
            monkeypatch.setattr(pictures, "BAND_PIXELS", 1 << 22)
            whole = np.asarray(pictures.flatten(image, channels, (1, 200, 99)))
            monkeypatch.setattr(pictures, "BAND_PIXELS", 130)
            assert np.array_equal(pictures.flatten(image, channels, (1, 200, 99)), whole)

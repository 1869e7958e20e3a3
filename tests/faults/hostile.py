"""Files that somebody made to do harm, given to the command that reads them."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from base import SECRET_NAME, Case, Verdict
from mutations import fields
from PIL import Image
from world import World

from pipeline.runtime.documents import CHECK, DIGEST, row_line, sealed

Make = Callable[[Path], object]
BOMB = 3 << 30
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def cases(world: World) -> Iterator[Case]:
    for harm, (make, names, commands) in {**ARCHIVES, **PICTURES, **CONFIGS, **WEIGHTS}.items():
        for command in commands.split():
            kind = harm.partition(":")[0]
            yield Case("hostile", kind, f"{harm}:{command}", partial(run, make, names, command))
    for file, commands in DOCUMENTS.items():
        path = world.saved / file
        lines = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
        count = sum(1 for _ in fields(json.loads(lines[-1])))
        for place in range(0, count, max(1, count // 12)):
            for value in range(len(VALUES)):
                for command in commands.split():
                    name = f"signed:{file}:{place}:{value}:{command}"
                    make = partial(forge, file, place, value)
                    yield Case("hostile", "signed", name, partial(run, make, [path.name], command))


def run(make: Make, names: list[str], command: str, world: World, _: Random) -> Verdict:
    """Run a command on a hostile file; what is signed and can be believed may be believed."""
    world.baseline(command)
    world.restore()
    began = time.time()
    more = make(world.at)
    found = world.judge(
        command,
        [*names, *(more if isinstance(more, list) else [])],
        world.start(command).wait(),
        began,
    )
    return Verdict("harmless", f"believed: {found.detail}") if found.kind == "silent" else found


# -- archives -------------------------------------------------------------------------------------


def header(name: str = "a.npy", size: bytes = b"%011o\0" % 10, kind: bytes = b"0") -> bytes:
    """Return a tar header with any bytes as size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar(content: bytes | Callable[[], bytes]) -> Make:
    def make(at: Path) -> None:
        data = content() if callable(content) else content
        (at / "tars_in" / "shard-000001.tar").write_bytes(data + bytes(1024))

    return make


def member(name: str, data: bytes) -> bytes:
    return header(name, b"%011o\0" % len(data)) + data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header("x", b"%011o\0" % len(records), kind) + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def npy(head: bytes | str, body: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    head = head.encode() if isinstance(head, str) else head
    count = len(head) if length is None else length
    size = struct.pack("<H", min(count, 65535)) if version == 1 else struct.pack("<I", count)
    return b"\x93NUMPY" + bytes([version, 0]) + size + head + body


def shape(text: str, descr: str = "'|u1'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {text}, }}\n"


SMALL = npy(shape("(16, 16, 1)"), bytes(256))
NPY = {
    "huge shape": npy(shape("(1000000000, 1000000000, 3)")),
    "negative shape": npy(shape("(-16, 16, 1)"), bytes(256)),
    "brackets": npy(shape("(" * 9000 + ")" * 9000)),
    "long header": npy("{" + " " * 60000),
    "header of 4 GB": npy(shape("(1,)"), version=2, length=2**32 - 1),
    "objects": npy(shape("(1,)", "'|O'"), pickle.dumps(print)),
    "other type": npy(shape("(16, 16, 1)", "'<f8'"), bytes(2048)),
    "structure": npy(shape("(1,)", "[('a', [('b', '<i4')] * 9)]"), bytes(64)),
    "power": npy(shape("(9**9**9,)")),
    "no bytes": b"",
    "version 9": npy(shape("(16, 16, 1)"), bytes(256), version=9),
    "binary header": npy(os.urandom(100)),
}
TARS: dict[str, bytes | Callable[[], bytes]] = {
    "pax size": pax(record(b"size", b"9" * 40)) + member("a.npy", SMALL),
    "pax size negative": pax(record(b"size", b"-1024")) + member("a.npy", SMALL),
    "pax size of text": pax(record(b"size", b"many")) + member("a.npy", SMALL),
    "pax length": pax(b"99999999999999 a=b\n") + member("a.npy", SMALL),
    "pax without =": pax(b"7 path\n") + member("a.npy", SMALL),
    "pax NUL": pax(record(b"path", b"a\0b.npy")) + member("a.npy", SMALL),
    "pax escape": pax(record(b"path", ESCAPE.encode() + b".npy")) + member("a.npy", b"x"),
    "pax up": pax(record(b"path", b"../../../up.npy")) + member("a.npy", SMALL),
    "pax global": pax(record(b"size", b"9" * 30), b"g") + member("a.npy", SMALL),
    "pax charset": pax(record(b"hdrcharset", b"rot13") + record(b"path", b"\xff\xfe")),
    "pax sparse": pax(record(b"GNU.sparse.map", b"0,9999999999999,5")) + member("a.npy", SMALL),
    "20,000 pax headers": lambda: pax(record(b"path", b"a.npy")) * 20_000 + member("a.npy", SMALL),
    "20,000 long names": lambda: pax(b"n" * 100, b"L") * 20_000 + member("a.npy", SMALL),
    "20,000 long links": lambda: pax(b"n" * 100, b"K") * 20_000 + member("a.npy", SMALL),
    "base-256 size": header(size=b"\x80" + b"\x7f" * 11),
    "base-256 negative": header(size=b"\xff" * 12),
    "size of letters": header(size=b"zzzzzzzzzzz\0"),
    "size beyond the end": header(size=b"77777777777\0"),
    "old sparse": header(kind=b"S") + bytes(512),
    "escape in a name": member(f"{ESCAPE}.npy", b"x"),
    "absolute": member("/etc/a.npy", SMALL),
    "label of 5,000 digits": member("a.npy", SMALL) + member("a.cls", b"9" * 5000),
    "negative label": member("a.npy", SMALL) + member("a.cls", b"-9"),
    "label of text": member("a.npy", SMALL) + member("a.cls", b"\x1b[31m"),
    "two of one name": member("a.npy", SMALL) * 2,
    "link member": header("a.npy", b"%011o\0" % 0, b"2"),
    "no tar": b"\0" * 700 + b"x" * 3000,
    "nothing": b"",
    **{f"npy, {name}": member("a.npy", data) for name, data in NPY.items()},
    "png for npy": member("a.npy", b"\x89PNG\r\n\x1a\n"),
    "large png": lambda: member("a.png", large_png(30_000)),
}


def special(target: str, kind: str) -> Make:
    """Put something in the place of a file that is no regular file."""

    def make(at: Path) -> None:
        path = at / target
        if path.exists():
            path.unlink()
        path.parent.mkdir(exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "circle":
            path.symlink_to(path.name)
        else:
            path.symlink_to(kind)

    return make


SPECIAL = (
    "fifo",
    "directory",
    "circle",
    "/dev/zero",
    "/dev/random",
    "/proc/self/mem",
    "/dev/stdin",
)


def zip_with(name: str, data: bytes, **attributes: Any) -> Make:
    def make(at: Path) -> None:
        with zipfile.ZipFile(at / "source.zip", "a") as archive:
            entry = zipfile.ZipInfo(name)
            archive.writestr(entry, data)
            for key, value in attributes.items():
                setattr(entry, key, value)

    return make


def zip_bomb(at: Path) -> None:
    """Add a member of 3 GB of zeros, which is 3 MB of deflate."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    once = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    data = head + once * ((BOMB >> 20) - 1) + squeeze.flush()
    path = at / "source.zip"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo("class0/bomb.png"), data)
    content = path.read_bytes()
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        at_ = content.rfind(signature)
        sizes = struct.pack("<III", 0, len(data), BOMB)
        content = content[: at_ + place] + b"\x08\0" + content[at_ + place + 2 :]
        content = content[: at_ + place + 6] + sizes + content[at_ + place + 18 :]
    path.write_bytes(content)


ARCHIVES: dict[str, tuple[Make, list[str], str]] = {
    **{
        f"tar: {name}": (tar(data), ["shard-000001"], "prepare-tars index-tars")
        for name, data in TARS.items()
    },
    **{
        f"tar: {kind}": (special("tars_in/shard-000001.tar", kind), ["shard-000001"], "index-tars")
        for kind in SPECIAL
    },
    **{
        f"zip: {kind}": (special("source.zip", kind), ["source.zip"], "prepare-zip")
        for kind in SPECIAL
    },
    "zip: bomb": (zip_bomb, ["bomb.png"], "prepare-zip"),
    "zip: escape": (zip_with(f"class0/{ESCAPE}.png", b"x"), ["owned"], "prepare-zip"),
    "zip: up": (zip_with("../../up.png", b"x"), ["up.png"], "prepare-zip"),
    "zip: NUL": (zip_with("class0/a\0.png", b"x"), ["a"], "prepare-zip"),
    "zip: encrypted": (zip_with("class0/a.png", b"x", flag_bits=1), ["source.zip"], "prepare-zip"),
    "zip: method": (zip_with("class0/a.png", b"x", compress_type=99), ["a.png"], "prepare-zip"),
    "zip: offset": (zip_with("class0/a.png", b"x", header_offset=10**9), ["zip"], "prepare-zip"),
    "zip: size": (zip_with("class0/a.png", b"x", file_size=10**11), ["zip"], "prepare-zip"),
    "zip: extra": (zip_with("class0/a.png", b"x", extra=b"\1\0\xff\xff"), ["zip"], "prepare-zip"),
}


# -- pictures -------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, colour: int = 0, pixels: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    body = chunk(b"IDAT", pixels or zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def large_png(side: int) -> bytes:
    """Return a true RGBA picture of zeros, which is a thousandth of its size as a file."""
    squeeze = zlib.compressobj(1)
    row, parts = bytes(4 * side + 1), []
    parts = [squeeze.compress(row) for _ in range(min(side, 4000))] + [squeeze.flush()]
    return png(side, side, colour=6, pixels=b"".join(parts))


def of_pillow(form: str, side: int, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, form, **options)
    return out.getvalue()


def changed(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def packed(kind: bytes) -> bytes:
    """Return a PNG with 200 MB of zeros in a chunk."""
    return png(16, 16, chunk(kind, b"a\0\0" + zlib.compress(bytes(200 << 20), 9)))


FILES: dict[str, bytes | Callable[[], bytes]] = {
    "x.png": png(100_000, 100_000),
    "widest.png": png(2**31 - 1, 1),
    "nothing.png": png(0, 0),
    "text.png": lambda: packed(b"zTXt"),
    "profile.png": lambda: packed(b"iCCP"),
    "exif.png": png(16, 16, chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 4000)),
    "large.png": lambda: large_png(13_000),
    "large.webp": lambda: of_pillow("WEBP", 13_000, lossless=True, quality=0, method=0),
    "large.jpg": lambda: of_pillow("JPEG", 13_000),
    "large.gif": changed(of_pillow("GIF", 16), 6, b"\xff\xff\xff\xff"),
    "large.bmp": changed(of_pillow("BMP", 16), 18, struct.pack("<ii", 2**30, -(2**30))),
    "large.tif": changed(of_pillow("TIFF", 16), 4, struct.pack("<I", 2**31)),
    "large.tga": b"\0\0\2" + bytes(9) + b"\xff\xff\xff\xff\x20\0",
    "large.ppm": b"P6 99999 99999 255\n",
    "digits.ppm": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "half.jpg": of_pillow("JPEG", 64)[:400],
    "noise.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
    "noise.avif": b"\0\0\0\x1cftypavif" + bytes(200),
    "noise.webp": b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 60,
    "noise.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 3000,
    f"{ESCAPE}.png": b"x",
    "new\nline.png": b"x",
    os.fsdecode(b"bytes-\xff\xfe.png"): b"x",
}


def picture(name: str, data: bytes | Callable[[], bytes]) -> Make:
    def make(at: Path) -> None:
        (at / "source" / "class0" / name).write_bytes(data() if callable(data) else data)

    return make


PICTURES: dict[str, tuple[Make, list[str], str]] = {
    **{
        f"picture: {name.encode('unicode_escape', 'surrogateescape').decode()}": (
            picture(name, data),
            [name if name.isprintable() else "png"],
            "prepare-new",
        )
        for name, data in FILES.items()
    },
    **{
        f"picture: {kind}": (special("source/class0/odd.png", kind), ["odd.png"], "prepare-new")
        for kind in SPECIAL
    },
    "idx: huge": (
        lambda at: idx(at, b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**15, 2**15)),
        ["idx"],
        "prepare-idx",
    ),
    "idx: bomb": (lambda at: idx(at, bytes(BOMB // 4)), ["idx"], "prepare-idx"),
    "idx: other magic": (lambda at: idx(at, b"\x01\x02\x03\x04"), ["idx"], "prepare-idx"),
    "idx: no gzip": (lambda at: idx(at, b"x", pack=False), ["idx"], "prepare-idx"),
}


def idx(at: Path, data: bytes, pack: bool = True) -> None:
    path = at / "idx" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(data, 1) if pack else data)


# -- configurations -------------------------------------------------------------------------------

YAML: dict[str, bytes] = {
    "50,000 brackets": b"run: " + b"[" * 50_000,
    "50,000 braces": b"run: " + b"{a: " * 50_000,
    "50,000 dashes": b"- " * 50_000,
    "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + k, 98 + k, b"*%c," % (97 + k) * 9) for k in range(9)),
    "circle": b"run: &a {dir: *a}",
    "circle of lists": b"model: &a [*a]",
    "python": b"run: !!python/object/apply:os.system ['touch owned']",
    "tag": b"run: !!binary x",
    "NUL": b'run: {dir: "a\\0b"}',
    "NUL byte": b"run: \0",
    "not UTF-8": b"run: {dir: \xff\xfe}",
    "UTF-16": "run: {dir: a}".encode("utf-16"),
    "large number": b"model: {ngf: " + b"9" * 5000 + b"}",
    "large exponent": b"optim: {g_lr: 1e999999}",
    "date": b"run: 2020-02-30",
    "number keys": b"1: 2\n3.5: 4",
    "list key": b"? [a, b]\n: c",
    "two documents": b"run: {}\n---\nrun: {}",
    "key twice": b"run: {dir: a}\nrun: {dir: b}",
    "merge": b"run: {<<: 5}",
    "null": b"~",
    "nothing": b"",
    "secret": b'run: {dir: "${oc.env:%s}"}' % SECRET_NAME.encode(),
    "secret with default": b'tracking: {name: "${oc.env:%s,none}"}' % SECRET_NAME.encode(),
    "secret, nested": b'tracking: {name: "${oc.env:${oc.decode:%s}}"}' % SECRET_NAME.encode(),
    "secret, in a list": b'tracking: {tags: ["${oc.env:%s}"]}' % SECRET_NAME.encode(),
    "secret in an unknown key": b'what: "${oc.env:%s}"' % SECRET_NAME.encode(),
    "interpolation circle": b'run: {dir: "${run.dir}"}',
    "interpolation open": b'run: {dir: "${run."}',
    "escape": b'"\\e[31mred": 5\nrun: {dir: "\\e]0;owned\\a"}',
    "long key": b"k" * 100_000 + b": 5",
    "tabs": b"run:\n\tdir: a",
}


def config(file: str, data: bytes) -> Make:
    def make(at: Path) -> None:
        (at / file).write_bytes(data)

    return make


def evil(at: Path) -> None:
    """A downloaded run that names an extractor beside it."""
    path = at / "run" / "config.yaml"
    text = (
        path.read_text().partition("\n")[2].replace("extractor: inception", "extractor: evil:Class")
    )
    path.write_text(text)
    (at / "run" / "evil.py").write_text("import os\nprint(os.environ)\nopen('owned', 'w')\n")
    (at / "evil.py").write_text("import os\nprint(os.environ)\nopen('owned', 'w')\n")


CONFIGS: dict[str, tuple[Make, list[str], str]] = {
    **{
        f"yaml: {name}": (config("tiny.yaml", data), ["tiny.yaml", "data.shards"], "train doctor")
        for name, data in YAML.items()
    },
    **{
        f"yaml of a run: {name}": (
            config("run/config.yaml", data),
            ["config.yaml", "data.shards"],
            "evaluate",
        )
        for name, data in YAML.items()
    },
    **{
        f"yaml of a snapshot: {name}": (
            config("run/snapshots/step_00000004/config.yaml", data),
            ["config.yaml", "step_00000004"],
            "generate-new evaluate-alone",
        )
        for name, data in YAML.items()
    },
    **{f"yaml: {kind}": (special("tiny.yaml", kind), ["tiny.yaml"], "train") for kind in SPECIAL},
    "yaml: 300 MB": (config("tiny.yaml", b"# long\n" * (43 << 20)), ["tiny.yaml"], "train"),
    "code: an extractor beside the run": (evil, ["evil:Class"], "evaluate-bare evaluate-inside"),
}


# -- weights --------------------------------------------------------------------------------------


def safetensors(head: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(head) if length is None else length) + head + body


HEADS = {
    "header of 2^60": safetensors(b"{}", length=2**60),
    "header of 99 MB": safetensors(b" " * 1000, length=99_000_000),
    "no header": b"\0" * 4,
    "nested": safetensors(b'{"a":' * 20_000),
    "huge tensor": safetensors(
        json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    ),
    "overlap": safetensors(
        json.dumps(
            {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in ("a", "b")}
        ).encode(),
        bytes(4),
    ),
    "escape": safetensors(
        json.dumps({ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(),
        bytes(4),
    ),
    "no tensors": safetensors(b"{}"),
}


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def optimizers(kind: str) -> bytes:
    """Return an optimizers.pt that is not one; zip files of torch are made without torch."""
    out = io.BytesIO()
    data = {
        "code": pickle.dumps(Evil(), 2),
        "list": pickle.dumps([1, 2], 2),
        "text": pickle.dumps("x", 2),
        "empty dict": pickle.dumps({}, 2),
        "no state": pickle.dumps({"G": {}, "D": {}}, 2),
        "wrong state": pickle.dumps({k: {"state": 5, "param_groups": "x"} for k in "GD"}, 2),
        "no groups": pickle.dumps({k: {"state": {}, "param_groups": []} for k in "GD"}, 2),
        "deep": pickle.dumps(None, 2)[:-1] + b"(" * 100_000,
        "nothing": b"",
    }[kind]
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def signed_file(file: str, data: Callable[[], bytes]) -> Make:
    """Replace a file of a checkpoint or snapshot, and sign what has its checksum."""

    def make(at: Path) -> list[str]:
        import hashlib

        path = at / file
        before = hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(data())
        after = hashlib.sha256(path.read_bytes()).hexdigest()
        for other in path.parent.glob("*.json"):
            document = json.loads(other.read_text().replace(before, after))
            other.write_text(json.dumps(sealed(document) if DIGEST in document else document))
        return [path.parent.name]

    return make


STEP = "checkpoints/step_00000004"
OPTIMIZERS = ("code", "list", "text", "empty dict", "no state", "wrong state", "no groups", "deep")
WEIGHTS: dict[str, tuple[Make, list[str], str]] = {
    **{
        f"weights: {file}, {name}": (
            signed_file(f"run/{file}", partial(bytes, data)),
            [Path(file).name],
            commands,
        )
        for name, data in HEADS.items()
        for file, commands in {
            f"{STEP}/G.safetensors": "train-on train-fork evaluate-raw",
            "snapshots/step_00000004/generator.safetensors": "generate-new evaluate",
        }.items()
    },
    **{
        f"weights: reference, {name}": (
            lambda at, data=data: (
                [p.write_bytes(data) for p in at.glob("references/*.safetensors")] and []
            ),
            [".safetensors"],
            "evaluate",
        )
        for name, data in HEADS.items()
    },
    **{
        f"optimizers: {kind}": (
            signed_file(f"run/{STEP}/optimizers.pt", partial(optimizers, kind)),
            ["optimizers.pt"],
            "train-on train-fork",
        )
        for kind in (*OPTIMIZERS, "nothing")
    },
}


# -- documents that are signed again --------------------------------------------------------------

DOCUMENTS = {
    f"run/{STEP}/state.json": "train-on train-fork evaluate-raw",
    "run/run.json": "train-on train-fork evaluate",
    "run/evaluations.jsonl": "evaluate train-keep",
    "run/metrics.jsonl": "train-on",
    "shards/index.json": "train-on prepare verify",
    "part/.prepare/settings.json": "prepare-rest",
    "part/.prepare/shard-000000.tar.json": "prepare-rest",
    "half.png.tmp/.generate/settings.json": "generate-half-png",
    "drawn/generated.json": "generate-png",
    "tars/index.json": "train-drawn",
}
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**30, 0.5, float("nan"), "", "x", "../../up", "/etc/passwd"),
    *("a\0b", ESCAPE, [], {}, [1, "a"], {"a": {"a": 1}}, "http://127.0.0.1:9/x", "9" * 5000),
)


def forge(file: str, place: int, value: int, at: Path) -> list[str]:
    """Change one field of a document, at any depth, and give it the right digest again."""
    path = at / file
    rows = file.endswith("l")
    lines = path.read_text().splitlines() if rows else [path.read_text()]
    document = json.loads(lines[-1])
    holder, key = list(fields(document))[place]
    holder[key] = VALUES[value]
    if rows:
        lines[-1] = (
            (row_line(document) if CHECK in document else json.dumps(document).encode())
            .decode()
            .strip()
        )
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(json.dumps(sealed(document) if DIGEST in document else document))
    names = [str(key)] if isinstance(key, str) else []
    return [*names, path.parent.name] if path.parent.name.startswith("step_") else names

"""Pictures as a careful viewer shows them: damage refused, colours converted, nothing inverted."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.codecs import decoder
from pipeline.data.colour import CONVERTED, UNUSABLE
from pipeline.data.pictures import (
    COMPOSITED,
    DEEP,
    FIRST,
    TURNED,
    UNENDED,
    DecodeError,
    Pixels,
    alterations,
    open_pillow,
    require_intact,
)
from pipeline.data.squares import Square


def picture(height: int = 96, width: int = 96, seed: int = 0) -> Pixels:
    """Smooth colours with noise, as a photo has."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) for c in range(3)], -1)
    noise = np.random.default_rng(seed).normal(0, 6, waves.shape)
    return (waves + noise).clip(0, 255).astype(np.uint8)


def stored(pixels: Pixels | Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


def shown(raw: bytes, square: Square | None = None) -> tuple[Pixels, list[str]]:
    """What is packed of stored bytes, at their own size."""
    with open_pillow(memoryview(raw)) as image:
        said = require_intact(memoryview(raw), image)
        pixels, done = (square or Square(min(image.size), 3)).of(image)
    return pixels, said + done


# -- damage -------------------------------------------------------------------------------------


def harmed(raw: bytes) -> dict[str, bytes]:
    """Harm in which Pillow reads on: it shows gray, or garbage."""
    middle = len(raw) // 2
    zeroed = bytearray(raw)
    zeroed[middle : middle + 400] = bytes(400)
    return {
        "400 bytes zeroed": bytes(zeroed),
        "cut, with an end mark": raw[:middle] + b"\xff\xd9",
        "cut": raw[:middle],
    }


JPEGS = {
    "colour": stored(picture(), "JPEG"),
    "gray": stored(picture()[..., 0], "JPEG"),
    "progressive": stored(picture(), "JPEG", progressive=True),
    "4:2:0": stored(picture(), "JPEG", subsampling=2),
    "CMYK": stored(Image.fromarray(picture()).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_damaged_jpeg_is_refused(kind: str) -> None:
    raw = JPEGS[kind]
    assert shown(raw)[1] == []
    out = np.empty((96, 96, 3), np.uint8)
    for name, bad in harmed(raw).items():
        with pytest.raises(DecodeError):
            pytest.fail(f"{name}: {shown(bad)[1]}")
        with pytest.raises(DecodeError):
            decoder("jpg", (96, 96, 3))(memoryview(bad), out)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lacks_only_its_end_mark_is_whole(kind: str) -> None:
    raw = JPEGS[kind]
    pixels, said = shown(raw[:-2])
    assert said == [UNENDED]
    assert np.array_equal(pixels, shown(raw)[0])
    out, whole = np.empty((2, 96, 96, 3), np.uint8)
    decoder("jpg", (96, 96, 3))(memoryview(raw[:-2]), out)
    decoder("jpg", (96, 96, 3))(memoryview(raw), whole)
    assert np.abs(out.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_every_flipped_byte_of_the_pixels_of_a_png_is_refused(mode: str) -> None:
    deep = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    raw = stored(deep if mode == "I;16" else Image.fromarray(picture()).convert(mode), "PNG")
    start = raw.index(b"IDAT") + 4
    for at in np.random.default_rng(0).integers(start, len(raw) - 16, 40).tolist():
        bad = bytearray(raw)
        bad[at] ^= 0x10
        with pytest.raises(DecodeError):
            shown(bytes(bad))
    for bad in harmed(raw).values():
        with pytest.raises(DecodeError):
            shown(bad)


@pytest.mark.parametrize("tiles", [False, True])
def test_damage_of_a_deflated_tiff_is_refused(tiles: bool) -> None:
    """Its reader stops before the checksum, so that Pillow says nothing."""
    options = {"tile": (32, 32)} if tiles else {}
    raw = stored(picture(), "TIFF", compression="tiff_adobe_deflate", **options)
    shown(raw)
    refused, flips = 0, np.random.default_rng(0).integers(200, len(raw) - 400, 40).tolist()
    for at in flips:
        bad = bytearray(raw)
        bad[at] ^= 0x10
        try:
            shown(bytes(bad))
        except DecodeError:
            refused += 1
    assert refused >= len(flips) - 2  # the others hit tags that nobody reads


# -- colours ------------------------------------------------------------------------------------

XYZ = {  # the columns of a profile's matrix, adapted to D50
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)),
    "Display P3": (
        (0.51512, 0.2412, -0.00105),
        (0.29198, 0.69225, 0.04189),
        (0.1571, 0.06657, 0.78407),
    ),
    "Adobe RGB": (
        (0.60974, 0.31111, 0.01947),
        (0.20528, 0.62567, 0.06087),
        (0.14919, 0.06322, 0.74457),
    ),
}
SRGB_CURVE = b"para" + struct.pack(">IHHiiiii", 0, 3, 0, 157286, 62119, 3417, 5072, 2651)
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc(name: str, space: bytes = b"RGB ", gamma: float = 563 / 256) -> bytes:
    """An ICC profile (ICC.1:2010, version 2 but for sRGB's parametric curve), written by hand."""
    gamma_curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"
    curve = gamma_curve if name in ("Adobe RGB", "gray") else SRGB_CURVE
    white = b"XYZ " + bytes(4) + fixed(*D50)
    tags = {b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", XYZ[name], strict=True):
            tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([letter]) + b"TRC"] = curve
    text = name.encode() + b"\0"
    tags[b"desc"] = b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78)
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0"
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ "
    )
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + fixed(*D50)
    return head.ljust(128, b"\0") + table + body


def in_srgb(pixels: Pixels, name: str) -> NDArray[np.float64]:
    """The levels that a colour-managed viewer shows, computed in float64."""
    v = pixels / 255
    linear = (
        v ** (563 / 256)
        if name == "Adobe RGB"
        else np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    )
    light = linear @ np.array(XYZ[name]) @ np.linalg.inv(np.array(XYZ["sRGB"]))
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_photos_of_phones_and_cameras_are_converted(kind: str, name: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    raw = stored(picture(), kind, icc_profile=icc(name), **options)
    with Image.open(io.BytesIO(raw)) as image:
        as_stored = np.asarray(image)
    pixels, said = shown(raw)
    assert said == [CONVERTED]
    assert np.abs(pixels - in_srgb(as_stored, name)).max() <= 2
    assert np.abs(pixels.astype(int) - as_stored).mean() > 5  # what was lost
    assert CONVERTED in alterations(memoryview(raw))


def test_an_srgb_profile_leaves_every_pixel_as_it_is() -> None:
    pixels, said = shown(stored(picture(), "PNG", icc_profile=icc("sRGB")))
    assert (pixels == picture()).all()
    assert said == []


def test_transparency_survives_the_conversion() -> None:
    """The background is sRGB: it is not converted."""
    clear = np.dstack([picture(), np.zeros((96, 96), np.uint8)])
    clear[:, :48, 3] = 255
    raw = stored(clear, "PNG", icc_profile=icc("Display P3"))
    pixels, said = shown(raw, Square(96, 3, (10, 200, 30)))
    assert sorted(said) == sorted([COMPOSITED, CONVERTED])
    assert (pixels[:, 48:] == (10, 200, 30)).all()
    assert np.abs(pixels[:, :48] - in_srgb(picture(), "Display P3")[:, :48]).max() <= 2


def test_a_gray_profile_is_followed() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    raw = stored(gray, "PNG", icc_profile=icc("gray", b"GRAY", 1.0))
    light = gray / 255
    wanted = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    for channels in (1, 3):
        pixels, said = shown(raw, Square(16, channels))
        assert said == [CONVERTED]
        assert np.abs(pixels - wanted[..., None]).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", icc("sRGB")[:200], icc("gray", b"GRAY")])
def test_an_unusable_profile_is_said(profile: bytes) -> None:
    pixels, said = shown(stored(picture(), "PNG", icc_profile=profile))
    assert said == [UNUSABLE]
    assert (pixels == picture()).all()


@pytest.mark.parametrize(
    ("gamma", "exponent"), [(100_000, 1 / 2.2), (45_455, 1), (55_556, 1.8 / 2.2)]
)
def test_the_gamma_of_a_png_is_followed(gamma: int, exponent: float) -> None:
    """100000 is linear light, 45455 is what sRGB files say, 55556 is an old Macintosh."""
    import zlib

    raw = stored(picture(), "PNG")
    chunk = b"gAMA" + struct.pack(">I", gamma)
    at = raw.index(b"IDAT") - 4
    raw = raw[:at] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + raw[at:]
    pixels, said = shown(raw)
    assert said == ([CONVERTED] if exponent != 1 else [])
    assert np.abs(pixels - 255 * (picture() / 255) ** exponent).max() <= 1


def test_a_palette_with_a_profile_is_converted() -> None:
    few = Image.fromarray(picture()).quantize(64)
    pixels, said = shown(stored(few, "PNG", icc_profile=icc("Display P3")))
    assert said == [CONVERTED]
    assert np.abs(pixels - in_srgb(np.asarray(few.convert("RGB")), "Display P3")).max() <= 2


# -- depth, frames, turns -----------------------------------------------------------------------


def tiff(rows: NDArray[np.generic], bits: int, photometric: int) -> bytes:
    """A gray TIFF of one strip, written by hand."""
    data = rows.tobytes()
    if bits == 12:
        flat = rows.reshape(-1, 2).astype(np.uint32)
        packed = (flat[:, 0] << 12) | flat[:, 1]
        data = b"".join(int(value).to_bytes(3) for value in packed)
    tags = [(256, rows.shape[1]), (257, rows.shape[0]), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, rows.shape[0]), (279, len(data))]
    order = ">" if bits == 12 else "<"
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        for tag, value in tags
    )
    mark = b"MM\0*" if bits == 12 else b"II*\0"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + directory


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_gray_tiffs_of_any_depth_are_upright_in_brightness(bits: int, white_is_zero: bool) -> None:
    top = (1 << bits) - 1
    ramp = np.linspace(0, top, 256).round().astype(f"<u{bits // 8}").reshape(16, 16)
    raw = tiff(top - ramp if white_is_zero else ramp, bits, 0 if white_is_zero else 1)
    pixels, said = shown(raw, Square(16, 1))
    assert said == ([DEEP] if bits > 8 else [])
    assert np.array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


def test_what_was_done_is_said() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, said = shown(stored(picture(), "PNG", exif=exif))
    assert said == [TURNED]
    assert np.array_equal(turned, np.rot90(picture(), -1))
    frames = [Image.fromarray(picture(seed=k)) for k in range(2)]
    assert FIRST in shown(stored(frames[0], "TIFF", save_all=True, append_images=frames[1:]))[1]
    opaque = np.dstack([picture(), np.full((96, 96), 255, np.uint8)])
    assert shown(stored(opaque, "PNG"))[1] == []


# -- squares ------------------------------------------------------------------------------------


def test_a_square_is_cut_padded_or_stretched() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = (0, 255, 0)
    image = Image.fromarray(wide)
    assert (Square(10, 3).of(image.copy())[0] == (0, 255, 0)).all()
    padded, _ = Square(40, 3, (9, 8, 7), fit="pad").of(image.copy())
    assert (padded[:15] == (9, 8, 7)).all()
    assert (padded[25:] == (9, 8, 7)).all()
    assert np.array_equal(padded[15:25], wide)
    stretched, _ = Square(40, 3, fit="stretch").of(image.copy())
    assert (stretched[:, 18:22] == (0, 255, 0)).all()
    assert (stretched[:, :12] == 0).all()
    gray, _ = Square(20, 1, (255, 255, 255), fit="pad").of(image.convert("L"))
    assert (gray[0] == 255).all()


def test_the_crop_of_the_papers_faces() -> None:
    """DCGAN cuts 108 x 108 pixels out of CelebA's 178 x 218."""
    face = picture(218, 178)
    pixels, _ = Square(108, 3, centre=108).of(Image.fromarray(face))
    assert np.array_equal(pixels, face[55:163, 35:143])
    with pytest.raises(DecodeError, match=r"96 x 96 pixels, fewer than --crop 108"):
        Square(64, 3, centre=108).of(Image.fromarray(picture()))
    with pytest.raises(DecodeError, match=r"96 x 96 pixels, fewer than --min-size 100"):
        Square(64, 3, least=100).of(Image.fromarray(picture()))


@pytest.mark.parametrize("shape", [(3072,), (0, 0, 3), (3, 9, 9), (9, 9, 7), (2, 9, 9, 3)])
def test_arrays_that_are_no_image_are_refused_with_their_shape(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    from pipeline.data.codecs import npy_image

    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(DecodeError, match=str(shape[0])):
        npy_image(memoryview((tmp_path / "a.npy").read_bytes()))

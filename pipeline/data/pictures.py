"""Open stored images of any format with Pillow, refuse damaged ones, and see them as viewers do.

Pillow reads on where bytes are wrong: it fills in gray, or what the bytes happen to say. What can
be known of damage is checked here, with the decoders that the loader uses.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.colour import to_srgb

Pixels = NDArray[np.uint8]
# Formats that Pillow may recognise. Not EPS: Pillow would run another program on it.
PILLOW_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA"]
SUFFIXES = [
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
]
PLUGINS = {  # module: (format of Pillow, endings of files, package)
    "PIL.AvifImagePlugin": ("AVIF", (".avif",), "pillow"),
    "pillow_heif": ("HEIF", (".heic", ".heif", ".hif"), "pillow-heif"),
    "pillow_jxl": ("JXL", (".jxl",), "pillow-jxl-plugin"),
}
MISSING: dict[str, str] = {}
"""Endings of files that a package reads which is not installed, with its name."""
for _module, (_format, _endings, _package) in PLUGINS.items():
    if importlib.util.find_spec(_module):
        PILLOW_FORMATS.append(_format)
        SUFFIXES += _endings
    else:
        MISSING |= dict.fromkeys(_endings, _package)
WHITE = (255, 255, 255)
MOST_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded: 28 bytes each for WebP with alpha, the costliest."""
UNKNOWN = (0, 0)
LONGEST_REASON = 300
BAND_PIXELS = 1 << 22
"""Pixels that are converted at once."""
JPEG, PNG, END_OF_JPEG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd9"
BITS, COMPRESSION, PHOTOMETRIC, STRIPS, TILES = 258, 259, 262, (273, 279), (324, 325)
"""Tags of TIFF (TIFF 6.0, sections 8 and 15); of strips and tiles the offsets and byte counts."""
DEFLATE = (8, 32946)
ORIENTATION = 0x0112

TURNED = "turned upright by EXIF"
DEEP = "of 16 bits, scaled to 8"
COMPOSITED = "composited on the background"
FIRST = "with several frames, the first used"
UNENDED = "without the end mark of JPEG, complete otherwise"


class DecodeError(ValueError):
    """The bytes are not an image of the expected format; the message says why."""


class WrongShape(DecodeError):
    """The image has another shape than the index says."""


@contextlib.contextmanager
def open_pillow(payload: memoryview) -> Iterator[Image.Image]:
    """Open stored bytes with Pillow; raise ``DecodeError`` for any error its plugins raise.

    An error of the system is raised as it is: it says nothing about the image.
    """
    head = bytes(payload[:8])
    if head[4:] in (b"ftyp", b"JXL ") or head[:2] == b"\xff\x0a":
        _load_plugins()
    Image.init()  # else a plugin that cannot be loaded (open files) would be an unknown format
    if payload[:3] == JPEG and payload[-2:] != END_OF_JPEG:
        payload = memoryview(bytes(payload) + END_OF_JPEG)  # ``require_intact`` tells what is lost
    size = _webp_size(payload)  # its plugin makes room for the pixels when it opens a file
    try:
        if size != UNKNOWN:
            require_pixels(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = [name for name in PILLOW_FORMATS if name in Image.OPEN]
            with Image.open(io.BytesIO(payload), formats=known) as image:
                size = image.size
                require_pixels(size)  # from the header, before they are decoded
                yield image
    except (DecodeError, MemoryError, ImportError):
        raise
    except Exception as error:  # struct.error, KeyError, zlib.error, ...: the plugins vary
        if isinstance(error, OSError) and error.errno is not None:
            raise
        _require_memory(size)
        raise DecodeError(f"not a readable image: {reason(error)}") from None


@cache
def _load_plugins() -> None:
    """Make Pillow know HEIF and JPEG XL where their packages are installed.

    Their libraries are large: they are loaded for the first image that begins like one of these.
    """
    if ".heic" in SUFFIXES:
        importlib.import_module("pillow_heif").register_heif_opener()
    if ".jxl" in SUFFIXES:
        importlib.import_module("pillow_jxl")


def _webp_size(payload: memoryview) -> tuple[int, int]:
    """Return (width, height) in the header of a WebP file, ``UNKNOWN`` for another format."""
    kind, head = bytes(payload[12:16]), bytes(payload[20:30])
    if bytes(payload[:4]) != b"RIFF" or bytes(payload[8:12]) != b"WEBP" or len(head) < 10:
        return UNKNOWN
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + bits % (1 << 14), 1 + (bits >> 14) % (1 << 14)
    width, height = (int.from_bytes(head[at : at + 2], "little") % (1 << 14) for at in (6, 8))
    return width, height


def require_pixels(size: tuple[int, int]) -> None:
    """Raise ``DecodeError`` if an image of this (width, height) is empty or too large to decode."""
    width, height = size
    if not 0 < width * height <= MOST_PIXELS:
        raise DecodeError(f"has {width} x {height} pixels; images have 1 to {MOST_PIXELS} pixels")


def _require_memory(size: tuple[int, int]) -> None:
    """Raise ``MemoryError`` if an image of this size could not be decoded for lack of memory.

    Some plugins report a failed allocation like damage.
    """
    np.empty((1 << 22) + 28 * size[0] * size[1], np.uint8)


def reason(error: Exception) -> str:
    """Return why an image was refused, on one short line and without the address of a buffer."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def require_intact(payload: memoryview, image: Image.Image) -> list[str]:
    """Raise ``DecodeError`` if stored bytes are damaged, as far as their format can tell.

    JPEG and PNG are decoded by the decoders of the loader, which stop where Pillow reads on. Of
    TIFF the checksums of packed strips are compared, to which its reader does not come.

    Args:
        payload: the bytes.
        image: as Pillow opened them; its size is allowed.

    Returns:
        What is to be said of an image that is complete.
    """
    if payload[:3] == JPEG:
        return _require_jpeg(payload)
    if payload[:8] == PNG:
        try:
            decode_png(payload)
        except Exception as error:  # the codec has no public base class of its errors
            raise DecodeError(f"damaged PNG: {reason(error)}") from None
    elif image.format == "TIFF" and image.tag_v2.get(COMPRESSION) in DEFLATE:  # type: ignore[attr-defined]
        _require_strips(payload, image)
    return []


def decode_png(payload: memoryview) -> Any:
    """Return the pixels of a PNG, (H, W) or (H, W, C) uint8 or uint16. Any error: it is damaged."""
    from imagecodecs import png_decode  # a machine with JPEG or npy images alone may lack it

    return png_decode(bytes(payload))


def _require_jpeg(payload: memoryview) -> list[str]:
    why = ""
    for space in ("GRAY", "CMYK"):  # of YCCK there is no conversion to gray
        try:
            simplejpeg.decode_jpeg(payload, space)
            return []
        except ValueError as error:
            why = why or reason(error)
            if "color conversion" not in str(error):
                break
    if payload[-2:] != END_OF_JPEG and "end of JPEG" in why:
        with contextlib.suppress(ValueError):
            simplejpeg.decode_jpeg(bytes(payload) + END_OF_JPEG, space)
            return [UNENDED]
    raise DecodeError(f"damaged JPEG: {why}")


def _require_strips(payload: memoryview, image: Image.Image) -> None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    offsets, counts = next(((tags[a], tags[b]) for a, b in (STRIPS, TILES) if a in tags), ((), ()))
    for offset, count in zip(offsets, counts, strict=False):
        packed, stream = payload[offset : offset + count], zlib.decompressobj()
        try:
            stream.decompress(packed, 1 << 20)
            while stream.unconsumed_tail:
                stream.decompress(stream.unconsumed_tail, 1 << 20)
        except zlib.error as error:
            raise DecodeError(f"damaged TIFF: {reason(error)}") from None


# -- as viewers show it -------------------------------------------------------------------------


def upright(image: Image.Image) -> list[str]:
    """Decode an image and turn it upright in place; returns what was done.

    Damaged metadata is passed over: viewers show such an image as it is stored.
    """
    notes = []
    image.load()
    with contextlib.suppress(Exception):
        if image.getexif().get(ORIENTATION, 1) in range(2, 9):
            ImageOps.exif_transpose(image, in_place=True)
            notes.append(TURNED)
    # A JPEG may hold previews as further frames.
    if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
        notes.append(FIRST)
    return notes


def on_background(
    image: Image.Image, background: tuple[int, int, int]
) -> tuple[Image.Image, list[str], dict[Any, Any]]:
    """Return (L, RGB or CMYK image of 8 bits without transparency, what was done, its info).

    The info is what the file says of the colours, as ``to_srgb`` takes it. It is empty if they are
    sRGB already: those of an image with transparency are converted before they are composited.

    Args:
        image: any image that was decoded.
        background: the colour behind transparent pixels, in sRGB.

    Raises:
        DecodeError: the pixels have no defined white (32-bit integers, floats).
    """
    info = dict(image.info)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (
        image.has_transparency_data and not is_deep(image)
    ):
        clear = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
        done = [COMPOSITED] if clear.getchannel("A").getextrema()[0] != 255 else []
        clear, converted = to_srgb(clear, info)
        return flatten(clear, 3, background), done + converted, {}
    if image.mode in ("L", "RGB", "CMYK"):
        return image, [], info
    deep = is_deep(image)
    gray = deep or image.mode == "1"
    return flatten(image, 1 if gray else 3), [DEEP] if deep else [], info


def alterations(payload: memoryview) -> list[str]:
    """Return what must be done to stored bytes before they can be used as they are.

    The loader reads a shard without it: colours as stored, unturned, transparency on white.
    """
    with open_pillow(payload) as image:
        notes = require_intact(payload, image) + upright(image)
        small = image.resize((1, 1)) if image.mode in ("L", "RGB", "CMYK") else image
        flat, done, info = on_background(small, WHITE)
        return notes + done + to_srgb(flat, info)[1]


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has gray levels of up to 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def flatten(
    image: Image.Image, channels: int, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """Convert any Pillow image to 8-bit ``L`` (channels = 1) or ``RGB`` (channels = 3).

    Transparent pixels are composited on ``background``. 16-bit gray is scaled to 8 bits. Colours
    are taken as they are stored.

    Raises:
        DecodeError: the pixels have no defined white (32-bit integers, floats).
    """
    mode = "L" if channels == 1 else "RGB"
    if is_deep(image):
        white, inverted = _white(image)

        def eight_bits(band: Image.Image) -> Image.Image:
            values = np.asarray(band).astype(np.uint32)  # Pillow's own conversion clips at 255
            values = (values.clip(0, white) * 255 + white // 2) // white
            return Image.fromarray((255 - values if inverted else values).astype(np.uint8))

        image = _in_bands(image, "L", eight_bits)
    elif image.mode in ("I", "F"):
        raise DecodeError("32-bit pixels have no defined white; save the image with 8 or 16 bits")
    elif image.has_transparency_data:

        def composited(band: Image.Image) -> Image.Image:
            pixels = band.convert("RGBA")
            canvas = Image.new("RGBA", pixels.size, (*background, 255))
            return Image.alpha_composite(canvas, pixels).convert("RGB")

        image = _in_bands(image, "RGB", composited)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # palette, CMYK, YCbCr, LAB, HSV
    return image if image.mode == mode else image.convert(mode)


def _white(image: Image.Image) -> tuple[int, bool]:
    """Return (the value of white, or of black if inverted; whether 0 is white) of a deep image."""
    if image.format != "TIFF":
        return 65535, False
    tags = image.tag_v2  # type: ignore[attr-defined]
    (bits, *_) = tags.get(BITS, (16,))
    return (1 << bits) - 1, tags.get(PHOTOMETRIC) == 0


def _in_bands(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert an image to ``mode`` some rows at a time, since ``convert`` takes much memory."""
    rows = max(1, BAND_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    result = Image.new(mode, image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        result.paste(convert(image.crop(box)), box[:2])
    return result

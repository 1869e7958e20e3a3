"""Encode and decode single images: stored bytes <-> uint8 pixels.

``npy`` holds raw pixels and is read at the speed of memcpy. ``png`` and ``jpg`` have fast decoders.
Pillow reads the other formats, for shards of other tools. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from imagecodecs import png_decode
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]
IMAGE_FIELDS = ("npy", "jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
# Formats that Pillow may recognise. Not EPS: Pillow would run another program on it.
PILLOW_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA"]
if importlib.util.find_spec("PIL.AvifImagePlugin"):
    PILLOW_FORMATS.append("AVIF")
WHITE = (255, 255, 255)
MOST_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded: 28 bytes each for WebP with alpha, the costliest."""
UNKNOWN = (0, 0)
LONGEST_REASON = 300
BAND_PIXELS = 1 << 22
"""Pixels that are converted at once."""
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
NPY_HEADER_BYTES = 10_000
"""Bytes of the longest npy header that is parsed; that of an image has 128."""


class DecodeError(ValueError):
    """The bytes are not an image of the expected format; the message says why."""


class WrongShape(DecodeError):
    """The image has another shape than the index says."""


def encode(pixels: Pixels, field: str) -> bytes:
    """Return an (H, W, C) uint8 image, C = 1 or 3, as ``npy``, ``png`` or ``jpg`` bytes."""
    if field == "npy":
        return npy_header(pixels.shape) + pixels.tobytes()
    out = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    try:
        if field == "png":
            image.save(out, "PNG", compress_level=6)
        elif field == "jpg":
            # No chroma subsampling: it would blur the colour edges of small images.
            image.save(out, "JPEG", quality=95, subsampling=0)
        else:
            raise ValueError(f"format ({field}) must be npy, png or jpg")
    except OSError as error:  # Pillow's word for an encoder that got no memory; no file is written
        raise MemoryError(str(error)) from None
    return out.getvalue()


@lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the .npy header of a C-ordered uint8 array; an equal header need not be parsed."""
    out = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, description)
    return out.getvalue()


def flatten(
    image: Image.Image, channels: int, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """Convert any Pillow image to 8-bit ``L`` (channels = 1) or ``RGB`` (channels = 3).

    Transparent pixels are composited on ``background``. 16-bit gray is scaled to 8 bits.

    Raises:
        DecodeError: the pixels have no defined white (32-bit integers, floats).
    """
    mode = "L" if channels == 1 else "RGB"
    deep_pgm = image.mode == "I" and image.format == "PPM"  # Pillow scales these to 16 bits
    if image.mode.startswith("I;16") or deep_pgm:
        image = _in_bands(image, "L", _eight_bits)
    elif image.mode in ("I", "F"):
        raise DecodeError("32-bit pixels have no defined white; save the image with 8 or 16 bits")
    elif image.has_transparency_data:

        def on_background(band: Image.Image) -> Image.Image:
            pixels = band.convert("RGBA")
            canvas = Image.new("RGBA", pixels.size, (*background, 255))
            return Image.alpha_composite(canvas, pixels).convert("RGB")

        image = _in_bands(image, "RGB", on_background)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # palette, CMYK, YCbCr, LAB, HSV
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)  # Pillow's own conversion clips at 255
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


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


def shape_of(payload: memoryview, field: str) -> tuple[int, int, int]:
    """Return the (H, W, C) of stored bytes, C = 1 or 3; raise ``DecodeError`` if damaged."""
    if field == "npy":
        shape = read_npy(payload).shape
        shape = (*shape, 1) if len(shape) == 2 else shape
        if len(shape) != 3 or shape[2] not in (1, 3) or not min(shape):
            raise DecodeError(
                f"an npy image must have shape (H, W), (H, W, 1) or (H, W, 3): {shape}"
            )
        return shape
    with open_pillow(payload) as image:
        gray = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
        return image.height, image.width, 1 if gray else 3


def decoder(field: str, shape: tuple[int, int, int]) -> Callable[[memoryview, Pixels], None]:
    """Return a function ``decode(payload, out)`` that decodes bytes into ``out`` (H, W, C) uint8.

    It raises ``DecodeError`` if the bytes are damaged or hold an image of another shape.
    """
    if field == "npy":
        header = npy_header(shape)
        size, total = len(header), len(header) + int(np.prod(shape))

        def decode_npy(payload: memoryview, out: Pixels) -> None:
            if len(payload) == total and payload[:size] == header:
                out.reshape(-1)[:] = np.frombuffer(payload, np.uint8, offset=size)
            else:
                _copy(read_npy(payload), out)

        return decode_npy
    if field in ("jpg", "jpeg"):
        space = "GRAY" if shape[2] == 1 else "RGB"

        def decode_jpg(payload: memoryview, out: Pixels) -> None:
            try:
                # simplejpeg refuses an image larger than the buffer before it decodes.
                found = simplejpeg.decode_jpeg(payload, space, buffer=out).shape
            except (ValueError, TypeError) as error:  # CMYK and other rare kinds, or damage
                try:
                    _decode_pillow(payload, out)
                except WrongShape:
                    raise
                except DecodeError:
                    raise DecodeError(str(error)) from None
            else:
                if found != shape:
                    _refuse_shape(found, shape)

        return decode_jpg
    if field == "png":

        def decode_png(payload: memoryview, out: Pixels) -> None:
            # Its header has the size: a small file may unpack to more than memory.
            size = int.from_bytes(payload[16:20]), int.from_bytes(payload[20:24])
            if len(payload) > 24 and size != (shape[1], shape[0]):
                _decode_pillow(payload, out)  # which says what is wrong
                return
            try:
                pixels = png_decode(bytes(payload))
            except Exception as error:  # the codec has no public base class of its errors
                raise DecodeError(f"not a readable PNG: {error}") from None
            if pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2] == shape[2]):
                _copy(pixels, out)
            else:  # palette, alpha or 16 bit
                _decode_pillow(payload, out)

        return decode_png
    return _decode_pillow


def _decode_pillow(payload: memoryview, out: Pixels) -> None:
    with open_pillow(payload) as image:
        if (image.height, image.width) != out.shape[:2]:  # before a huge image is decoded
            _refuse_shape((image.height, image.width, out.shape[2]), out.shape)
        pixels = np.asarray(flatten(image, out.shape[2]))
    _copy(pixels, out)


@contextlib.contextmanager
def open_pillow(payload: memoryview) -> Iterator[Image.Image]:
    """Open stored bytes with Pillow; raise ``DecodeError`` for any error its plugins raise.

    An error of the system is raised as it is: it says nothing about the image.
    """
    Image.init()  # else a plugin that cannot be loaded (open files) would be an unknown format
    size = _webp_size(payload)  # its plugin makes room for the pixels when it opens a file
    try:
        if size != UNKNOWN:
            require_pixels(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload), formats=PILLOW_FORMATS) as image:
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


def npy_image(payload: memoryview) -> Image.Image:
    """Return the image in .npy bytes: uint8 of shape (H, W), or (H, W, C) with C = 1 to 4."""
    array = read_npy(payload)
    if array.ndim not in (2, 3) or not array.size or array.shape[2:] > (4,):
        raise DecodeError(f"an npy image must have shape (H, W) or (H, W, 1 to 4): {array.shape}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def read_npy(payload: memoryview) -> Pixels:
    """Return the uint8 array in .npy bytes of any tool; raise ``DecodeError`` for other arrays."""
    array = parse_npy(payload)
    if array.dtype != np.uint8:
        raise DecodeError("an npy image must be one uint8 array")
    return array


def parse_npy(payload: memoryview) -> NDArray[Any]:
    """Return the array in .npy bytes.

    The header is read by numpy, which limits its length. Its shape must fit the length of the
    bytes, so nothing is allocated for a header that lies.

    Raises:
        DecodeError: they are no array, or one of Python objects.
    """
    file = io.BytesIO(payload[: NPY_HEADER_BYTES + 16])
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = NPY_VERSIONS[version](file, max_header_size=NPY_HEADER_BYTES)
    except KeyError:
        raise DecodeError(f"not a readable npy array: format {version[0]}.{version[1]}") from None
    except Exception as error:  # numpy evaluates the header as a literal of Python
        raise DecodeError(f"not a readable npy array: {reason(error)}") from None
    start = file.tell()
    count = math.prod(shape)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise DecodeError(f"not an npy array of numbers: dtype {dtype}, shape {shape}")
    if len(payload) - start != count * dtype.itemsize:
        raise DecodeError(
            f"not a readable npy array: its shape {shape} needs {count * dtype.itemsize} bytes, "
            f"but {len(payload) - start} follow"
        )
    if not count:
        return np.empty(shape, dtype)
    array = np.frombuffer(payload, dtype, count, start).copy()
    return array.reshape(shape, order="F" if fortran else "C")


def _copy(pixels: Pixels, out: Pixels) -> None:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    gray_to_rgb = pixels.shape[2:] == (1,) and out.shape[2] == 3
    if pixels.shape != out.shape and not (gray_to_rgb and pixels.shape[:2] == out.shape[:2]):
        _refuse_shape(pixels.shape, out.shape)
    out[...] = pixels


def _refuse_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    raise WrongShape(f"the image has shape {tuple(found)}, the index says {tuple(wanted)}")

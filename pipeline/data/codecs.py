"""Encode and decode single images: stored bytes <-> uint8 pixels.

``npy`` holds raw pixels and is read at the speed of memcpy. ``png`` and ``jpg`` have fast decoders.
Pillow reads the other formats, for shards of other tools. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

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
    if field == "png":
        image.save(out, "PNG", compress_level=6)
    elif field == "jpg":
        # No chroma subsampling: it would blur the colour edges of small images.
        image.save(out, "JPEG", quality=95, subsampling=0)
    else:
        raise ValueError(f"format ({field}) must be npy, png or jpg")
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
        values = np.asarray(image).astype(np.int64)  # Pillow's own conversion clips at 255
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DecodeError("32-bit pixels have no defined white; save the image with 8 or 16 bits")
    elif image.has_transparency_data:
        pixels = image.convert("RGBA")
        canvas = Image.new("RGBA", pixels.size, (*background, 255))
        image = Image.alpha_composite(canvas, pixels).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # palette, CMYK, YCbCr, LAB, HSV
    return image if image.mode == mode else image.convert(mode)


def shape_of(payload: memoryview, field: str) -> tuple[int, int, int]:
    """Return the (H, W, C) of stored bytes, C = 1 or 3; raise ``DecodeError`` if damaged."""
    if field == "npy":
        shape = read_npy(payload).shape
        shape = (*shape, 1) if len(shape) == 2 else shape
        if len(shape) != 3 or shape[2] not in (1, 3):
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
    """Open stored bytes with Pillow; raise ``DecodeError`` for any error its plugins raise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload), formats=PILLOW_FORMATS) as image:
                yield image
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # struct.error, KeyError, zlib.error, ...: the plugins vary
        raise DecodeError(f"not a readable image: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return why an image was refused, on one line and without the address of a buffer."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def read_npy(payload: memoryview) -> Pixels:
    """Return the uint8 array in .npy bytes of any tool; raise ``DecodeError`` for other arrays."""
    try:
        array = np.load(io.BytesIO(payload), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DecodeError(f"not a readable npy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise DecodeError("an npy image must be one uint8 array")
    return array


def _copy(pixels: Pixels, out: Pixels) -> None:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape != out.shape:
        gray_to_rgb = pixels.shape[2:] == (1,) and out.shape[2] == 3
        if not gray_to_rgb or pixels.shape[:2] != out.shape[:2]:
            _refuse_shape(pixels.shape, out.shape)
    out[...] = pixels


def _refuse_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    raise WrongShape(f"the image has shape {tuple(found)}, the index says {tuple(wanted)}")

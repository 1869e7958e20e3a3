"""One image between its stored bytes and uint8 pixels: the only place that knows the formats.

Stored formats are ``npy`` (raw pixels, read at the speed of memcpy), ``png`` and ``jpg`` with the
fast decoders, and whatever Pillow reads for shards that others wrote. No format is unpickled.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import simplejpeg
from imagecodecs import png_decode
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
IMAGE_FIELDS = ("npy", "jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")


class DecodeError(ValueError):
    """The bytes are not an image of the expected kind; the message says why."""


def encode(pixels: Pixels, field: str) -> bytes:
    """Stored bytes of an (H, W, C) uint8 image (C = 1 or 3) as ``npy``, ``png`` or ``jpg``."""
    if field == "npy":
        return npy_header(pixels.shape) + pixels.tobytes()
    out = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if field == "png":
        image.save(out, "PNG", compress_level=6)
    elif field == "jpg":
        # 4:4:4 keeps the colour edges that small images are made of.
        image.save(out, "JPEG", quality=95, subsampling=0)
    else:
        raise ValueError(f"format ({field}) must be npy, png or jpg")
    return out.getvalue()


@lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """The exact .npy header of a C-ordered uint8 array: equal headers need no parsing."""
    out = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, description)
    return out.getvalue()


def decoder(field: str, shape: tuple[int, int, int]) -> Callable[[memoryview, Pixels], None]:
    """A function that decodes stored bytes into one (H, W, C) uint8 row, in place.

    It raises ``DecodeError`` when the bytes are damaged or hold an image of another shape.
    """
    if field == "npy":
        header = npy_header(shape)
        size, total = len(header), len(header) + int(np.prod(shape))

        def decode_npy(payload: memoryview, out: Pixels) -> None:
            if len(payload) == total and payload[:size] == header:
                out.reshape(-1)[:] = np.frombuffer(payload, np.uint8, offset=size)
            else:
                _copy(_read_npy(payload), out)

        return decode_npy
    if field in ("jpg", "jpeg"):
        space = "GRAY" if shape[2] == 1 else "RGB"

        def decode_jpg(payload: memoryview, out: Pixels) -> None:
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(payload)
                if (height, width) != shape[:2]:
                    _refuse_shape((height, width, shape[2]), shape)
                simplejpeg.decode_jpeg(payload, space, buffer=out)
            except DecodeError:
                raise
            except (ValueError, TypeError) as error:  # CMYK and other rarities, or damage
                try:
                    _decode_pillow(payload, out)
                except DecodeError:
                    raise DecodeError(str(error)) from None

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload)) as image:
                pixels = np.asarray(image.convert("L" if out.shape[2] == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"not a readable image: {error}") from None
    _copy(pixels, out)


def _read_npy(payload: memoryview) -> Pixels:
    """A uint8 array from .npy bytes written by any tool; object arrays are refused."""
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
    raise DecodeError(f"the image has shape {tuple(found)}, the index says {tuple(wanted)}")

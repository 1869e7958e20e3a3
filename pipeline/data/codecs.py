"""Encode and decode single images: stored bytes <-> uint8 pixels.

``npy`` holds raw pixels and is read at the speed of memcpy. ``png`` and ``jpg`` have fast decoders.
Pillow reads the other formats, for shards of other tools. Nothing is unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.pictures import (
    JPEG,
    MISSING,
    PNG,
    SUFFIXES,
    DecodeError,
    Pixels,
    WrongShape,
    decode_png,
    flatten,
    open_pillow,
    reason,
    require_intact,
)

MIXED = "mixed"
"""The format of a set whose images have several; each is known by its first bytes."""
IMAGE_FIELDS = ("npy", *sorted(suffix[1:] for suffix in [*SUFFIXES, *MISSING]), MIXED)
NPY = b"\x93NUMPY"
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
NPY_HEADER_BYTES = 10_000
"""Bytes of the longest npy header that is parsed; that of an image has 128."""


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


def shape_of(payload: memoryview, field: str) -> tuple[int, int, int]:
    """Return the (H, W, C) of stored bytes, C = 1 or 3; raise ``DecodeError`` if damaged."""
    if field == "npy" or (field == MIXED and payload[:6] == NPY):
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

    It raises ``DecodeError`` if the bytes are damaged or hold an image of another shape. What is
    not stored as ``npy`` is known by its first bytes, since files are often named for another
    format.
    """
    header = npy_header(shape)
    size, total = len(header), len(header) + int(np.prod(shape))
    space = "GRAY" if shape[2] == 1 else "RGB"

    def decode_npy(payload: memoryview, out: Pixels) -> None:
        if len(payload) == total and payload[:size] == header:
            out.reshape(-1)[:] = np.frombuffer(payload, np.uint8, offset=size)
        else:
            _copy(read_npy(payload), out)

    def decode_jpg(payload: memoryview, out: Pixels) -> None:
        try:
            # simplejpeg refuses an image larger than the buffer before it decodes.
            found = simplejpeg.decode_jpeg(payload, space, buffer=out).shape
        except (ValueError, TypeError):  # a rare kind, another shape, or damage
            _decode_pillow(payload, out)
        else:
            if found != shape:
                _refuse_shape(found, shape)

    def read_png(payload: memoryview, out: Pixels) -> None:
        # Its header has the size: a small file may unpack to more than memory.
        width, height = int.from_bytes(payload[16:20]), int.from_bytes(payload[20:24])
        if len(payload) > 24 and (height, width) != shape[:2]:
            _decode_pillow(payload, out)  # which says what is wrong
            return
        try:
            pixels = decode_png(payload)
        except Exception as error:  # the codec has no public base class of its errors
            raise DecodeError(f"not a readable PNG: {error}") from None
        if pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2] == shape[2]):
            _copy(pixels, out)
        else:  # palette, alpha or 16 bit
            _decode_pillow(payload, out)

    def decode_any(payload: memoryview, out: Pixels) -> None:
        if payload[:3] == JPEG:
            decode_jpg(payload, out)
        elif payload[:8] == PNG:
            read_png(payload, out)
        elif field == MIXED and payload[:6] == NPY:
            decode_npy(payload, out)
        else:
            _decode_pillow(payload, out)

    return decode_npy if field == "npy" else decode_any


def _decode_pillow(payload: memoryview, out: Pixels) -> None:
    with open_pillow(payload) as image:
        if (image.height, image.width) != out.shape[:2]:  # before a huge image is decoded
            _refuse_shape((image.height, image.width, out.shape[2]), out.shape)
        require_intact(payload, image)
        pixels = np.asarray(flatten(image, out.shape[2]))
    _copy(pixels, out)


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

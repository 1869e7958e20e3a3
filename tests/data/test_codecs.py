"""Stored bytes to pixels: every format and mode, damage refused, nothing unpickled."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.codecs import decoder, encode, shape_of
from pipeline.data.pictures import DecodeError, flatten


def stored(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return memoryview(out.getvalue())


def decoded(payload, field, shape):
    out = np.zeros(shape, np.uint8)
    decoder(field, shape)(memoryview(payload), out)
    return out


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("field", ["npy", "png"])
def test_lossless_formats_return_the_pixels_they_were_given(field, channels):
    pixels = noise(16, 16, channels)
    payload = encode(pixels, field)
    assert np.array_equal(decoded(payload, field, pixels.shape), pixels)
    assert shape_of(memoryview(payload), field) == pixels.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_jpg_decodes_to_what_pillow_decodes(channels):
    payload = encode(noise(16, 16, channels), "jpg")
    expected = np.asarray(Image.open(io.BytesIO(payload))).reshape(16, 16, channels)
    assert np.array_equal(decoded(payload, "jpg", (16, 16, channels)), expected)


def test_npy_is_what_numpy_reads():
    pixels = noise(8, 8, 3)
    assert np.array_equal(np.load(io.BytesIO(encode(pixels, "npy"))), pixels)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_other_tools_is_read(order):
    pixels = noise(6, 6)
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(pixels, order=order), version=(2, 0))
    assert np.array_equal(decoded(out.getvalue(), "npy", (6, 6, 1))[:, :, 0], pixels)


def test_npy_objects_are_never_unpickled():
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="dtype object"):
        decoded(out.getvalue(), "npy", (1, 1, 1))


def test_gray_stored_and_colour_wanted_repeats_the_channel():
    pixels = noise(8, 8, 1)
    for field in ("npy", "png"):
        out = decoded(encode(pixels, field), field, (8, 8, 3))
        assert np.array_equal(out, np.repeat(pixels, 3, axis=2))


@pytest.mark.parametrize("field", ["npy", "png", "jpg"])
@pytest.mark.parametrize("wanted", [(9, 8, 3), (7, 8, 3), (4, 16, 3)])
def test_another_shape_than_the_index_says_is_refused(field, wanted):
    payload = encode(noise(8, 8, 3), field)
    with pytest.raises(DecodeError) as refused:
        decoded(payload, field, wanted)
    assert str(refused.value) == f"the image has shape (8, 8, 3), the index says {wanted}"


@pytest.mark.parametrize("field", ["npy", "png", "jpg", "webp", "bmp", "gif", "tif"])
def test_damage_is_a_decode_error_in_every_format(field):
    image = Image.fromarray(noise(32, 32, 3))
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(field, field.upper())
    good = encode(noise(32, 32, 3), "npy") if field == "npy" else bytes(stored(image, kind))
    for bad in (b"", b"\0" * 100, good[:30], good[: len(good) // 2]):
        with pytest.raises(DecodeError):
            decoded(bad, field, (32, 32, 3))


PLAIN = [
    (Image.new("1", (4, 4), 1), (255, 255, 255)),
    (Image.new("L", (4, 4), 100), (100, 100, 100)),
    (Image.new("LA", (4, 4), (0, 128)), (127, 127, 127)),
    (Image.new("RGB", (4, 4), (9, 8, 7)), (9, 8, 7)),
    (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
    (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4), (10, 20, 30)),
    (Image.fromarray(np.full((4, 4), 0x8080, np.uint16)), (128, 128, 128)),
    (Image.fromarray(np.full((4, 4), 0x00FF, np.uint16)), (1, 1, 1)),
]


@pytest.mark.parametrize(("image", "expected"), PLAIN, ids=[f"{i.mode}-{e[0]}" for i, e in PLAIN])
def test_every_png_mode_becomes_the_right_colour(image, expected):
    out = decoded(stored(image, "PNG"), "png", (4, 4, 3))
    assert np.array_equal(out, np.broadcast_to(np.array(expected, np.uint8), (4, 4, 3)))


def test_cmyk_jpeg_becomes_rgb():
    out = decoded(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "jpg", (8, 8, 3))
    assert np.abs(out.astype(int) - (255, 0, 0)).max() <= 3


def test_sixteen_bit_gray_is_scaled_over_its_whole_range():
    """Pillow's own conversion clips: all but the darkest 256 levels would be white."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pgm = b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes()
    for payload in (
        stored(Image.fromarray(ramp), "PNG"),
        stored(Image.fromarray(ramp), "TIFF"),
        pgm,
    ):
        with Image.open(io.BytesIO(payload)) as image:
            assert np.array_equal(np.asarray(flatten(image, 1)), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_defined_white_are_refused(mode):
    with pytest.raises(DecodeError, match="no defined white"):
        decoded(stored(Image.new(mode, (4, 4), 1), "TIFF"), "tif", (4, 4, 3))


def test_postscript_is_not_an_image():
    """Pillow would hand it to another program."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(DecodeError, match="known format"):
        decoded(eps, "tif", (4, 4, 3))

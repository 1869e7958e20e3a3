"""Convert the colours of an image to sRGB, as viewers do: by its ICC profile or its PNG gamma."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SAME = 2
"""Levels of 255 by which a profile may differ from sRGB and still be one: profiles are rounded."""
LARGEST_PROFILE = 16 << 20
"""Bytes of the largest profile that is parsed; those of printers have 2 to 4 million."""
SRGB_GAMMA = 1 / 2.2
"""What a gAMA chunk says of sRGB (PNG specification, 11.3.2.2)."""
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Modes of Pillow by the colour space of a profile."""
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE
"""Optimised tables of a gray profile are off by up to 10 levels of 255."""

CONVERTED, UNUSABLE = "converted to sRGB", "with an unusable colour profile, taken as sRGB"


def to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> tuple[Image.Image, list[str]]:
    """Return (the image in sRGB, what was done), with its transparency.

    Args:
        image: L, LA, RGB, RGBA or CMYK.
        info: what its file says, by Pillow's names. An ICC profile is taken before a gamma.
    """
    profile = info.get("icc_profile")
    if profile:
        return _by_profile(image, bytes(profile))
    gamma = info.get("gamma")  # of a PNG
    if gamma and "srgb" not in info:
        return _by_gamma(image, float(gamma))
    return image, []


def _by_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, list[str]]:
    space = image.mode if image.mode == "CMYK" else "GRAY" if image.mode in ("L", "LA") else "RGB"
    transform = _transform(profile, space)
    if transform is None:
        return image, [UNUSABLE]
    if transform == "sRGB":
        return image, []
    assert isinstance(transform, ImageCms.ImageCmsTransform)
    if space == "CMYK":
        return _applied(transform, image), [CONVERTED]
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(MODES[space])
    colours = _applied(transform, colours)
    if space == "GRAY":
        colours = colours.convert("L")  # R, G and B are equal
    if alpha is not None:
        colours.putalpha(alpha)
    return colours, [CONVERTED]


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # it is None only if done in place
    return result


@lru_cache(maxsize=64)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | str | None:
    """Return the transform to sRGB, "sRGB" if none is needed, None for an unusable profile."""
    if len(profile) > LARGEST_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, MODES[space], "RGB", intent, FLAGS)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if space == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    if space == "GRAY":
        sample = levels[:, None]
    else:
        sample = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    shown = np.asarray(_applied(transform, Image.fromarray(sample))).astype(int)
    wanted = sample[..., None] if space == "GRAY" else sample
    return "sRGB" if np.abs(shown - wanted).max() <= SAME else transform


def _by_gamma(image: Image.Image, gamma: float) -> tuple[Image.Image, list[str]]:
    """Apply the gamma of a PNG: a sample v is light v ** (1 / gamma), to be shown at 1 / 2.2."""
    if not 0.01 < gamma < 100:
        return image, [UNUSABLE]
    exponent = SRGB_GAMMA / gamma
    curve = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(int)
    if np.abs(curve - np.arange(256)).max() <= SAME:
        return image, []
    bands = [
        band if name == "A" else band.point(curve.tolist())
        for name, band in zip(image.getbands(), image.split(), strict=True)
    ]
    return Image.merge(image.mode, bands), [CONVERTED]

"""Make a square of uint8 pixels of any image: the one form in which images are packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.colour import to_srgb
from pipeline.data.pictures import (
    WHITE,
    DecodeError,
    Pixels,
    flatten,
    on_background,
    require_pixels,
    upright,
)

FITS = {
    "crop": "the central square",
    "pad": "bars of the background around the whole image",
    "stretch": "the whole image, with its sides stretched to equal lengths",
}
ENLARGED = "enlarged"


@dataclass(frozen=True)
class Square:
    """What is packed of an image.

    Args:
        size: height and width in pixels.
        channels: 1 (gray) or 3 (RGB).
        background: colour behind transparent pixels and of bars, (R, G, B) in sRGB, 0 to 255.
        fit: how a square is made, a key of ``FITS``.
        centre: side in pixels of the central square that is cut out before; 0: nothing is cut.
        least: images with a shorter side in pixels are left out.
    """

    size: int
    channels: int
    background: tuple[int, int, int] = WHITE
    fit: str = "crop"
    centre: int = 0
    least: int = 0

    def describe(self) -> str:
        """Return how the square is made, for the record of a set."""
        cut = f"central {self.centre} x {self.centre} pixels, " if self.centre else ""
        least = f", not smaller than {self.least}" if self.least else ""
        fit = "central square" if self.fit == "crop" else self.fit
        return f"upright by EXIF, sRGB, {cut}{fit}{least}"

    def of(self, image: Image.Image) -> tuple[Pixels, list[str]]:
        """Return ((size, size, channels) uint8 pixels, what was done) of a Pillow image.

        The image is turned upright by EXIF, composited on the background, made square, resized with
        an antialiased Lanczos filter, and converted to sRGB. Of an animation the first frame is
        used.

        Raises:
            DecodeError: it has more than ``MOST_PIXELS`` pixels, or too few.
        """
        require_pixels(image.size)
        if min(image.size) < max(self.least, self.centre):
            raise DecodeError(
                f"has {image.width} x {image.height} pixels, fewer than "
                f"{'--min-size' if self.least else '--crop'} {max(self.least, self.centre)}"
            )
        notes = upright(image)
        # Composited before the filter, which would mix in the colours of transparent pixels.
        image, done, info = on_background(image, self.background)
        if self.centre:
            image = _central(image, self.centre)
        if self.fit == "crop":
            image = _central(image, min(image.size))
        if (max if self.fit == "pad" else min)(image.size) < self.size:
            notes.append(ENLARGED)
        if image.size != (size := self._inner(image.size)):
            image = image.resize(size, Image.Resampling.LANCZOS)
        image, converted = to_srgb(image, info)
        if size != (self.size, self.size):
            bars = Image.new("RGB", (self.size, self.size), self.background)
            bars.paste(image, ((self.size - size[0]) // 2, (self.size - size[1]) // 2))
            image = bars
        pixels = np.asarray(flatten(image, self.channels))
        return pixels.reshape(self.size, self.size, self.channels), notes + done + converted

    def _inner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) inside the bars."""
        if self.fit != "pad":
            return self.size, self.size
        width, height = (max(1, round(side * self.size / max(size))) for side in size)
        return width, height


def _central(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size == (side, side):
        return image
    return image.crop((left, top, left + side, top + side))

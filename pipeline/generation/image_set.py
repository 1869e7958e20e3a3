"""Describe a set of generated images: its settings, its parts, and the files of each part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.shards import shard_name
from pipeline.models.noise import BLOCK
from pipeline.runtime.work_folder import FileSum, WorkFolder

WORK_FOLDER = ".generate"
MOST_BLOCKS = 16


@dataclass(frozen=True)
class ImageSet:
    """A set of images to write.

    Args:
        out: the folder, or the file of an npz.
        format: ``png``, ``npz`` or ``shards``.
        num: number of images; image i is ``images(i, i + 1)``.
        shape: (H, W, C) of each image.
        record: everything that decides the pixels, as JSON; kept with the set.
        label: returns the class of an image, which is written into shards; None = no class.
    """

    out: Path
    format: str
    num: int
    shape: tuple[int, int, int]
    record: dict[str, Any] = field(default_factory=dict)
    label: Callable[[int], int | None] = lambda _: None

    @property
    def unfinished(self) -> Path:
        """The folder in which the set is written."""
        return self.out.with_name(f"{self.out.name}.tmp")

    @property
    def work(self) -> WorkFolder:
        """The records of what is written; a resumed command may name the snapshot otherwise."""
        path = self.unfinished / WORK_FOLDER
        return WorkFolder(path, self.out, self.record, free={"snapshot"})

    @property
    def blocks_per_part(self) -> int:
        """Blocks of ``BLOCK`` images in a part: 16 parts of a small set, 1024 images of a large."""
        return min(MOST_BLOCKS, -(-self.num // (16 * BLOCK)))

    def parts(self) -> list[range]:
        """Return the rows of each part."""
        size = self.blocks_per_part * BLOCK
        return [range(k, min(k + size, self.num)) for k in range(0, self.num, size)]

    @property
    def parts_folder(self) -> Path:
        """The folder of the files of the parts."""
        return self.work.path if self.format == "npz" else self.unfinished

    def files_of(self, part: int) -> list[str]:
        """Return the names of the files of a part, in the order of their images."""
        if self.format == "png":
            return [f"{row:08d}.png" for row in self.parts()[part]]
        return [shard_name(part) if self.format == "shards" else f"{part:06d}.raw"]

    def finished(self) -> dict[int, dict[str, FileSum]]:
        """Return size and checksum of each file of the finished parts, after reading all of them.

        Damaged files are set aside; their parts are then unfinished.

        Raises:
            OSError: a file cannot be read, which is no damage.
        """

        def files(marker: dict[str, Any]) -> dict[str, FileSum]:
            wanted = self.files_of(int(marker["part"]))
            if sorted(marker["files"]) != wanted:
                raise ValueError("it lists other files than those of its part")
            return {name: marker["files"][name] for name in wanted}

        markers = map(marker_of, range(len(self.parts())))
        found = self.work.finished(markers, self.parts_folder, files)
        return {int(part): sums for part, sums in found.items()}


def marker_of(part: int) -> str:
    """Return the name of the marker of a part."""
    return f"{part:06d}"

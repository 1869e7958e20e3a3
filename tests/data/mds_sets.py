"""Write ``mds_sets.zip``, with mosaicml-streaming: pip install -e '.[peers]', then run this file.

Three images, the first 8 x 8 pixels of those of ``test_source_kinds``, in each of the ways to store
an image that ``pipeline.data.mds`` reads.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)[:3, :8, :8].copy()
LABELS = [3, 1, 2]
NAMES = ["cat", "ant", "bee"]
SETS = {
    "png": ({"image": "png", "label": "int"}, LABELS),
    "pil": ({"image": "pil", "label": "str"}, NAMES),
    "ndarray": ({"image": "ndarray", "a_label": "uint8"}, LABELS),
    "ndarray_uint8": ({"image": "ndarray:uint8", "label": "str_int"}, LABELS),
    "ndarray_fixed": ({"image": "ndarray:uint8:8,8,3", "label": "pkl"}, LABELS),
}
"""Name of the set: columns with their encodings, and labels."""


def main() -> None:
    from streaming import MDSWriter

    with tempfile.TemporaryDirectory() as folder:
        for name, (columns, labels) in SETS.items():
            _, label = sorted(columns, key=lambda column: column != "image")
            out = str(Path(folder) / name / "train")
            with MDSWriter(out=out, columns=columns, size_limit=500) as shards:
                for pixels, value in zip(PIXELS, labels, strict=True):
                    image = pixels if "ndarray" in name else Image.fromarray(pixels)
                    shards.write({"image": image, label: value})
        shutil.make_archive(str(Path(__file__).with_suffix("")), "zip", folder)


if __name__ == "__main__":
    main()

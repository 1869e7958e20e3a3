"""Names that ``eval.extractor`` and ``eval.metrics`` may have."""

from __future__ import annotations

OF_TORCH_FIDELITY = (
    *("inception", "inception-v3-compat", "vgg16"),
    *(f"dinov2-vit-{size}-14" for size in "sblg"),
    *("clip-rn50", "clip-rn101", "clip-rn50x4", "clip-rn50x16", "clip-rn50x64"),
    *("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336px"),
)
"""``inception`` is ``inception-v3-compat`` of its registry."""
EXTRACTORS = (*OF_TORCH_FIDELITY, "efficientnet-lite0")
METRICS = (
    *("fid", "kid", "is", "prc", "density_coverage", "mind", "memorization"),
    "class_fid",
)

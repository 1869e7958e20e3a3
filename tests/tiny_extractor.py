"""A user's own feature extractor: 16 features from fixed random filters, computed in milliseconds.

The environment variable TINY_DELAY (seconds per batch) slows it down, for tests that interrupt it.
"""

import os
import time

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class Tiny(FeatureExtractorBase):
    seed = 0
    class_logits = True

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(self.seed)
        self.filters = nn.Parameter(torch.randn(16, 3, 5, 5, generator=generator))
        self.head = nn.Parameter(torch.randn(10, 16, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        time.sleep(float(os.environ.get("TINY_DELAY", "0")))
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        maps = nn.functional.conv2d(images.float() / 127.5 - 1, self.filters, stride=3)
        pooled = maps.relu().mean((2, 3))
        found = {"16": pooled, "logits": pooled @ self.head.T}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "16", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "16"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class OtherTiny(Tiny):
    seed = 1


NOT_ONE = 3

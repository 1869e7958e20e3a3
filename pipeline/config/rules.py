"""Check the values of a configuration against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pipeline.config.schema import EXTRACTORS, POLICIES, Config, flatten

MLP_KEYS = ("model.maxout", "model.dropout")


def faults(config: Config) -> list[str]:
    """Every value or combination that no run could honour."""
    values = flatten(config)
    faults: list[str] = []

    def need(requirement: str, met: Callable[[Any], bool], *keys: str) -> None:
        faults.extend(
            f"{key} ({values[key]}): must be {requirement}" for key in keys if not met(values[key])
        )

    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{key} ({value}): must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**40 and not key.endswith(".seed"):
            faults.append(f"{key}: must be below 2**40")
    sizes = ("model.z_dim", "model.ngf", "model.ndf", "model.num_classes", "model.maxout")
    need("at most 65536", lambda v: v <= 2**16, *sizes)
    need("a folder, e.g. runs/first", lambda v: v and "://" not in v, "run.dir", "data.cache_dir")
    need("a folder, e.g. ~/.cache/refs", lambda v: v and "://" not in v, "eval.cache_dir")
    need("a local file", lambda v: "://" not in v, "eval.extractor_weights", "eval.reference")
    need("inception, efficientnet-lite0 or module:Class", _names_an_extractor, "eval.extractor")
    need("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "eval.seed")
    need("at least 2", lambda v: v >= 2, "eval.num_images")
    need("0 (all) or at least 2", lambda v: v == 0 or v >= 2, "eval.reference_images")
    need("at least 1", lambda v: v >= 1, "eval.batch_size")
    need("a folder or URL, e.g. data/shards", bool, "data.shards")
    need("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "run.seed")
    if config.model.architecture == "dcgan":
        need("32, 64, 128 or 256", lambda v: v in (32, 64, 128, 256), "model.image_size")
        need("0: it belongs to model.architecture=mlp", lambda v: not v, *MLP_KEYS)
    need("between 8 and 256", lambda v: 8 <= v <= 256, "model.image_size")
    need("1 (gray) or 3 (RGB)", lambda v: v in (1, 3), "model.channels")
    need("at least 1", lambda v: v >= 1, "model.z_dim", "model.ngf", "model.ndf")
    need("at least 1", lambda v: v >= 1, "data.batch_size", "data.prefetch", "data.block")
    need("at least 1", lambda v: v >= 1, "data.lanes", "train.total_steps", "train.keep")
    need("at least 1", lambda v: v >= 1, "train.log_every")
    need("0 or more", lambda v: v >= 0, "data.workers", "data.window", "data.cache_gib")
    need("0 or more", lambda v: v >= 0, "train.checkpoint_every", "train.checkpoint_minutes")
    need("0 or more", lambda v: v >= 0, "train.keep_every", "train.sample_every")
    # The other ranks wait for rank 0 at the end, ten minutes at most with NCCL.
    need("between 0 and 500", lambda v: 0 <= v <= 500, "tracking.timeout")
    need("above 0, e.g. 2e-4", lambda v: v > 0, "optim.g_lr", "optim.d_lr")
    need("in [0, 1)", lambda v: 0 <= v < 1, "optim.beta1", "optim.beta2", "train.ema_decay")
    need("in [0, 1)", lambda v: 0 <= v < 1, "model.dropout")
    need("0 or at least 2", lambda v: v == 0 or v >= 2, "model.maxout", "model.num_classes")
    need("at least 1", lambda v: v >= 1, "optim.d_steps", "stability.r1_every")
    need("0 or more", lambda v: v >= 0, "stability.r1_gamma")
    need("in [0, 0.5)", lambda v: 0 <= v < 0.5, "stability.label_smoothing")
    need(f"any of {', '.join(POLICIES)}", _are_policies, "stability.augment")
    if config.stability.label_smoothing and config.model.loss == "hinge":
        faults.append("stability.label_smoothing: must be 0 with model.loss=hinge, which has none")
    if config.stability.r1_gamma and config.train.compile:
        faults.append(
            "train.compile (true): must be false with stability.r1_gamma: torch.compile has no "
            "second derivatives"
        )
    with_norms = config.model.architecture == "dcgan" and not config.model.spectral_norm
    if config.stability.r1_gamma and config.train.precision == "fp16" and with_norms:
        faults.append(
            "train.precision (fp16): must be bf16 or fp32 with stability.r1_gamma, unless "
            "model.spectral_norm=true: BatchNorm's second derivatives overflow in fp16"
        )
    if config.stability.r1_gamma and config.train.sync_batchnorm and with_norms:
        faults.append(
            "train.sync_batchnorm (true): must be false with stability.r1_gamma, unless "
            "model.spectral_norm=true: PyTorch has no second derivatives of it"
        )
    batch, micro = config.data.batch_size, config.train.micro_batch
    if micro is not None and (micro < 1 or batch % micro):
        faults.append(f"train.micro_batch ({micro}): must divide data.batch_size ({batch}) evenly")
    if (micro or batch) == 1:
        key = "train.micro_batch" if micro else "data.batch_size"
        faults.append(f"{key} (1): BatchNorm needs at least 2 images per micro-batch")
    return faults


def _names_an_extractor(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    custom = bool(colon) and attribute.isidentifier()
    return name in EXTRACTORS or (custom and all(p.isidentifier() for p in module.split(".")))


def _are_policies(names: list[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(POLICIES)

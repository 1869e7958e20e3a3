"""Check the values of a configuration: each against its range, then keys against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.choices import EXTRACTORS, METRICS
from pipeline.config.recipe import POLICIES
from pipeline.config.schema import DCGAN_SIZES, SIZES, Config, TrainConfig, flatten
from pipeline.config.values import show
from pipeline.runtime.text import has_login


def _is_extractor(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    custom = bool(colon) and attribute.isidentifier()
    return name in EXTRACTORS or (custom and all(p.isidentifier() for p in module.split(".")))


def _are_extractors(names: list[str]) -> bool:
    return len(set(names)) == len(names) and all(map(_is_extractor, names))


def _are_policies(names: list[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(POLICIES)


def _are_seeds(seeds: list[int]) -> bool:
    return len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def _are_steps(span: list[int]) -> bool:
    return not span or (len(span) == 2 and 1 <= span[0] <= span[1] < span[0] + 100)


def _are_metrics(names: list[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(METRICS)


def _if_set(is_met: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_met(value)


def is_wandb_name(name: str | None) -> bool:
    """Return whether W&B takes it as the name of a run or a group; None = not given."""
    return len(name or "") <= 128


def is_wandb_project(name: str | None) -> bool:
    """Return whether W&B takes it as the name of a project; None = not given."""
    return is_wandb_name(name) and not set(name or "") & set("/\\#?%:")


def are_wandb_tags(tags: list[str]) -> bool:
    """Return whether W&B takes all of them as tags."""
    return all(1 <= len(tag) <= 64 for tag in tags)


AT_LEAST_1 = """
model.z_dim model.ngf model.ndf data.batch_size data.prefetch optim.d_steps
train.total_steps train.keep train.log_every train.watch_steps stability.r1_every
eval.batch_size"""
AT_LEAST_0 = """
data.workers data.cache_gib data.skip_damaged train.checkpoint_every
train.checkpoint_minutes train.keep_every train.sample_every train.watch_healings stability.r1_gamma
stability.r2_gamma schedule.start schedule.end schedule.warmup"""
URLS = "data.shards eval.held_out eval.parzen_shards"
NETRC = "for http(s) put them into ~/.netrc (machine HOST login USER password PASSWORD)"
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    # The value must be ..., as this function tests, for these keys.
    ("at least 1", lambda v: v >= 1, AT_LEAST_1),
    ("0 or more", lambda v: v >= 0, AT_LEAST_0),
    ("null or at least 1", _if_set(lambda v: v >= 1), "data.block data.lanes"),
    ("null or 0 or more", _if_set(lambda v: v >= 0), "data.window"),
    ("at most 65536", lambda v: v <= 2**16, "model.z_dim model.ngf model.ndf"),
    ("at most 65536", lambda v: v <= 2**16, "model.num_classes model.maxout"),
    # Beyond these, arithmetic overflows or queues are larger than any machine.
    ("at most 256", lambda v: v <= 2**8, "data.workers"),
    ("at most 1024", lambda v: v <= 2**10, "data.prefetch"),
    ("at most 65536", lambda v: v <= 2**16, "optim.d_steps eval.batch_size"),
    ("at most 1048576", lambda v: v <= 2**20, "data.batch_size"),
    ("at most 1e30", lambda v: v <= 1e30, "optim.g_lr optim.d_lr"),
    ("at most 1000000", lambda v: v <= 1e6, "data.cache_gib data.skip_damaged"),
    ("at most 1000000", lambda v: v <= 1e6, "stability.r1_gamma stability.r2_gamma"),
    (
        "null or 0 to 1000000",
        _if_set(lambda v: 0 <= v <= 1e6),
        "schedule.r1_gamma schedule.r2_gamma",
    ),
    ("null or 0 to 1e30", _if_set(lambda v: 0 <= v <= 1e30), "schedule.g_lr schedule.d_lr"),
    ("null or in [0, 1)", _if_set(lambda v: 0 <= v < 1), "schedule.beta2"),
    ("between 0 and 1000000", lambda v: 0 <= v <= 1e6, "train.ema_kimg"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "train.ema_rampup"),
    ("at most 1000000", lambda v: v <= 1e6, "train.checkpoint_minutes stability.r1_every"),
    ("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "run.seed eval.seed"),
    ("a folder, e.g. runs/first", lambda v: v and "://" not in v, "run.dir"),
    ('a folder, or "" for the default', lambda v: "://" not in v, "data.cache_dir"),
    ("a folder, e.g. ~/.cache/refs", lambda v: v and "://" not in v, "eval.cache_dir"),
    ("a folder or URL, e.g. data/shards", bool, "data.shards"),
    (f"a URL without user and password: {NETRC}", lambda v: not has_login(v), URLS),
    ("between 8 and 256", lambda v: SIZES[0] <= v <= SIZES[1], "model.image_size"),
    ("1 (gray) or 3 (RGB)", lambda v: v in (1, 3), "model.channels"),
    ("0 or at least 2", lambda v: v == 0 or v >= 2, "model.maxout model.num_classes"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "model.dropout optim.beta1 optim.beta2 train.ema_decay"),
    ("above 0, e.g. 2e-4", lambda v: v > 0, "optim.g_lr optim.d_lr"),
    ("in [0, 0.5)", lambda v: 0 <= v < 0.5, "stability.label_smoothing"),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, "stability.penalty_share"),
    (f"any of {', '.join(POLICIES)}, each once", _are_policies, "stability.augment"),
    (f"any of {', '.join(METRICS)}, each once", _are_metrics, "eval.metrics"),
    ("[] or [first,last], 1 to 100 steps, e.g. [20,22]", _are_steps, "train.profile_steps"),
    # The other ranks wait for rank 0 at the end: for ten minutes at most with NCCL.
    ("between 0 and 500", lambda v: 0 <= v <= 500, "tracking.timeout"),
    ("at most 128 characters", is_wandb_name, "tracking.name tracking.group"),
    ("at most 128 characters without / \\ # ? % :", is_wandb_project, "tracking.project"),
    ("of tags with 1 to 64 characters", are_wandb_tags, "tracking.tags"),
    (f"one of {', '.join(EXTRACTORS)} or module:Class", _is_extractor, "eval.extractor"),
    ("of different extractors", _are_extractors, "eval.more_extractors"),
    ("a local file", lambda v: "://" not in v, "eval.extractor_weights eval.reference train.init"),
    ("between 1 and 86400", lambda v: 1 <= v <= 86400, "train.rank_timeout"),
    ("of different numbers between 0 and 2**63 - 1", _are_seeds, "eval.seeds"),
    ("at least 2", lambda v: v >= 2, "eval.num_images"),
    ("0 (all) or at least 2", lambda v: v == 0 or v >= 2, "eval.reference_images"),
)


def find_faults(config: Config, written: Mapping[str, str]) -> list[str]:
    """Return a line for every value and every combination of values that no run can have.

    Args:
        config: with values of the right types.
        written: how messages show the values of some keys: what refers to a variable of the
            environment is shown as it was written.
    """
    values = flatten(config)
    lines = []
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            lines.append(f"{key} ({value}): must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**40 and not key.endswith(".seed"):
            lines.append(f"{key} ({show(value)}): must be below 2**40")
    lines += [
        f"{key} ({written.get(key) or show(values[key])}): must be {requirement}"
        for requirement, is_met, keys in RANGES
        for key in keys.split()
        if not is_met(values[key])
    ]
    return lines + _conflicts(config)


def _conflicts(config: Config) -> list[str]:
    """Return a line for every rule between several keys that the configuration breaks."""
    model, train, stability = config.model, config.train, config.stability
    batch, micro = config.data.batch_size, train.micro_batch
    dcgan = model.architecture == "dcgan"
    plan = config.schedule
    gammas = ("r1_gamma", "r2_gamma")
    gamma = next((k for k in gammas if getattr(stability, k) or getattr(plan, k)), None)
    lasts = ("g_lr", "d_lr", "beta2", *gammas)
    ends = ", ".join(f"schedule.{k}" for k in lasts if getattr(plan, k) is not None)
    batchnorm = dcgan and model.d_norm == "batch"
    second = gamma and stability.penalty in ("tangent", "exact")  # differentiated twice
    rules = (
        (
            config.images_per_step * train.total_steps >= 2**62,
            f"data.batch_size ({batch}) x optim.d_steps ({config.optim.d_steps}) x "
            f"train.total_steps ({train.total_steps}): must be below 2**62 images",
        ),
        (
            dcgan and model.image_size not in DCGAN_SIZES,
            f"model.image_size ({model.image_size}): must be 32, 64, 128 or 256 with "
            "model.architecture=dcgan",
        ),
        (
            dcgan and model.maxout,
            f"model.maxout ({model.maxout}): must be 0: it belongs to model.architecture=mlp",
        ),
        (
            dcgan and model.dropout,
            f"model.dropout ({model.dropout}): must be 0: it belongs to model.architecture=mlp",
        ),
        (
            stability.label_smoothing and model.loss in ("hinge", "relativistic"),
            f"stability.label_smoothing ({stability.label_smoothing}): must be 0 with "
            f"model.loss={model.loss}, which has no target to smooth",
        ),
        (
            gamma and batchnorm and train.precision == "fp16",
            f"train.precision (fp16): must be bf16 or fp32 with stability.{gamma}, unless "
            "model.d_norm is none or spectral: the penalty's gradient through BatchNorm overflows "
            "in fp16",
        ),
        (
            second and batchnorm and train.sync_batchnorm,
            f"train.sync_batchnorm (true): must be false with stability.{gamma} and "
            f"stability.penalty={stability.penalty}, unless model.d_norm is none or spectral: "
            "PyTorch lacks its derivatives; or set stability.penalty=along",
        ),
        (
            stability.penalty_share < 1 and batchnorm,
            f"stability.penalty_share ({stability.penalty_share}): must be 1 unless model.d_norm "
            "is none or spectral: BatchNorm needs the whole micro-batch",
        ),
        *_exact_sum_conflicts(train),
        (
            train.watch == "heal" and not train.checkpoint_every,
            "train.checkpoint_every (0): must be above 0 with train.watch=heal, which goes back to "
            "such a checkpoint",
        ),
        (
            train.init and config.run.fork,
            f"train.init ({show(train.init)}): must be empty with run.fork, which keeps the step",
        ),
        (
            plan.end and not plan.start < plan.end,
            f"schedule.end ({plan.end}): must be above schedule.start ({plan.start})",
        ),
        (
            ends and not plan.end,
            f"schedule.end (0): must be the step from which {ends} holds",
        ),
        (
            plan.end and not ends,
            f"schedule.end ({plan.end}): must be 0 unless schedule has a last value, e.g. "
            "schedule.g_lr=0",
        ),
        (
            train.ema_rampup and not train.ema_kimg,
            f"train.ema_rampup ({train.ema_rampup}): must be 0 without train.ema_kimg",
        ),
        (
            micro is not None and (micro < 1 or batch % micro),
            f"train.micro_batch ({micro}): must divide data.batch_size ({batch}) evenly",
        ),
        (
            (micro or batch) == 1,
            f"{'train.micro_batch' if micro else 'data.batch_size'} (1): BatchNorm needs at least "
            "2 images per micro-batch",
        ),
    )
    return [line for broken, line in rules if broken]


def _exact_sum_conflicts(train: TrainConfig) -> tuple[tuple[bool, str], ...]:
    """Return the rules of ``train.exact_sum``: whether each is broken, and its line."""
    exact, also = train.exact_sum, "with train.exact_sum"
    return (
        (
            exact and train.micro_batch is None,
            f"train.micro_batch (null): must be set {also}: by default it depends on the number of "
            "ranks, and BatchNorm normalises each micro-batch by itself",
        ),
        (
            exact and train.precision == "fp16",
            f"train.precision (fp16): must be bf16 or fp32 {also}: scaled gradients are too large "
            "to be added as integers",
        ),
        (
            exact and train.sync_batchnorm,
            f"train.sync_batchnorm (true): must be false {also}: its statistics are sums of floats "
            "over all ranks",
        ),
        (
            exact and train.grad_dtype != "fp32",
            f"train.grad_dtype ({train.grad_dtype}): must be fp32 {also}, which sends integers",
        ),
        (
            exact and train.compile,
            f"train.compile (true): must be false {also}: compiled kernels depend on whether a "
            "micro-batch is the only one of its rank",
        ),
    )

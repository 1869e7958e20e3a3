"""The configuration of a run: one frozen dataclass per YAML section.

``config_files.load`` makes one from files; the program sees dataclasses, never OmegaConf nodes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.runtime.errors import ConfigError

T = TypeVar("T")
EXTRACTORS = ("inception", "efficientnet-lite0")
POLICIES = ("color", "translation", "cutout")  # of DiffAugment


def _may_change(default: T) -> T:
    """A field that a resumed run may set differently: it does not alter what is computed."""
    return field(default=default, metadata={"may_change": True})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = _may_change("runs/default")
    """Folder for everything the run writes. The same folder again means: resume."""
    seed: int = 0
    """Seed of the weights, the data order, the noise and the sample grids; 0 to 2**63 - 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: Literal["dcgan", "mlp"] = "dcgan"
    """Networks of Radford et al. 2016, or the fully connected ones of Goodfellow et al. 2014."""
    image_size: int = 64
    """Height and width in pixels: 32, 64, 128 or 256; any up to 256 for mlp."""
    channels: int = 3
    """Image channels: 1 (gray) or 3 (RGB)."""
    z_dim: int = 100
    """Length of the noise vector z."""
    z_distribution: Literal["uniform", "normal"] = "uniform"
    """Uniform on [-1, 1) or standard normal."""
    ngf: int = 64
    """G's feature maps before the output layer; doubled at each lower resolution. mlp: the units
    of each hidden layer."""
    ndf: int = 64
    """D's feature maps after the first layer; doubled at each lower resolution. mlp: the units of
    each hidden layer."""
    kernel_size: Literal[4, 5] = 4
    """Kernel of the strided convolutions: 5 in the paper's figure 1, 4 in most later code."""
    num_classes: int = 0
    """Classes to generate by the labels of the shards, which must be 0 to num_classes - 1, each of
    them there; 0 = labels unused. Grids, sets of images and evaluations take every class as often
    as the others, whatever their shares of the shards are."""
    maxout: int = 0
    """mlp: linear pieces of each of D's hidden units; 0 = ReLU units."""
    dropout: float = 0.0
    """mlp: share of D's hidden units left out at random in each pass of the training."""
    spectral_norm: bool = False
    """D's weights divided by their largest singular value, instead of BatchNorm in D."""
    loss: Literal["non_saturating", "minimax", "hinge", "least_squares"] = "non_saturating"
    """The objectives. D maximises V(D, G) of the 2014 paper, and G maximises log D(G(z)) or
    minimises log(1 - D(G(z))); or both take the hinge or the least-squares ones."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what G makes and D takes."""
        return self.image_size, self.image_size, self.channels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = _may_change("data/shards")
    """Folder or URL with index.json and the tar shards it lists."""
    batch_size: int = 128
    """Images per optimizer step of D, over all ranks and micro-batches."""
    workers: int = _may_change(2)
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = _may_change(4)
    """Batches each worker prepares ahead."""
    block: int = 1
    """Samples kept adjacent by the shuffle: 1 = a uniform permutation of the whole set. Raise it
    (64 to 256, with window = 8192) for shards on slow disks, or to a shard's size (with window = a
    few shards) when the set is larger than the node cache."""
    window: int = 0
    """Rows shuffled among each other after the blocks; 0 = none (right for block = 1)."""
    lanes: int = 1
    """Stripes of the order that one node can serve alone: the most nodes ever used."""
    cache_dir: str = _may_change("~/.cache/dcgan-pipeline/shards")
    """Node-local folder for shards fetched from a URL."""
    cache_gib: float = _may_change(0.0)
    """Upper limit of the cache in GiB, least recently used shards go first; 0 = no limit."""
    verify: Literal["auto", "sha256", "size"] = _may_change("auto")
    """Check of local shards at start: every byte, or the file sizes; auto = every byte up to
    2 GiB, sizes above. Fetched shards are always checked byte for byte."""
    record_ids: bool = _may_change(False)
    """Write the sample ids of every batch to ids/rank_*.jsonl: proof of the order, for audits."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    g_lr: float = 2e-4
    """Adam's learning rate for G."""
    d_lr: float = 2e-4
    """Adam's learning rate for D."""
    beta1: float = 0.5
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    d_steps: int = 1
    """Updates of D before each one of G, every one with a batch of its own (k in algorithm 1)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    total_steps: int = _may_change(100_000)
    """Optimizer steps of G in the whole run."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward passes; weights stay fp32. auto = bf16 where the
    hardware multiplies it natively, else fp32; a resumed run keeps what it started with. On GPUs
    since Ampere PyTorch computes fp32 convolutions in TF32 while training; never for samples."""
    micro_batch: int | None = None
    """Images per forward pass and BatchNorm group. None = batch_size / ranks. Set it to keep the
    computation the same on any number of ranks: the rest is accumulated."""
    ema_decay: float = 0.999
    """G_ema <- decay * G_ema + (1 - decay) * G after each step; 0 = G_ema is G."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks instead of one micro-batch (CUDA only)."""
    channels_last: bool = True
    """NHWC memory layout for the convolutions."""
    compile: bool = _may_change(False)
    """torch.compile both networks."""
    deterministic: bool = _may_change(False)
    """On GPUs kernels that repeat a run bit for bit, for exact resume; slower, with a warning where
    PyTorch has none. False = the fastest, found by trial. CPUs always repeat it."""
    cuda_graph: bool = _may_change(False)
    """Replay each update as one CUDA graph (one GPU, bf16 or fp32, no random draws in D)."""
    checkpoint_every: int = _may_change(1000)
    """Steps between checkpoints; 0 = only at the end, on a signal and by the clock."""
    checkpoint_minutes: float = _may_change(15.0)
    """Minutes after which a checkpoint is written in any case; 0 = never."""
    keep: int = _may_change(3)
    """Newest checkpoints kept."""
    keep_every: int = _may_change(0)
    """Also keep checkpoints at multiples of this many steps; 0 = none."""
    sample_every: int = _may_change(500)
    """Steps between grids of images from fixed z; 0 = only at the end."""
    log_every: int = _may_change(50)
    """Steps between rows of metrics.jsonl: the loop's only wait for the device."""


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    r1_gamma: float = 0.0
    """R1: gamma / 2 times the squared gradient of D at real images joins D's loss; 0 = off."""
    r1_every: int = 1
    """R1 in one of this many updates of D, and that many times as strong."""
    label_smoothing: float = 0.0
    """D's target for real images is 1 minus this; 0.1 is usual."""
    augment: list[str] = field(default_factory=list)
    """DiffAugment, real and generated images alike: any of color, translation, cutout."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = _may_change("auto")
    """auto = online when a W&B key is configured, else offline."""
    project: str = _may_change("dcgan")
    """W&B project."""
    entity: str | None = _may_change(None)
    """W&B team or user; None = the key's default."""
    name: str | None = _may_change(None)
    """Name shown in W&B; None = the run folder's name."""
    group: str | None = _may_change(None)
    """W&B group; None = the run's id, so that its evaluations lie beside it."""
    tags: list[str] = field(default_factory=list, metadata={"may_change": True})
    """W&B tags."""
    timeout: float = _may_change(60.0)
    """Seconds the end of a run waits for W&B to take the last rows, 500 at most; training never
    waits."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    extractor: str = _may_change("inception")
    """Network whose features are compared: inception (for published numbers: FID, IS, KID),
    efficientnet-lite0 (needs no download), or module:Class for one of your own."""
    extractor_weights: str = _may_change("")
    """File of Inception's weights; "" = torch's hub cache, filled by a download if need be."""
    layer: str = _may_change("")
    """Feature layer to compare; "" = the extractor's default (2048 or 1280 numbers)."""
    num_images: int = _may_change(50_000)
    """Images generated per checkpoint. Scores of different numbers cannot be compared."""
    reference_images: int = _may_change(0)
    """Images of data.shards to compare with; 0 = all of them."""
    reference: str = _may_change("")
    """Reference file to use, refused unless it fits; "" = one in cache_dir, made when missing."""
    batch_size: int = _may_change(64)
    """Images per forward pass on each rank; scores depend on it in their last digits."""
    seed: int = _may_change(0)
    """Seed of the noise that images are generated from; 0 to 2**63 - 1."""
    weights: Literal["ema", "raw"] = _may_change("ema")
    """Evaluate G_ema, or G itself."""
    precision: Literal["auto", "fp32", "bf16"] = _may_change("fp32")
    """Arithmetic of the extractor. auto = bf16 where extractor and hardware do it natively."""
    cache_dir: str = _may_change("~/.cache/dcgan-pipeline/references")
    """Folder for reference files that were computed."""
    parzen_shards: str = _may_change("")
    """Folder or URL of shards that were not trained on, for --metrics parzen."""
    keep_best: bool = _may_change(False)
    """Training keeps the best evaluated checkpoint and removes none that is not yet evaluated:
    only with an evaluation that runs beside it, else they fill the disk."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. ``load`` is the only way to make one from files."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def images_per_step(self) -> int:
        """Real images that a step of G, with its steps of D, has seen."""
        return self.data.batch_size * self.optim.d_steps


def flatten(config: Config) -> dict[str, Any]:
    """``{"section.key": value}`` in the order of the dataclasses."""
    return {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }


def fixed_differences(old: Config, new: Config) -> list[str]:
    """Differences that forbid a resume: lines ``key: old -> new`` for keys that may not change."""
    free = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(old)
        for entry in dataclasses.fields(getattr(old, section.name))
        if entry.metadata.get("may_change")
    }
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if key not in free and before[key] != after[key]
    ]


def micro_batching(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with batch_size = world_size * accumulation * micro_batch.

    Raises:
        ConfigError: the batch cannot be cut evenly for this world size.
    """
    batch, micro = config.data.batch_size, config.train.micro_batch
    unit = world_size * (micro or 1)
    if batch % unit:
        lower, upper = batch // unit * unit, (batch // unit + 1) * unit
        choice = f"{lower} or {upper}" if lower else f"{upper}"
        parts = f"world_size ({world_size})"
        if micro:
            parts += f" x train.micro_batch ({micro}) = {unit}"
        raise ConfigError(
            f"data.batch_size ({batch}) must be divisible by {parts}: use {choice}, "
            "or another number of processes."
        )
    micro = micro or batch // world_size
    if micro == 1:
        raise ConfigError(
            f"data.batch_size ({batch}): 1 image per rank, but BatchNorm needs at least 2; use "
            f"{2 * world_size} or more, or fewer processes."
        )
    return micro, batch // (world_size * micro)


def micro_batch_advice(config: Config, world_size: int) -> str:
    """Return what a training that ran out of memory can change: a smaller micro-batch."""
    batch, micro = config.data.batch_size, config.train.micro_batch
    micro = micro or batch // world_size
    smaller = [m for m in range(2, micro) if batch % (m * world_size) == 0]
    lower = f"model.ngf ({config.model.ngf}) and model.ndf ({config.model.ndf})"
    if not smaller:
        return f"train.micro_batch ({micro}) cannot be smaller; lower {lower}."
    return (
        f"train.micro_batch ({micro}) images pass through the networks at once; set "
        f"train.micro_batch={smaller[-1]} or a smaller divisor of data.batch_size ({batch}): the "
        f"same batch in more accumulation steps. If that is not enough, lower {lower}."
    )

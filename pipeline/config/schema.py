"""The configuration of a run: one frozen dataclass per YAML section.

``loading.load`` makes a ``Config`` from files, and ``rules`` checks it. The docstring of a field is
the reference of its key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.config.recipe import (
    Loss,
    ScheduleConfig,
    StabilityConfig,
)
from pipeline.runtime import text

T = TypeVar("T")
SIZES = (8, 256)
"""The smallest and the largest ``model.image_size``, of the mlp."""
DCGAN_SIZES = (32, 64, 128, 256)


def _may_change(default: T) -> T:
    """Return a field that a resume may change, because it does not change what is computed."""
    return field(default=default, metadata={"may_change": True})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = _may_change("runs/default")
    """Folder for all files of the run. Starting a run in the folder of an earlier one resumes
    it."""
    seed: int = 0
    """Seed of the initial weights, the data order, z and the sample grids; 0 to 2**63 - 1."""
    fork: str = _may_change("")
    """Folder of another run whose newest checkpoint a new run starts from. It keeps the step and
    the networks of that run; every key outside ``model`` may differ. "" = new weights."""
    accept_changes: bool = _may_change(False)
    """Let this resume change learning rates, betas, train.ema_*, train.mirror and the sections
    stability and schedule. Checkpoints from then on list the change. False = refuse it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: Literal["dcgan", "mlp"] = "dcgan"
    """``dcgan``: the convolutional networks of Radford et al. 2016. ``mlp``: the fully connected
    networks of Goodfellow et al. 2014."""
    image_size: int = 64
    """Height and width of the images in pixels. dcgan: 32, 64, 128 or 256. mlp: 8 to 256."""
    channels: int = 3
    """Image channels: 1 (gray) or 3 (RGB)."""
    z_dim: int = 100
    """Length of the noise vector z, 1 to 65536."""
    z_distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of z: uniform on [-1, 1), or standard normal."""
    ngf: int = 64
    """Width of G, 1 to 65536. dcgan: feature maps before the output layer; each lower resolution
    has twice as many. mlp: units of each hidden layer."""
    ndf: int = 64
    """Width of D, 1 to 65536. dcgan: feature maps after the first layer; each lower resolution has
    twice as many. mlp: units of each hidden layer."""
    kernel_size: Literal[4, 5] = 4
    """Kernel size of the strided convolutions: 5 as in figure 1 of the DCGAN paper, 4 as in most
    later code."""
    num_classes: int = 0
    """Number of classes of a class-conditional model, at least 2. The labels of the shards must be
    0 to num_classes - 1, and each must occur. Sample grids and image sets take equally many images
    of each class; evaluations follow eval.labels. 0 = unconditional."""
    maxout: int = 0
    """mlp only: linear pieces of each maxout unit in D, at least 2; 0 = ReLU."""
    dropout: float = 0.0
    """mlp only: dropout probability of D's hidden units during training, in [0, 1); 0 = no
    dropout."""
    d_norm: Literal["batch", "none", "spectral"] = "batch"
    """Normalisation in D. batch: BatchNorm, as in the DCGAN paper. none: no normalisation, and
    initial weights after He et al. 2015. spectral: the weights are divided by their largest
    singular value, without BatchNorm. The mlp has no BatchNorm: there batch is none."""
    loss: Loss = "non_saturating"
    """Objectives of D and G. non_saturating and minimax: D maximises V(D, G) of the 2014 paper, and
    G maximises log D(G(z)) or minimises log(1 - D(G(z))). hinge and least_squares apply to both.
    relativistic: D tells which image of a pair is real (R3GAN); use it with r1_gamma, r2_gamma."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of an image."""
        return self.image_size, self.image_size, self.channels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = _may_change("data/shards")
    """Folder or URL (http, https, s3, gs) with index.json and the tar shards that it lists, or an
    index file FILE.json. Several sets of one image size are read as one: a list, A::B, or braces
    like s3://bucket/part-{00..07}. Logins for http are read from ~/.netrc. Tokens in a query are
    not stored with the run."""
    batch_size: int = 128
    """Images per optimizer step of D, over all ranks and micro-batches, 1 to
    1048576."""
    workers: int = _may_change(2)
    """Decoding processes per rank, at most 256; 0 = decode in the training process."""
    prefetch: int = _may_change(4)
    """Batches that each worker prefetches, 1 to 1024."""
    order: Literal["auto", "uniform", "shards"] = "auto"
    """Chooses block, window and lanes if neither block nor window is set. uniform: 1, 0 and 1.
    shards: whole shards, windows of 3 and as many lanes as cache_gib has room for. auto: shards if
    a remote set does not fit cache_gib, else uniform. A resumed run keeps its first choice."""
    block: int | None = None
    """Number of samples that the shuffle keeps together, at least 1 = a uniform permutation of the
    set; None = data.order chooses. 64 to 256, with window = 8192, suit shards on slow disks."""
    window: int | None = None
    """Number of samples that are shuffled among each other after the shuffle of the blocks; 0 = no
    second shuffle, None = data.order chooses."""
    lanes: int | None = None
    """Number of shuffle lanes, at least 1; None = data.order chooses. A node reads whole shards if
    the job never uses more nodes than lanes (MosaicML: num_canonical_nodes)."""
    cache_dir: str = _may_change("")
    """Folder on the local disk of each node for shards that are downloaded from a URL. "" = a
    folder in $SLURM_TMPDIR or $TMPDIR, else ~/.cache/dcgan-pipeline/shards; the log says which."""
    cache_gib: float = _may_change(0.0)
    """Size limit of the cache in GiB; the shards that are needed last are removed. 0 = no limit."""
    verify: Literal["auto", "sha256", "size"] = _may_change("auto")
    """How local shards are checked: sha256 = checksums of all bytes before the first step, auto =
    the same up to 2 GiB and during the first epoch above, size = file sizes only. Downloaded shards
    are always checked by SHA-256."""
    skip_damaged: int = _may_change(0)
    """Number of damaged samples that each data worker may pass over, 0 to 1000000; 0 = the first
    one ends the run. The next sample of the set takes the place of a damaged one, and the log names
    both. A shard whose bytes differ from the index always ends the run."""
    record_ids: bool = _may_change(False)
    """Write the sample ids of every batch to ids/rank_*.jsonl, to audit the data order."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    g_lr: float = 2e-4
    """Learning rate of Adam for G, above 0 and at most 1e30."""
    d_lr: float = 2e-4
    """Learning rate of Adam for D, above 0 and at most 1e30."""
    beta1: float = 0.5
    """Adam's decay rate of the first moment, in [0, 1)."""
    beta2: float = 0.999
    """Adam's decay rate of the second moment, in [0, 1)."""
    d_steps: int = 1
    """Updates of D per update of G, each with its own batch; 1 to 65536 (k in algorithm 1 of the
    2014 paper)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    total_steps: int = _may_change(100_000)
    """Number of optimizer steps of G in the whole run, at least 1."""
    init: str = ""
    """Run folder, checkpoint or snapshot whose weights a new run starts from, at step 0. All keys
    that change no shape may differ. "" = new weights."""
    init_networks: Literal["both", "G", "D"] = "both"
    """Networks to take from train.init; a snapshot has G alone. G brings G_ema along."""
    init_optimizers: bool = False
    """Also take Adam's moments from train.init."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward and backward passes; weights and optimizer states are fp32. auto =
    bf16 if the hardware multiplies it natively, else fp32; a resumed run keeps its first choice.
    fp16 needs a GPU. In fp32, PyTorch trains convolutions in TF32 on GPUs since Ampere; samples
    never use TF32."""
    micro_batch: int | None = None
    """Images per forward pass, which is also the BatchNorm group. batch_size = ranks x accumulation
    steps x micro_batch. None = batch_size / ranks. Set it to keep the computation the same on any
    number of ranks, or lower it to save memory."""
    mirror: bool = False
    """Flip each training image left to right with probability 1/2, independently each time that it
    is read. References of evaluations are not flipped."""
    exact_sum: bool = False
    """Sum gradients and losses as integers, so that G, D and G_ema have the same bits on any number
    of ranks, and across resumes on other numbers. Needs micro_batch, and fp32 or bf16. On CPUs each
    rank then computes with one thread; on GPUs deterministic is implied. The ranks must have the
    same type of processor or GPU."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between ranks. bf16 halves the bytes, and keeps 8 bits of each
    gradient and of its sum over the ranks. Weights, Adam and sums over a rank's micro-batches stay
    fp32. No effect with one process."""
    ema_decay: float = 0.999
    """Decay of the weight average, in [0, 1): G_ema <- decay * G_ema + (1 - decay) * G after each
    step; 0 = G_ema is a copy of G."""
    ema_kimg: float = 0.0
    """Half-life of the weight average in thousands of images, 0 to 1000000: it replaces ema_decay
    and does not depend on the batch size. 0 = ema_decay."""
    ema_rampup: float = 0.0
    """Largest half-life of ema_kimg as a share of the images seen so far, 0 to 1: a short average
    at first (StyleGAN2: 0.05). 0 = no ramp-up."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all ranks instead of one micro-batch (GPUs only)."""
    channels_last: bool = True
    """Use the channels_last (NHWC) memory format for the convolutions."""
    compile: bool = _may_change(False)
    """Compile G and D with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead"] = _may_change("default")
    """Mode of torch.compile. reduce-overhead also replays CUDA graphs, which helps when batches are
    so small that the GPU waits for Python."""
    deterministic: bool = _may_change(False)
    """Use deterministic kernels on GPUs, so that a resume repeats the same bits. They are slower,
    and PyTorch warns where it has none. False = cuDNN chooses the fastest kernels by benchmark. CPU
    kernels are always deterministic."""
    checkpoint_every: int = _may_change(1000)
    """Steps between checkpoints; 0 = only at the end, on a stop signal and by
    checkpoint_minutes."""
    checkpoint_minutes: float = _may_change(15.0)
    """Minutes after the last checkpoint at which another one is written; 0 = never by time."""
    keep: int = _may_change(3)
    """Number of newest checkpoints to keep, at least 1."""
    keep_every: int = _may_change(0)
    """Also keep the checkpoints at multiples of this many steps; 0 = none."""
    sample_every: int = _may_change(500)
    """Steps between sample grids from fixed z; 0 = only at the end."""
    log_every: int = _may_change(50)
    """Steps between rows of metrics.jsonl, at least 1. Only logging waits for the device."""
    watch: Literal["off", "warn", "stop", "heal"] = _may_change("warn")
    """What to do once rows have shown a collapse for watch_steps: D has won, or G makes almost one
    image. warn = say it once. stop = end the run with exit code 3. heal = go back to a checkpoint
    from before it, multiply gamma of R1 and R2 by 4, or without them D's learning rate by 1/4, and
    train on; stop when that has not helped watch_healings times."""
    watch_steps: int = _may_change(500)
    """Steps that a sign of a collapse must last, at least 1. As many first steps do not count."""
    watch_healings: int = _may_change(3)
    """Number of times that watch=heal goes back in a run, 0 or more."""
    profile_steps: list[int] = field(default_factory=list, metadata={"may_change": True})
    """First and last step, at most 100, of which rank 0 writes a trace and a table of operators to
    profile/ in the run folder; [] = none."""
    rank_timeout: float = _may_change(600.0)
    """Seconds that ranks wait for one that is lost or hangs before they end, 1 to 86400. Writing a
    checkpoint and compiling must be faster."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = _may_change("auto")
    """W&B mode. auto = WANDB_DISABLED or WANDB_MODE if set, else online with an API key."""
    project: str | None = _may_change(None)
    """W&B project; None = WANDB_PROJECT if set, else dcgan."""
    entity: str | None = _may_change(None)
    """W&B team or user; None = WANDB_ENTITY if set, else the default of the API key."""
    name: str | None = _may_change(None)
    """Display name of the run in W&B; None = WANDB_NAME if set, else the name of the run folder."""
    group: str | None = _may_change(None)
    """W&B group; None = WANDB_RUN_GROUP if set, else the run id, as for its evaluations."""
    tags: list[str] = field(default_factory=list, metadata={"may_change": True})
    """W&B tags of 1 to 64 characters; [] = WANDB_TAGS if set."""
    timeout: float = _may_change(60.0)
    """Seconds that the end of a run waits for W&B and TensorBoard to receive the last rows, 0 to
    500. Training never waits."""
    tensorboard: bool = _may_change(False)
    """Also write rows, grids and scores for TensorBoard, to tensorboard/ in the run folder."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    extractor: str = _may_change("inception")
    """Feature extractor: inception (FID, IS and KID comparable with published ones),
    efficientnet-lite0 (needs no download), another one of torch-fidelity (e.g. dinov2-vit-l-14), or
    module:Class for your own."""
    extractor_weights: str = _may_change("")
    """Local file with the extractor's weights, or a folder that has it; "" = in torch's hub cache,
    downloaded if missing, or those of the package."""
    more_extractors: list[str] = field(default_factory=list, metadata={"may_change": True})
    """Further extractors to score the same generated images with, each as if it were alone."""
    layer: str = _may_change("")
    """Feature layer to compare; "" = the extractor's default (2048 or 1280 features)."""
    metrics: list[str] = field(default_factory=list, metadata={"may_change": True})
    """Metrics to compute: any of fid, kid, is, prc, density_coverage, mind, memorization,
    class_fid. One that has too few images is refused. [] = fid, kid, is and prc, without those
    that are impossible."""
    force: bool = _may_change(False)
    """Compute a Frechet distance of fewer images than twice the number of features. Its name ends
    in undersampled: most of it is the bias of the estimate."""
    num_images: int = _may_change(50_000)
    """Number of generated images per checkpoint, at least 2. Scores of different numbers are not
    comparable."""
    reference_images: int = _may_change(0)
    """Number of images of data.shards to compare with, at least 2; 0 = all."""
    reference: str = _may_change("")
    """Reference file to use; it must match the data and these settings. Or mu and sigma as an npz
    file, for fid alone. "" = a file in cache_dir, which is computed if missing."""
    batch_size: int = _may_change(64)
    """Images per forward pass on each rank, 1 to 65536. It changes the last digits of the
    scores."""
    seed: int = _may_change(0)
    """Seed of the z that images are generated from; 0 to 2**63 - 1."""
    seeds: list[int] = field(default_factory=list, metadata={"may_change": True})
    """Seeds to use in place of seed, each once: scores are then the mean over them, and _sd their
    standard deviation. [] = seed."""
    weights: Literal["ema", "raw"] = _may_change("ema")
    """Network to evaluate: ema = G_ema, raw = G."""
    labels: Literal["data", "uniform"] = _may_change("data")
    """Classes of the images that a class-conditional G makes: data = in the shares that they have
    in data.shards, uniform = equally many of each."""
    precision: Literal["auto", "fp32", "bf16"] = _may_change("fp32")
    """Precision of the extractor. auto = bf16 if extractor and hardware support it, else fp32."""
    cache_dir: str = _may_change("~/.cache/dcgan-pipeline/references")
    """Folder for computed reference files."""
    held_out: str = _may_change("")
    """Folder or URL of shards with images that G was not trained on, for the metric memorization;
    "" = none."""
    parzen_shards: str = _may_change("")
    """Folder or URL of held-out shards for --metrics parzen; "" = none."""
    keep_best: bool = _may_change(False)
    """Let training keep the best evaluated checkpoint, and all not yet evaluated. Use it only with
    an evaluation that runs beside the training: otherwise all checkpoints stay on the disk."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def images_per_step(self) -> int:
        """Return the number of real images per step of G: a batch for each update of D."""
        return self.data.batch_size * self.optim.d_steps


def flatten(config: Config) -> dict[str, Any]:
    """Return ``{"section.key": value}`` in the order of the dataclasses."""
    return {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }


def without_credentials(config: Config) -> Config:
    """Return what may be stored with a run: URLs without the tokens and signatures of their query.

    A resume gets them from its command line.
    """
    data = dataclasses.replace(config.data, shards=text.without_credentials(config.data.shards))
    held_out, parzen = map(
        text.without_credentials, (config.eval.held_out, config.eval.parzen_shards)
    )
    changed = dataclasses.replace(config.eval, held_out=held_out, parzen_shards=parzen)
    return dataclasses.replace(config, data=data, eval=changed)

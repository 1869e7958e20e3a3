"""Guess which key of the configuration is meant by one that does not exist."""

from __future__ import annotations

import dataclasses
import difflib

from pipeline.config.schema import Config
from pipeline.config.values import show, types_of_keys
from pipeline.config.yaml_file import Value
from pipeline.runtime.text import printable

REMOVED_KEYS = {
    "train.cuda_graph": ("false", "set train.compile=true train.compile_mode=reduce-overhead"),
    "model.spectral_norm": ("false", "set model.d_norm=spectral"),
}
"""Keys that old run folders still hold: the value that changes nothing, and what to set instead."""
CLOSE = 0.75
"""Least similarity (difflib) of two names that may be one name mistyped."""
LAUNCH = "accelerate launch --multi_gpu --num_processes N ... starts N processes"
STEPS = "did you mean train.total_steps? An epoch is images / data.batch_size steps"
SYNONYMS = {
    "adam": "the optimizer is Adam; its keys are those of optim",
    "arch network type model.name": "did you mean model.architecture?",
    "aug augmentation augmentations ada diffaugment diffaug": "did you mean stability.augment?",
    "batch batchsize bs bsz minibatch mini_batch": "did you mean data.batch_size?",
    "beta betas momentum": "did you mean optim.beta1 and optim.beta2?",
    "cfg config": "--config FILE names the file",
    "checkpoint checkpoints ckpt save snap snapshot save_every save_steps save_interval "
    "checkpoint_interval": "did you mean train.checkpoint_every?",
    "classes conditional cond n_classes": "did you mean model.num_classes?",
    "cuda device": "a GPU is used if there is one; CUDA_VISIBLE_DEVICES= hides it",
    "data.dir data.name data.source data.url data dataset dataroot data_dir data_path images path "
    "root": "did you mean data.shards? Make them with python -m pipeline.prepare",
    "devices gpu gpus gpu_ids nodes nproc num_gpus num_processes ranks world_size": LAUNCH,
    "ema g_ema": "did you mean train.ema_decay?",
    "epoch epochs max_epochs n_epochs num_epochs": STEPS,
    "fid": "did you mean eval.metrics?",
    "flip hflip horizontal_flip": "did you mean train.mirror?",
    "amp float16 fp16 bf16 half mixed_precision dtype": "did you mean train.precision?",
    "gamma r1": "did you mean stability.r1_gamma?",
    "grad_accum gradient_accumulation_steps accumulation": "did you mean train.micro_batch? "
    "data.batch_size = ranks x accumulation x train.micro_batch",
    "img_size image res resolution size": "did you mean model.image_size?",
    "iterations iters max_steps n_steps niter num_steps steps max_iter": "did you mean "
    "train.total_steps?",
    "kimg": "did you mean train.total_steps? A step is data.batch_size images",
    "latent latent_dim latent_size noise_dim nz z": "did you mean model.z_dim?",
    "log log_interval log_steps print_every print_freq": "did you mean train.log_every?",
    "logger tracker report_to tracking.enabled tracking.mode": "did you mean tracking.wandb?",
    "lr learning_rate rate": "did you mean optim.g_lr and optim.d_lr?",
    "nc num_channels colors": "did you mean model.channels?",
    "base_channels features width": "did you mean model.ngf and model.ndf?",
    "n_critic critic_iters k": "did you mean optim.d_steps?",
    "num_workers n_workers threads": "did you mean data.workers?",
    "out outdir out_dir output output_dir folder logdir log_dir save_dir": "did you mean run.dir?",
    "pretrained weights init_from transfer": "did you mean train.init?",
    "random_seed manual_seed": "did you mean run.seed?",
    "restart resume resume_from": "the same command resumes the run in run.dir; "
    "run.fork and train.init start a new run from the weights of another",
    "sample samples sample_interval": "did you mean train.sample_every?",
    "scheduler lr_scheduler decay": "did you mean schedule.g_lr and schedule.d_lr, with "
    "schedule.end?",
    "spectral spectral_norm sn": "did you mean model.d_norm?",
    "wandb_project": "did you mean tracking.project?",
    "weight_decay": "Adam has no weight decay here",
}
"""What other programs call a key, by name or as section.name, and the answer."""
_ANSWERS = {word: answer for words, answer in SYNONYMS.items() for word in words.split()}


def about_unknown(key: str, value: Value) -> str:
    """Return what is wrong with a key that is none, and which one may be meant."""
    known = list(types_of_keys())
    shown = f"{printable(key[:100])} ({show(value)})"
    if key in REMOVED_KEYS:
        return f"{shown}: no longer exists; {REMOVED_KEYS[key][1]}"
    if owner := next((k for k in known if key.startswith(f"{k}.")), None):
        return f"{shown}: {owner} holds one value and no keys; write {owner}=VALUE"
    if key in {k.partition(".")[0] for k in known}:
        return f"{shown}: must hold keys; {_keys_of(key)}"
    return f"{shown}: unknown key; {hint(key)}"


def hint(key: str) -> str:
    """Return the answer to a key that does not exist: a guess if one is near, else what there is.

    Args:
        key: as the user wrote it, with or without a section.
    """
    known = list(types_of_keys())
    wanted = key[:100].lower().replace("-", "_").partition("[")[0]
    section, _, name = wanted.rpartition(".")
    listed = [k.partition(".")[2] for k in known if k.startswith(f"{section}.")]
    same = [k for k in known if name and k.endswith(f".{name}")]
    if answer := _ANSWERS.get(wanted) or ("" if same else _ANSWERS.get(name)):
        return answer
    if same:
        return f"did you mean {same[0]}?"
    if listed:
        names = {k: f"{section}.{k}" for k in listed}
    else:
        names = {k.partition(".")[2]: k for k in reversed(known)} | {k: k for k in known}
    near = difflib.get_close_matches(name if listed else wanted, names, n=1, cutoff=CLOSE)
    return f"did you mean {names[near[0]]}?" if near else _keys_of(section)


def _keys_of(section: str) -> str:
    """Return the list of a section's keys, or of the sections if there is none of this name."""
    listed = [k.partition(".")[2] for k in types_of_keys() if k.startswith(f"{section}.")]
    if listed:
        return f"keys of {section}: {', '.join(listed)}"
    return f"sections: {', '.join(entry.name for entry in dataclasses.fields(Config))}"

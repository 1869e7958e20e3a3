"""Write the model card of a folder for the Hub: what G is, its scores, how it was trained."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.schema import Config, ModelConfig, flatten
from pipeline.data.shards import read_index
from pipeline.models.sampling import generator_id
from pipeline.runs.announce import project_address
from pipeline.runs.generators import Opened
from pipeline.runs.results import read_rows
from pipeline.runs.score_tables import describe_settings
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import UserError

SECTIONS = ("data", "optim", "train", "stability")
"""Sections of the configuration whose values the card states, if they are not the defaults."""
ALWAYS = ("data.batch_size", "optim.g_lr", "optim.d_lr", "train.total_steps", "run.seed")
PLACES = ("data.shards", "data.cache_dir")


def provenance(opened: Opened) -> str:
    """Return the sections of a model card on scores and training, from the run that G is of.

    Nothing of it is a path of this machine but the name of the folder of the shards.

    Args:
        opened: a G of this pipeline. Of one outside its run, scores and commit are unknown.
    """
    if opened.config is None:
        return ""
    run_dir = Path(opened.location).expanduser().resolve().parents[1]
    is_run = (run_dir / "run.json").is_file()
    rows = [
        row
        for row in (read_rows(run_dir) if is_run else [])
        if row.get("generator") == generator_id(opened.model, opened.G.state_dict())
    ]
    text = ""
    if rows:
        text += "## Scores\n\n"
    for row in rows:
        scores = "".join(
            f"| `{key}` | {value:.5g} |\n"
            for key, value in row["scores"].items()
            if value is not None
        )
        text += f"Protocol {row['protocol']}: {describe_settings(row.get('settings', {}))}\n\n"
        text += f"| score | value |\n|---|---|\n{scores}\n"
    return f"{text}## Training\n\n{_table(_training(opened.config, run_dir, is_run))}\n"


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"| | |\n|---|---|\n{rows}"


def _training(config: Config, run_dir: Path, is_run: bool) -> dict[str, Any]:
    """Return how G was trained: program, commit, data, and settings that are not the defaults."""
    facts: dict[str, Any] = {"program": f"dcgan-pipeline {version('dcgan-pipeline')}"}
    if address := project_address():
        facts["program"] += f", {address}"
    if is_run and (commits := _commits(run_dir)):
        facts["commit"] = ", ".join(commits)
    facts |= _data(config)
    values, defaults = flatten(config), flatten(Config())
    for key, value in values.items():
        changed = key.partition(".")[0] in SECTIONS and value != defaults[key]
        if key not in PLACES and (changed or key in ALWAYS):
            facts[f"`{key}`"] = value
    return facts


def _commits(run_dir: Path) -> list[str]:
    """Return the commits of the program in the order in which they trained the run."""
    with suppress(OSError, DamagedFile):
        log = read_bytes(run_dir / "log.txt").decode(errors="replace")
        return list(dict.fromkeys(re.findall(r"commit ([0-9a-f]{7,40}(?:-dirty)?), Python", log)))
    return []


def _data(config: Config) -> dict[str, str]:
    """Return what is known of the training images; their index may be elsewhere today."""
    name = config.data.shards.rstrip("/").rpartition("/")[2]
    try:
        index = read_index(config.data.shards)
    except (UserError, OSError):
        return {"data": name}
    crop = index.made_by.get("crop")
    facts = {"data": f"{name}, {index.num_samples} images", "sha256 of the data": index.fingerprint}
    return facts | ({"images were made": str(crop)} if crop else {})


def model_card(
    model: ModelConfig,
    weights: dict[str, Tensor],
    facts: dict[str, str],
    licence: str | None,
    sections: str = "",
) -> str:
    """Return the model card, README.md; see ``export.write_hub_folder``."""
    parameters = sum(p.numel() for name, p in weights.items() if "running_" not in name and p.ndim)
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    z = "torch.rand(64, c['z_dim']) * 2 - 1"
    if model.z_distribution == "normal":
        z = "torch.randn(64, c['z_dim'])"
    size, kind, paper = model.image_size, "Fully connected GAN", ""
    if model.architecture == "dcgan":
        kind, paper = "DCGAN", " as in Radford et al. 2016"
    classes = f" and a class as {model.num_classes} one-hot numbers" if model.num_classes else ""
    front = "".join(
        [
            "---\n",
            f"license: {licence}\n" if licence else "",
            "pipeline_tag: unconditional-image-generation\n",
            f"tags:\n- {model.architecture}\n- gan\n- pytorch\n- safetensors\n",
            "---\n",
        ]
    )
    plain = model.architecture == "dcgan" and not model.num_classes
    without_pipeline = WITHOUT_PIPELINE.format(z=z) if plain else ""
    return f"""{front}
# {kind} generator, {size}x{size}

![64 uncurated samples](grid.png)

This is G of a GAN (Goodfellow et al. 2014){paper}. It has {parameters:,} parameters. It maps
{model.z_dim} {model.z_distribution} numbers z{classes} to {size}x{size} images with
{model.channels} channel{"s" if model.channels > 1 else ""}.

| | |
|---|---|
{table}
{sections}## Use

In a copy of this folder, with the pipeline that trained G:

```bash
python -m pipeline.generate grid --snapshot . --out samples.png
python -m pipeline.generate images --snapshot . --num 1000 --out images
```

```python
from pipeline.generation.latent import Table
from pipeline.models.sampling import draw_images
from pipeline.runs.generators import open_generator
opened = open_generator(".")  # or the folder that huggingface_hub.snapshot_download returns
images = draw_images(opened.G, Table(opened.model, seed=0).cut(0, 16))  # (16, H, W, C) uint8
```
{without_pipeline}
`model.safetensors` holds G with BatchNorm statistics for sampling, so an image does not depend on
the others of its batch. The licence of the training images is not known to the program that wrote
this card.
"""


WITHOUT_PIPELINE = """
With torch and safetensors alone:

```python
import json, pathlib, torch
from safetensors.torch import load_file
from torch.nn import functional as F
c, size = json.loads(pathlib.Path("config.json").read_text()), 4
w = load_file("model.safetensors")
z = {z}
x, k = F.conv_transpose2d(z[:, :, None, None], w["layers.project.weight"]), c["kernel_size"]
while size < c["image_size"]:
    n = f"layers.norm_{{size}}."
    statistics, gain = (w[n + "running_mean"], w[n + "running_var"]), w[n + "weight"]
    x, size = F.relu(F.batch_norm(x, *statistics, gain, w[n + "bias"])), 2 * size
    up = w.get(f"layers.up_{{size}}.weight", w["layers.to_image.weight"])
    x = F.conv_transpose2d(x, up, stride=2, padding=(k - 1) // 2, output_padding=k % 2)
images = x.tanh()  # (64, channels, image_size, image_size) in [-1, 1]
```
"""

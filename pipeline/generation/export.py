"""G for other programs: an ONNX file, and a folder for the Hugging Face Hub.

Weights leave as safetensors or ONNX only: nothing here is ever pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.generation.figures import png
from pipeline.models.noise import z_rows
from pipeline.models.sampling import draw_images, image_grid
from pipeline.runs.checkpoint import HUB_WEIGHTS, to_cpu_contiguous
from pipeline.runtime.errors import GenerationError
from pipeline.runtime.files import sync_folder, write_atomic

OPSET = 20
TOLERANCE = 1e-4  # of values in [-1, 1]: a grey level is 0.0078
CHECKED_BATCHES = (1, 7, 64)
HUB_FILES = ("README.md", HUB_WEIGHTS, "config.yaml", "config.json", "grid.png")


def need(modules: tuple[str, ...], what: str, remedy: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        GenerationError: naming the packages and how to get them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise GenerationError(f"{what}: needs {', '.join(missing)}; install with: {remedy}")


def onnx_bytes(G: nn.Module, model: ModelConfig, description: dict[str, str]) -> bytes:
    """G as an ONNX model: ``z`` (n, z_dim + num_classes) float32 -> ``images`` (n, C, S, S).

    Images are float32 in [-1, 1], n is any. BatchNorm uses the standing statistics, so images do
    not depend on their batch.

    Args:
        G: on the CPU, in eval mode.
        model: its architecture.
        description: kept in the file's metadata.
    """
    import onnx

    z = z_rows(model, 0, "onnx example", 0, 2)
    # The exporter reports its stages and its own deprecations, none of which a user can act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            G,
            (z,),
            input_names=["z"],
            output_names=["images"],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    exported: Any = program.model_proto
    for node in exported.graph.node:  # stack traces of the exporting program: its paths
        del node.metadata_props[:]
    for value in (*exported.graph.value_info, *exported.graph.input, *exported.graph.output):
        del value.metadata_props[:]
    onnx.helper.set_model_props(exported, description)
    onnx.checker.check_model(exported, full_check=True)
    content: bytes = exported.SerializeToString()
    return content


def onnx_difference(content: bytes, G: nn.Module, model: ModelConfig, seed: int) -> float:
    """The largest difference between onnxruntime and torch over random z, of values in [-1, 1].

    Raises:
        GenerationError: it exceeds the rounding of float32.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in CHECKED_BATCHES:
        z = z_rows(model, seed, "onnx check", 0, count)
        with torch.no_grad():
            ours = G(z).numpy()
        largest = max(largest, float(np.abs(session.run(None, {"z": z.numpy()})[0] - ours).max()))
    if not largest <= TOLERANCE:
        raise GenerationError(
            f"onnx: onnxruntime's images differ from torch's by {largest:.3g}, allowed are "
            f"{TOLERANCE:g}; nothing was written. Please report the versions of torch and onnx."
        )
    return largest


def write_hub_folder(
    out: Path, G: nn.Module, model: ModelConfig, z: Tensor, facts: dict[str, str], licence: str
) -> None:
    """A folder as the Hugging Face Hub shows it: model card, weights, configuration, a grid.

    The configuration holds the architecture alone, no paths of the machine it was trained on.

    Args:
        out: must not exist; it is there whole or not at all.
        G: in eval mode, on any device.
        model: its architecture.
        z: (64, z_dim) of the example grid.
        facts: what the model card says about the weights.
        licence: identifier for the card, "" = none is stated.

    Raises:
        GenerationError: it cannot be written.
    """
    weights = to_cpu_contiguous(G.state_dict())
    try:
        # A name of its own: one that a kill has left behind may have this process's number.
        partial = out.with_name(f"{out.name}.{uuid4().hex}.tmp")
        partial.mkdir()
    except OSError as error:
        raise GenerationError(f"--out ({out}): cannot be written: {error}.") from None
    try:
        write_atomic(partial / HUB_WEIGHTS, save(weights, metadata={"format": "pt"}))
        for name, content in _configuration(model).items():
            write_atomic(partial / name, content)
        write_atomic(partial / "grid.png", png(image_grid(draw_images(G, z))))
        card = _card(model, weights, facts, licence)
        write_atomic(partial / "README.md", card.encode())
        os.replace(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise GenerationError(f"--out ({out}): cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _configuration(model: ModelConfig) -> dict[str, bytes]:
    """The files that hold the architecture, by name."""
    settings = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    yaml = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
    return {
        "config.yaml": f"model:\n{yaml}".encode(),
        "config.json": json.dumps(settings, indent=1).encode(),
    }


def check_hub_folder(folder: Path, G: nn.Module, model: ModelConfig, source: Path) -> None:
    """Refuse to take a folder that was made before for the one of this G.

    Args:
        folder: as ``write_hub_folder`` leaves it; its card may have been edited.
        G: what is asked for.
        model: its architecture.
        source: where G comes from, for the message.

    Raises:
        GenerationError: not such a folder, or one with other weights or another configuration.
    """
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    if missing:
        raise GenerationError(
            f"--push: {folder} is no folder made for the Hub, it lacks {', '.join(missing)}; give "
            "--out a new name."
        )
    weights, files = to_cpu_contiguous(G.state_dict()), _configuration(model)
    try:
        there = load_file(folder / HUB_WEIGHTS)
        same = weights.keys() == there.keys() and all(
            torch.equal(value, there[name]) for name, value in weights.items()
        )
        same = same and all((folder / name).read_bytes() == files[name] for name in files)
    except (OSError, SafetensorError):
        same = False
    if not same:
        raise GenerationError(
            f"--push: {folder} was made before and holds another G than {source}; give --out a new "
            f"name, or remove {folder}."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a Hub folder with the token that huggingface_hub finds; returns where it lies.

    A new repository is private; its owner can open it on the site.

    Raises:
        GenerationError: not logged in, no network, or refused.
    """
    need(("huggingface_hub",), "--push", "pip install huggingface_hub")
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(HUB_FILES)
            )
        )
    except Exception as error:  # its own, and whatever its HTTP library raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GenerationError(
            f"--push ({repository}): {reason}. The folder {folder} is complete; log in with "
            "`hf auth login`, then run the same command again with --push."
        ) from None


def _card(
    model: ModelConfig, weights: dict[str, Tensor], facts: dict[str, str], licence: str
) -> str:
    numbers = sum(p.numel() for name, p in weights.items() if "running_" not in name and p.ndim)
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    noise = "torch.rand(64, c['z_dim']) * 2 - 1"
    if model.z_distribution == "normal":
        noise = "torch.randn(64, c['z_dim'])"
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
    simple = model.architecture == "dcgan" and not model.num_classes
    plain = PLAIN.format(noise=noise) if simple else ""
    return f"""{front}
# {kind} generator, {size}x{size}

![64 images, not chosen](grid.png)

G of a GAN (Goodfellow et al. 2014){paper}: {numbers:,} parameters,
{model.z_dim} {model.z_distribution} numbers z{classes} in, {size}x{size} images with
{model.channels} channel{"s" if model.channels > 1 else ""} out.

| | |
|---|---|
{table}
## Use

With the pipeline it was trained with, in a copy of this folder:

```bash
python -m pipeline.generate grid --snapshot . --out grid.png
python -m pipeline.generate images --snapshot . --num 1000 --out images
```
{plain}
`model.safetensors` holds G with the BatchNorm statistics for sampling: an image does not depend on
the others of its batch. This card does not know the licence of the training images.
"""


PLAIN = """
With torch and safetensors alone:

```python
import json, pathlib, torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F
c, size = json.loads(pathlib.Path("config.json").read_text()), 4
w = load_file("model.safetensors")
z = {noise}
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

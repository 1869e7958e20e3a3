"""Export G as an ONNX file, or as a folder for the Hugging Face Hub.

Weights are written as safetensors or ONNX, never pickled.
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
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.generation.figures import png
from pipeline.generation.model_card import model_card
from pipeline.models.noise import z_rows
from pipeline.models.sampling import draw_images, image_grid
from pipeline.runs.generators import Opened
from pipeline.runs.snapshot import HUB_WEIGHTS, weights_bytes
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import GenerationError
from pipeline.runtime.files import sync_folder, write_atomic
from pipeline.runtime.tensor_files import (
    LARGEST,
    parse_safetensors,
    tensors_sha256,
    to_cpu_contiguous,
)

OPSET = 20
TOLERANCE = 1e-4  # of pixels in [-1, 1], where a grey level is 0.0078
CHECKED_BATCHES = (1, 7, 64)
HUB_FILES = ("README.md", HUB_WEIGHTS, "config.yaml", "config.json", "grid.png")


def _require(modules: tuple[str, ...], what: str, remedy: str) -> None:
    """Raise ``GenerationError`` if one of the modules that ``what`` needs is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise GenerationError(f"{what}: needs {', '.join(missing)}; install with: {remedy}")


def describe(opened: Opened) -> dict[str, str]:
    """Return what an export says of its weights: snapshot, sha256, input."""
    return {
        "snapshot": opened.name,
        "sha256 of its weights": opened.sha256,
        "z": f"{opened.model.z_dim} numbers, {opened.model.z_distribution}",
    }


def onnx_bytes(G: nn.Module, model: ModelConfig, description: dict[str, str]) -> bytes:
    """Return the ONNX file of G: ``z`` (n, z_dim + num_classes) -> ``images`` (n, C, S, S).

    Both are float32, images are in [-1, 1], and n is dynamic. BatchNorm uses running statistics, so
    an image does not depend on its batch.

    Args:
        G: in eval mode, on the CPU.
        model: architecture of G.
        description: metadata of the file, by key.

    Raises:
        GenerationError: a package of the extra ``onnx`` is missing.
    """
    modules, remedy = ("onnx", "onnxscript", "onnxruntime"), "pip install 'dcgan-pipeline[onnx]'"
    _require(modules, "onnx", remedy)
    import onnx

    z = z_rows(model, 0, "onnx example", 0, 2)
    # The exporter prints its stages and deprecation warnings, none of which a user can act on.
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
    for node in exported.graph.node:  # stack traces, which contain paths of this machine
        del node.metadata_props[:]
    for value in (*exported.graph.value_info, *exported.graph.input, *exported.graph.output):
        del value.metadata_props[:]
    onnx.helper.set_model_props(exported, description)
    onnx.checker.check_model(exported, full_check=True)
    content: bytes = exported.SerializeToString()
    return content


def onnx_difference(content: bytes, G: nn.Module, model: ModelConfig, seed: int) -> float:
    """Return the largest difference between a pixel of onnxruntime and of torch, for random z.

    Raises:
        GenerationError: the difference exceeds ``TOLERANCE``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in CHECKED_BATCHES:
        z = z_rows(model, seed, "onnx check", 0, count)
        with torch.no_grad():
            expected = G(z).numpy()
        images = session.run(None, {"z": z.numpy()})[0]
        largest = max(largest, float(np.abs(images - expected).max()))
    if not largest <= TOLERANCE:
        raise GenerationError(
            f"onnx: pixels of onnxruntime differ from those of torch by up to {largest:.3g}, "
            f"allowed are {TOLERANCE:g}. No file was written. Please report the versions of torch, "
            "onnx and onnxruntime."
        )
    return largest


def write_hub_folder(
    out: Path,
    G: nn.Module,
    model: ModelConfig,
    z: Tensor,
    facts: dict[str, str],
    licence: str | None,
    sections: str = "",
) -> None:
    """Write a folder for the Hugging Face Hub: model card, weights, configuration and a grid.

    The configuration holds the architecture only, no paths of the machine that trained it.

    Args:
        out: must not exist. The folder appears under this name when it is complete.
        G: in eval mode, on any device.
        model: architecture of G.
        z: (64, z_dim + num_classes) of the example grid.
        facts: rows of the table in the model card.
        licence: identifier for the model card. None: the card names no licence.
        sections: more of the model card, in Markdown.

    Raises:
        GenerationError: the folder cannot be written.
    """
    weights = to_cpu_contiguous(G.state_dict())
    try:
        # Not named after the process id: a killed process may have had the same one.
        partial = out.with_name(f"{out.name}.{uuid4().hex}.tmp")
        partial.mkdir()
    except OSError as error:
        raise GenerationError(f"--out ({out}): cannot be written: {error}.") from None
    try:
        write_atomic(partial / HUB_WEIGHTS, weights_bytes(G, model, step=None))
        for name, content in _configuration(model).items():
            write_atomic(partial / name, content)
        write_atomic(partial / "grid.png", png(image_grid(draw_images(G, z))))
        card = model_card(model, weights, facts, licence, sections)
        write_atomic(partial / "README.md", card.encode())
        os.replace(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise GenerationError(f"--out ({out}): cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _configuration(model: ModelConfig) -> dict[str, bytes]:
    """Return the files that hold the architecture, by name."""
    settings = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    yaml = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
    return {
        "config.yaml": f"model:\n{yaml}".encode(),
        "config.json": json.dumps(settings, indent=1).encode(),
    }


def check_hub_folder(folder: Path, G: nn.Module, model: ModelConfig, source: str) -> None:
    """Check that an existing Hub folder holds this G.

    Args:
        folder: made by ``write_hub_folder``. Its model card may have been edited.
        G: the expected weights.
        model: the expected architecture.
        source: the snapshot of G, for the message.

    Raises:
        GenerationError: a file is missing, or weights or configuration differ.
        OSError: a file cannot be read.
    """
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    if missing:
        raise GenerationError(
            f"--out ({folder}): was not made by this command, it lacks {', '.join(missing)}; give "
            "another --out."
        )
    weights, files = to_cpu_contiguous(G.state_dict()), _configuration(model)
    name = HUB_WEIGHTS
    try:
        stored, _ = parse_safetensors(read_bytes(folder / name, LARGEST), folder)
        same = tensors_sha256(stored) == tensors_sha256(weights)
        for other in files if same else ():
            name, same = other, read_bytes(folder / other) == files[other]
            if not same:
                break
    except DamagedFile:
        same = False
    if not same:
        raise GenerationError(
            f"--out ({folder}): exists and holds another G than {source}, says {name}; give "
            f"another --out, or remove {folder}."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a Hub folder to ``repository`` (USER/NAME) and return its URL.

    The token is that of ``hf auth login``. A new repository is private.

    Raises:
        GenerationError: no login, no network, or the Hub refuses the upload.
    """
    _require(("huggingface_hub",), "--push", "pip install huggingface_hub")
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(HUB_FILES)
            )
        )
    except Exception as error:  # huggingface_hub's errors, and those of its HTTP library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GenerationError(
            f"--push ({repository}): {reason}. The folder {folder} is complete. Log in with "
            "`hf auth login`, then run the same command again."
        ) from None

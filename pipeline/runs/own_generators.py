"""A G that this pipeline did not train: an ONNX file, or a module of the user's own.

It maps z (n, z_dim + num_classes), with classes as one-hot numbers behind z, to square images
(n, C, S, S) in [-1, 1].
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.noise import BLOCK, z_rows
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import CheckpointError
from pipeline.runtime.tensor_files import (
    LARGEST,
    parse_optimizers,
    parse_safetensors,
    tensors_sha256,
)

DISTRIBUTIONS = ("normal", "uniform")
LARGEST_VALUE = 1.5
"""Of a pixel of images in [-1, 1], with some room for a G without tanh."""


def is_own(location: str) -> bool:
    """Return whether a text is ``module:Class`` or ``module:function``."""
    return bool(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", location))


def open_own(location: str, weights: str, device: Any) -> tuple[nn.Module, ModelConfig, str]:
    """Make the G of ``module:Class`` or ``module:function``, called without arguments.

    It has ``z_dim``, and may have ``z_distribution`` ("normal" if not) and ``num_classes`` (0).

    Args:
        location: its name.
        weights: file of its state dict, .safetensors or of ``torch.save``; "" = it has its own,
            which is for functions only: a class would have random ones.
        device: to put it on.

    Returns:
        G in eval mode, what is known of its architecture, and the sha256 of its weights.

    Raises:
        CheckpointError: it cannot be imported or made, or is no such G.
    """
    module, _, attribute = location.partition(":")
    where = f"--checkpoint {location}"
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: cannot be imported: {error}. Install its package, or put its folder on "
            "PYTHONPATH."
        ) from None
    if isinstance(factory, type) and not weights:
        raise CheckpointError(
            f"{where}: add --weights FILE with its state dict. Without, its weights are random."
        )
    try:
        G = factory()
    except TypeError as error:
        raise CheckpointError(
            f"{where}: cannot be called without arguments: {error}. Write a function that returns "
            "your G, and give module:function."
        ) from None
    if not isinstance(G, nn.Module):
        raise CheckpointError(f"{where}: must give a torch.nn.Module, not {type(G).__name__}.")
    if weights:
        _load(G, Path(weights).expanduser())
    z_dim = getattr(G, "z_dim", None)
    if not isinstance(z_dim, int) or z_dim < 1:
        raise CheckpointError(
            f"{where}: does not say the length of z. Give it the attribute z_dim, and if they are "
            'not the defaults z_distribution ("normal" or "uniform") and num_classes (0).'
        )
    distribution, classes = getattr(G, "z_distribution", "normal"), getattr(G, "num_classes", 0)
    G = G.eval().requires_grad_(False).to(device)
    if not all(bool(torch.isfinite(values).all()) for values in G.state_dict().values()):
        raise CheckpointError(f"{where}: its weights are NaN or infinite.")
    model = _probe(G, z_dim, distribution, classes, where, device)
    return G, model, tensors_sha256(G.state_dict())


def _load(G: nn.Module, file: Path) -> None:
    """Load a state dict from a file; nothing is unpickled but tensors."""
    try:
        content = read_bytes(file, LARGEST)
        if file.suffix == ".safetensors":
            tensors, _ = parse_safetensors(content, file)
        else:
            tensors = parse_optimizers(content, file)
        G.load_state_dict(tensors)
    except OSError as error:
        raise CheckpointError(f"--weights {file}: cannot be read: {error.strerror}.") from None
    except (DamagedFile, RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        reason = " ".join(line.strip() for line in lines[:3]).removeprefix(f"{file}: ")
        raise CheckpointError(
            f"--weights {file}: is not the state dict of this G: {reason[:300]}"
        ) from None


class OnnxGenerator(nn.Module):
    """G of an ONNX file, on the CPU."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        import onnxruntime

        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(content, providers=providers)
        (self.given,), self.made = self.session.get_inputs(), self.session.get_outputs()
        self.about: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def forward(self, z: Tensor) -> Tensor:
        """Return images of z."""
        (images,) = self.session.run([self.made[0].name], {self.given.name: z.cpu().numpy()})
        return torch.from_numpy(images)


def open_onnx(path: Path) -> tuple[nn.Module, ModelConfig]:
    """Open an ONNX file with one input z. A file of ``generate onnx`` says how z is distributed.

    Raises:
        CheckpointError: onnxruntime is not installed, or the file is no such G.
    """
    try:
        G = OnnxGenerator(read_bytes(path, LARGEST))
    except ImportError:
        raise CheckpointError(
            f"{path}: needs onnxruntime: pip install 'dcgan-pipeline[onnx]'"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except Exception as error:  # onnxruntime has a class for each fault, none of them public
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: is no ONNX file of a G: {reason}") from None
    shape = G.given.shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise CheckpointError(f"{path}: its input must be (n, z_dim), not {shape}.")
    stated = re.match(r"(\d+) numbers, (\w+)", G.about.get("z", ""))
    z_dim, distribution = (int(stated[1]), stated[2]) if stated else (shape[1], "normal")
    return G, _probe(G, z_dim, distribution, shape[1] - z_dim, str(path), "cpu")


def _probe(
    G: nn.Module, z_dim: int, distribution: str, classes: int, where: str, device: Any
) -> ModelConfig:
    """Return what is known of a G's architecture, after drawing a block of images."""
    if distribution not in DISTRIBUTIONS or not isinstance(classes, int) or classes < 0:
        raise CheckpointError(
            f"{where}: z_distribution must be normal or uniform and num_classes 0 or more, not "
            f"{distribution} and {classes}."
        )
    model = ModelConfig(z_dim=z_dim, z_distribution=distribution, num_classes=classes)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            images = G(z_rows(model, 0, "probe", 0, BLOCK).to(device))
    except Exception as error:  # of the user's own code, or of onnxruntime
        raise CheckpointError(
            f"{where}: cannot make images of z ({BLOCK}, {z_dim + classes}): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    shape = tuple(images.shape) if isinstance(images, Tensor) else ()
    if len(shape) != 4 or shape[0] != BLOCK or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise CheckpointError(
            f"{where}: must make images ({BLOCK}, 1 or 3, S, S) of z ({BLOCK}, {z_dim + classes}), "
            f"not {shape or type(images).__name__}."
        )
    low, high = float(images.min()), float(images.max())
    if not (-LARGEST_VALUE <= low < 0 and high <= LARGEST_VALUE):
        raise CheckpointError(
            f"{where}: its images must be in [-1, 1]; 64 of them are in [{low:.3g}, {high:.3g}]. "
            "Wrap it in a function that scales them."
        )
    return ModelConfig(
        image_size=shape[2],
        channels=shape[1],
        z_dim=z_dim,
        z_distribution=distribution,  # type: ignore[arg-type]
        num_classes=classes,
    )

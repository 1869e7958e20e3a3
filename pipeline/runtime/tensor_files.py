"""Read and write files of tensors: safetensors with a checksum, and torch.save without code.

A file is read into memory once, so the bytes that were checked are the bytes that are used. A file
that is changed or cut while it is read cannot change what was read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.runtime.documents import DamagedFile, parse_json, read_bytes
from pipeline.runtime.errors import is_out_of_memory

LARGEST = 64 << 30
"""Bytes of the largest file of tensors that is read."""
LARGEST_HEADER = 16 << 20
"""Bytes of the longest list of tensors in a safetensors file whose metadata alone is read."""


def read_checked(path: Path, sha256: str) -> bytes:
    """Return the content of a file after comparing its SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is no regular file, or has another checksum.
        OSError: it cannot be read, which is no damage.
    """
    content = read_bytes(path, LARGEST)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedFile(f"{path}: is damaged (its checksum differs)")
    return content


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a safetensors file. The tensors are not read.

    Raises:
        DamagedFile: it is no such file.
        OSError: it cannot be read.
    """
    size = int.from_bytes(read_bytes(path, LARGEST, head=8), "little")
    if size > LARGEST_HEADER:
        raise DamagedFile(f"{path}: is no file of tensors: its header has {size} bytes")
    return _metadata(read_bytes(path, LARGEST, head=8 + size), path)


def _metadata(content: bytes, path: Path) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    found = parse_json(content[8 : 8 + size], path).get("__metadata__") or {}
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: is no file of tensors: its metadata is no object")
    return found


def parse_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file; ``path`` is for the message.

    Raises:
        DamagedFile: it is no such file.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path}: is no file of tensors: {_first_line(error)}") from None
    return tensors, _metadata(content, path)


def parse_optimizers(content: bytes, path: Path) -> dict[str, Any]:
    """Return the dictionary in a file of ``torch.save``, tensors on the CPU; nothing is unpickled.

    Raises:
        DamagedFile: it is no such file, or holds more than tensors, numbers and containers.
    """
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise DamagedFile(f"{path}: not tensors alone: {_first_line(error)}") from None
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: must hold a dictionary, not {type(found).__name__}")
    return found


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and values, for any order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_cpu_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors as safetensors needs them: to the CPU, contiguous in their logical order."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

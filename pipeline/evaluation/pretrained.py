"""Find, download and verify the weights of pretrained networks.

The sha256 of a file is checked before it is loaded. Other weights would give wrong scores without
an error, and a weights file in pickle format can run code.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.remote import fetch
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import DataError, EvaluationError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
PYTORCH_FID_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""Name under which pytorch-fid keeps the same file in the same cache."""
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE
)
VGG16_FILE, VGG16_URL = "vgg16-397923af.pth", "https://download.pytorch.org/models/"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/"
LARGEST = 1 << 33
"""Bytes of the largest file of weights that is read: above that of DINOv2's giant size."""
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True)
class Published:
    """A published file of weights; ``sha256`` is its checksum, the start of it, or "" = unknown."""

    extractor: str
    file: str
    url: str
    sha256: str

    @property
    def how_to_get(self) -> str:
        """How to bring the file to a node without network."""
        name = "" if self.extractor == "inception" else f" --extractor {self.extractor}"
        return (
            "On a machine with a network run: python -m pipeline.evaluate fetch-weights --to DIR"
            f"{name}. Copy DIR/{self.file} to this machine and set eval.extractor_weights to its "
            f"path. Or do without {self.extractor.capitalize()}: "
            "eval.extractor=efficientnet-lite0 (its scores have names of their own)."
        )


def published(extractor: str) -> Published:
    """Return the published weights of an extractor of torch-fidelity."""
    if extractor == "inception":
        url = os.environ.get("INCEPTION_URL", INCEPTION_URL)
        return Published(extractor, INCEPTION_FILE, url, INCEPTION_SHA256)
    if extractor == "vgg16":
        return Published(extractor, VGG16_FILE, VGG16_URL + VGG16_FILE, "397923af")
    if extractor.startswith("dinov2-"):
        model = "dinov2_" + extractor.removeprefix("dinov2-").replace("-", "")
        file = f"{model}_pretrain.pth"
        return Published(extractor, file, f"{DINOV2_URL}{model}/{file}", "")
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    sha256 = MODEL_METADATA[extractor]["hash"]
    return Published(extractor, f"{extractor}-{sha256}.pt", MODEL_URLS[extractor], sha256)


def find_weights(extractor: str, given: str) -> Path:
    """Return the path of an extractor's weights, downloading them if necessary.

    Args:
        extractor: of torch-fidelity.
        given: ``eval.extractor_weights``: the file, or a folder that has it under its published
            name; "" = in the cache of torch.hub, to which it is downloaded if it is missing.

    Raises:
        EvaluationError: ``given`` does not exist, or the download failed. The message says how to
            bring the file to a node without network.
    """
    of = published(extractor)
    names = (of.file, PYTORCH_FID_FILE) if extractor == "inception" else (of.file,)
    if given and not Path(given).is_dir():
        if not Path(given).is_file():
            raise EvaluationError(
                f"eval.extractor_weights ({given}): no such file. {of.how_to_get}"
            )
        return Path(given)
    folder = Path(given) if given else hub_folder()
    for name in names:
        if (cached := folder / name).is_file():
            return cached
    if given:
        raise EvaluationError(
            f"eval.extractor_weights ({given}): this folder has no {of.file}. {of.how_to_get}"
        )
    return fetch_weights(extractor, folder)


def hub_folder() -> Path:
    """Return the folder of downloaded weights, as torch.hub does, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def fetch_weights(extractor: str, folder: Path) -> Path:
    """Download the weights of an extractor into a folder, unless it already has them.

    Raises:
        EvaluationError: they cannot be downloaded or written, or have another checksum.
    """
    of = published(extractor)
    target = folder / of.file
    if target.is_file():
        read_verified(target, of.sha256, of.how_to_get)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch(of.url, target, of.sha256 if len(of.sha256) == 64 else None)
    except (DataError, OSError) as error:
        raise EvaluationError(
            f"{target}: is missing and cannot be downloaded. {error} {of.how_to_get}"
        ) from None
    return target


def read_verified(path: Path, sha256: str, remedy: str = "") -> io.BytesIO:
    """Read a file and check its sha256. Returns the bytes that were checked.

    Args:
        path: of the file.
        sha256: that it must have, or the start of it.
        remedy: what to do about another file; "" = install its package again.

    Raises:
        EvaluationError: the file cannot be read, or has another sha256.
    """
    remedy = remedy or "Install its package again."
    try:
        content = read_bytes(path, LARGEST)
    except DamagedFile as error:
        raise EvaluationError(f"{error}. {remedy}") from None
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}.") from None
    if not (found := hashlib.sha256(content).hexdigest()).startswith(sha256):
        raise EvaluationError(
            f"{path}: sha256 is {found}, must be {sha256}. The file is damaged or another one, and "
            f"scores of other weights are not comparable. Remove it. {remedy}"
        )
    return io.BytesIO(content)

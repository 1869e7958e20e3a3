"""List the images of an LMDB, the format of LSUN: a stored image under each key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.labels import NO_LABEL
from pipeline.data.pictures import DecodeError, reason
from pipeline.data.source import Source, Stored, package, version_of
from pipeline.data.source_files import LARGEST_FILE
from pipeline.runtime.errors import DataError

FILE = "data.mdb"


def lmdb_folder(folder: Path) -> Source:
    """List the images of a folder with ``data.mdb``; they are read where they lie.

    Raises:
        DataError: it is damaged, or empty.
    """
    lmdb = package("lmdb", "lmdb", folder)

    def environment() -> Any:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_dbs=0)

    keys: list[bytes] = []
    digest = hashlib.sha256(version_of(folder / FILE).encode())
    try:
        with environment() as store, store.begin() as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                keys.append(bytes(key))
                digest.update(len(key).to_bytes(4) + key)
    except lmdb.Error as error:
        raise DataError(
            f"SOURCE ({folder}): {FILE} cannot be read: {reason(error)}. Get the file again."
        ) from None
    if not keys:
        raise DataError(f"SOURCE ({folder}): {FILE} holds no images.")

    def opener() -> Callable[[int], Stored]:
        store = cache(environment)  # by each worker for itself

        def read(row: int) -> bytes:
            try:
                with store().begin(buffers=True) as transaction:
                    value = transaction.get(keys[row])
                    if value is None or len(value) > LARGEST_FILE:
                        raise DecodeError("is gone, or too large")
                    return bytes(value)
            except lmdb.Error as error:
                raise DecodeError(reason(error)) from None

        return read

    names = [key.decode("utf-8", "backslashreplace") for key in keys]
    labels = np.full(len(keys), NO_LABEL, np.int32)
    return Source("lmdb", str(folder), names, labels, digest.hexdigest(), opener)

"""Tables that are read in parts, and indexes of earlier versions: same samples, damage found."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CountingServer

from pipeline import prepare
from pipeline.config.schema import Config, DataConfig, ModelConfig
from pipeline.data import index_writer, shards
from pipeline.data.audit import verify
from pipeline.data.cache import Cache
from pipeline.data.index import ROW, Index
from pipeline.data.index_writer import upgrade
from pipeline.data.loader import checked_index
from pipeline.data.reader import Reader
from pipeline.data.sample_table import JoinedTable, SampleTable
from pipeline.data.shards import INDEX_NAME, read_index, table_of
from pipeline.runtime.documents import read_document, write_document
from pipeline.runtime.errors import DataError

TABLE_NAME = table_of(INDEX_NAME)
PART = 256
"""Rows of a part here: the 997 samples make four."""


@pytest.fixture
def old(uneven: Index, tmp_path: Path) -> Path:
    """A copy of the uneven set with an index as earlier versions wrote it."""
    folder = Path(shutil.copytree(uneven.location, tmp_path / "own"))
    document = read_document(folder / INDEX_NAME)
    del document["samples_parts"], document["label_counts"]
    write_document(folder / INDEX_NAME, document, indent=1)
    return folder


@pytest.fixture
def own(old: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same after an upgrade, with small parts; no table is held in memory."""
    monkeypatch.setattr(index_writer, "PART", PART)
    monkeypatch.setattr(shards, "HELD", 0)
    upgrade(str(old))
    return old


def edit(folder: Path, row: int, **values: int) -> None:
    """Change a row of the table in place, as a damaged disk or another program does."""
    table = np.load(folder / TABLE_NAME, mmap_mode="r+")
    for name, value in values.items():
        table[name][row] = value
    table.flush()
    os.utime(folder / TABLE_NAME)


def test_an_upgraded_index_is_of_the_same_set(old, uneven, monkeypatch):
    """Samples, labels and fingerprint stay, and no other file is touched: runs go on over it."""
    before = read_index(str(old))
    assert (before.fingerprint, before.counted) == (uneven.fingerprint, None)
    kept = {path: path.stat() for path in old.iterdir() if path.name != INDEX_NAME}
    monkeypatch.setattr(sys, "argv", ["prepare", "--upgrade", str(old)])
    prepare.main()
    after = read_index(str(old))
    assert after.fingerprint == before.fingerprint
    assert after.shards == before.shards
    assert np.array_equal(after.table, before.table)
    assert after.label_counts == before.label_counts == Counter(uneven.labels.tolist())
    assert kept == {path: path.stat() for path in old.iterdir() if path.name != INDEX_NAME}
    assert (old / INDEX_NAME).read_bytes() == Path(uneven.location, INDEX_NAME).read_bytes()
    assert "nothing to do" in upgrade(str(old))


def test_an_upgrade_that_fails_leaves_the_old_index(old, monkeypatch):
    """A full disk, or a folder that is read-only: the set can be used as before."""
    before = {path: path.read_bytes() for path in old.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(DataError, match=r"--upgrade .*No space left.*can be used as it is"):
            upgrade(str(old))
    assert before == {path: path.read_bytes() for path in old.iterdir()}
    edit(old, 5, label=1)
    with pytest.raises(DataError, match=f"{TABLE_NAME}: damaged .*its checksum differs"):
        upgrade(str(old))
    edit(old, 5, length=0)
    with pytest.raises(DataError, match="sample 5 is 0 bytes"):
        upgrade(str(old))


def test_parts_give_the_rows_of_the_whole_table(own, uneven):
    """Any ids in any order, spans, single rows and columns."""
    index = read_index(str(own))
    assert isinstance(index.table, SampleTable)
    wanted = np.asarray(uneven.table)
    for ids in ([], [996, 0, 255, 256, 0], np.random.default_rng(0).permutation(997)):
        chosen = np.array(ids, np.int64)
        assert np.array_equal(index.table[chosen], wanted[chosen])
    for span in (slice(0, 997), slice(250, 260), slice(256, 512), slice(5, 5), slice(0, 997, 7)):
        assert np.array_equal(index.table[span], wanted[span])
    assert index.table[996] == wanted[996]
    assert np.array_equal(index.labels, uneven.labels)
    assert index.counted == uneven.label_counts
    out = np.empty((3, *index.shape), np.uint8)
    again = np.empty_like(out)
    chosen = np.array([1, 420, 996])
    assert np.array_equal(
        Reader(index, Cache(index, "")).read(chosen, out),
        Reader(uneven, Cache(uneven, "")).read(chosen, again),
    )
    assert np.array_equal(out, again)


def test_damage_is_found_when_its_part_is_used(own):
    """Not before, and with the rows that it is in; ``verify`` reads all parts."""
    wanted = np.load(own / TABLE_NAME)
    edit(own, 300, length=999)
    index = read_index(str(own))
    few = np.array([0, 255, 512, 996])
    assert np.array_equal(index.table[few], wanted[few])
    said = f"{own}/{TABLE_NAME}: damaged .*rows 256 to 511 differs.*pipeline.prepare {own}"
    for ids in (np.array([511]), slice(500, 600), "label"):
        with pytest.raises(DataError, match=said):
            index.table[ids]
    with pytest.raises(DataError, match=said):
        verify(own, 1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_table_that_changes_under_a_run_is_found(own, when):
    """Before or after the rows were used; no signal ends the process. A touch alone is no fault."""
    index = read_index(str(own))
    ids = np.arange(997)
    if when == "after":
        wanted = index.table[ids]
        os.utime(own / TABLE_NAME, ns=(1, 1))
        assert np.array_equal(index.table[ids], wanted)
    edit(own, 700, offset=0)
    with pytest.raises(DataError, match="rows 512 to 767 differs"):
        index.table[ids]
    os.truncate(own / TABLE_NAME, 200)
    with pytest.raises(DataError, match=r"it has 200 bytes and had \d+ when it was opened"):
        index.table[ids]
    with pytest.raises(DataError, match="its length differs"):
        read_index(str(own))


def test_a_table_that_is_replaced_is_read_to_the_end(own):
    """The open file is that of the index which the process has read."""
    index = read_index(str(own))
    wanted = index.table[np.arange(997)]
    (own / TABLE_NAME).unlink()
    assert np.array_equal(index.table[np.arange(997)], wanted)
    with pytest.raises(DataError, match=f"no {TABLE_NAME}"):
        read_index(str(own))


@pytest.mark.parametrize(("values", "said"), [({"label": 77}, "label 77"), ({"length": 0}, "is 0")])
def test_rows_of_a_right_checksum_are_judged_too(own, values, said):
    """A label that the index does not count, or bytes outside of the shard: never used."""
    edit(own, 3, **values)
    raw = np.load(own / TABLE_NAME)
    document = read_document(own / INDEX_NAME)
    sums = document["samples_parts"]["sha256"]
    part = shards.hashlib.sha256(raw[:PART].tobytes()).hexdigest()[:32]
    document["samples_parts"]["sha256"] = part + sums[32:]
    write_document(own / INDEX_NAME, document)
    with pytest.raises(DataError, match=f"sample 3 .*{said}"):
        read_index(str(own)).table[np.array([200])]


def test_classes_are_checked_from_the_counts(own, uneven):
    """Without a look at the table, of one set or of several."""
    found = len(uneven.label_counts)
    configs = [
        Config(
            model=ModelConfig(architecture="mlp", image_size=8, num_classes=classes),
            data=DataConfig(shards=str(own)),
        )
        for classes in (found, 2, found + 1)
    ]
    assert checked_index(configs[0]).label_counts == uneven.label_counts
    for config in configs[1:]:
        with pytest.raises(DataError, match=r"model.num_classes"):
            checked_index(config)


def test_several_sets_are_read_as_one(own, uneven, tmp_path):
    """Each from its own table."""
    shutil.copytree(own, tmp_path / "b")
    index = read_index(f"{own}::{tmp_path}/b")
    assert isinstance(index.table, JoinedTable)
    wanted = np.concatenate([uneven.table, uneven.table])
    ids = np.array([1993, 5, 997, 996])
    assert np.array_equal(index.table[ids], wanted[ids])
    assert np.array_equal(index.table[990:1000], wanted[990:1000])
    assert np.array_equal(index.labels, wanted["label"])
    assert index.table[1000] == wanted[1000]
    assert index.label_counts == {k: 2 * n for k, n in uneven.label_counts.items()}


def test_a_node_downloads_a_remote_table_once(
    own: Path, uneven: Index, tmp_path: Path, serve: Callable[[Path], CountingServer]
) -> None:
    """Into the cache of the shards; without one it is held in memory."""
    server, ids = serve(own), np.arange(997)
    for _ in range(2):
        index = read_index(server.url, tables_at=tmp_path / "cache")
        assert np.array_equal(index.table[ids], uneven.table)
    assert server.gets[TABLE_NAME] == 1
    assert len(list((tmp_path / "cache").glob("*-samples.npy"))) == 1
    assert isinstance(read_index(server.url).table, np.ndarray)
    edit(own, 3, label=0)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="damaged or another file"):
        read_index(server.url, tables_at=tmp_path / "cache")


def test_many_labels_are_not_counted_in_the_index(tmp_path, monkeypatch):
    """They are found in the table when they are needed."""
    monkeypatch.setattr(index_writer.index_fields, "MOST_LABELS", 3)
    rows = np.array([(0, 1, k) for k in range(5)], ROW)
    sums = index_writer.Sums()
    sums.add(rows)
    assert "label_counts" not in sums.describe()
    assert shards.Index("x", "npy", (8, 8, 3), (), rows).label_counts == dict.fromkeys(range(5), 1)

"""Reading samples by id: the right image of the right shard, few maps, and named damage."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import label_of, pixels_of

from pipeline.data import reader as reading
from pipeline.data.cache import Cache, check_shards
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.runtime.errors import CorruptSample, DataError

SHAPE = (8, 8, 3)


@pytest.fixture
def small(make_shards, tmp_path):
    """Five samples in three shards, of which the second is empty."""
    return make_shards(tmp_path / "set", [2, 0, 3])


def reader_of(index, folder="", limit_gib=0.0):
    return Reader(index, Cache(index, str(folder), limit_gib))


def read(reader, *ids):
    out = np.zeros((len(ids), *SHAPE), np.uint8)
    return reader.read(np.array(ids), out), out


def damage(path, offset):
    """Overwrite the start of an image in its tar, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x93BROKEN\0")


def test_samples_are_read_in_the_order_of_the_ids(small):
    """Each row of ``out`` is the image of its id, across shards and repeats; labels are int64."""
    ids = [4, 0, 2, 1, 3, 4]
    labels, out = read(reader_of(small), *ids)
    assert labels.dtype == np.int64
    assert labels.tolist() == [label_of(sample) for sample in ids]
    for row, sample in zip(out, ids, strict=True):
        assert np.array_equal(row, pixels_of(sample, SHAPE))


def test_a_shard_is_opened_once(small):
    """After the first read of a shard its samples come from the open file; its name may be gone."""
    reader = reader_of(small)
    read(reader, 2)
    for shard in small.shards:
        Path(small.location, shard.url).unlink()
    assert np.array_equal(read(reader, 3)[1][0], pixels_of(3, SHAPE))


def test_a_damaged_sample_is_named_with_the_command_that_checks_the_set(small):
    """The message gives path, key, offset, reason and remedy; other samples are still read."""
    path, offset = Path(small.location, small.shards[2].url), int(small.table["offset"][3])
    damage(path, offset)
    reader = reader_of(small)
    read(reader, 2, 4)
    with pytest.raises(CorruptSample) as caught:
        read(reader, 2, 3)
    start, _, end = str(caught.value).partition(" is damaged: ")
    assert start == f"{path}: sample 000003.npy at offset {offset}"
    reason, _, remedy = end.partition(". Check ")
    assert "npy" in reason
    assert remedy == (f"the whole set with: python -m pipeline.prepare --verify {small.location}")


def test_the_key_of_a_damaged_sample_may_be_unknown(small):
    """No member at the offset, an unreadable tar or one that is gone: damage is reported."""
    table = np.array(small.table)
    table["offset"][0] += 1
    with pytest.raises(CorruptSample, match="sample unknown at offset"):
        read(reader_of(replace(small, table=table)), 0)
    path, offset = Path(small.location, small.shards[0].url), int(small.table["offset"][0])
    damage(path, offset)
    damage(path, 0)
    reader = reader_of(small)
    with pytest.raises(CorruptSample, match=f"sample unknown at offset {offset} is"):
        read(reader, 0)
    path.unlink()
    with pytest.raises(CorruptSample, match=f"sample unknown at offset {offset} is"):
        read(reader, 0)


def opened(folder):
    """Number of shards below a folder that this process has open."""
    links = [os.path.realpath(name) for name in Path("/proc/self/fd").iterdir()]
    return sum(f"{folder}/" in link and ".tar" in link for link in links)


def test_shards_stay_open_until_their_reader_is_gone(make_shards, serve, tmp_path):
    """Evicted ones do not: tests/data/test_cache.py."""
    local = make_shards(tmp_path / "set", [1] * 65)
    remote = read_index(serve(tmp_path / "set").url)
    for index, folder, limit_gib in (
        (remote, tmp_path / "limited", 1.0),
        (remote, tmp_path / "unlimited", 0.0),
        (local, tmp_path / "set", 1.0),
    ):
        reader = reader_of(index, folder, limit_gib)
        for sample in range(65):
            assert np.array_equal(read(reader, sample)[1][0], pixels_of(sample, SHAPE))
        assert opened(folder) == 65
        del reader
        assert opened(folder) == 0


FEW_FILES = """
import os
import sys
import numpy as np
from conftest import label_of, pixels_of
from pathlib import Path
from pipeline.data.cache import Cache
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index

def opened():
    links = [os.path.realpath("/proc/self/fd/" + name) for name in os.listdir("/proc/self/fd")]
    return sum(".tar" in link for link in links)

index = read_index(sys.argv[1])
reader = Reader(index, Cache(index, sys.argv[2]))
ids = np.random.default_rng(0).integers(0, index.num_samples, 2000)
out = np.zeros((len(ids), *index.shape), np.uint8)
others = []
if sys.argv[3] == "crowded":  # the rest of the process leaves room for hardly any map
    try:
        while True:
            others.append(open(sys.argv[1] + "/index.json"))
    except OSError:
        del others[-3:]
labels = reader.read(ids, out)
for sample, label, pixels in zip(ids.tolist(), labels.tolist(), out):
    assert (label, pixels.tobytes()) == (label_of(sample), pixels_of(sample, (8, 8, 3)).tobytes())
print(opened())
"""


@pytest.mark.parametrize(("how", "most"), [("alone", 8), ("crowded", 3)])
def test_more_shards_than_open_files(make_shards, tmp_path, how, most):
    """150 shards with 64 open files: the right images, from a bounded number of descriptors."""
    make_shards(tmp_path / "set", [2] * 150)
    words = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "-c", FEW_FILES]
    done = subprocess.run(
        [*words, tmp_path / "set", tmp_path / "cache", how],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= most


def test_a_shard_that_cannot_be_opened_is_one_message(small, tmp_path):
    """A loop of links in place of a shard: what is wrong, and no traceback."""
    path = Path(small.location, small.shards[0].url)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(DataError, match=f"{path}: cannot be read: .*symbolic links"):
        read(reader_of(small), 0)


@pytest.mark.parametrize("field", ["npy", "png"])
def test_a_shard_that_is_cut_while_it_is_read_is_one_message(make_shards, tmp_path, field):
    """The open file shrinks under the reader, to nothing or into the image: no SIGBUS."""
    index = make_shards(tmp_path / "set", [40], SHAPE, field)
    path = Path(index.location, index.shards[0].url)
    reader = reader_of(index)
    read(reader, 0)
    for size in (int(index.table["offset"][30]) + 9, 0):
        os.truncate(path, size)
        with pytest.raises(DataError, match=f"{path}: was cut while it was read.*Restore it"):
            read(reader, 30)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_shard_that_is_written_to_while_it_is_read_is_compared_again(
    where, make_shards, serve, tmp_path, monkeypatch
):
    """Pixels that change in place, with size and header kept, are found; a touch is no fault."""
    monkeypatch.setattr(reading, "LOOK_SECONDS", 0.0)
    index = make_shards(tmp_path / "set", [2, 3])
    path = Path(index.location, index.shards[1].url)
    if where == "remote":
        index = read_index(serve(tmp_path / "set").url)
        path = Cache(index, str(tmp_path / "cache")).path(index.shards[1])
    reader = reader_of(index, tmp_path / "cache")
    read(reader, 0, 3)
    path.touch()
    assert np.array_equal(read(reader, 3)[1][0], pixels_of(3, SHAPE))
    with path.open("r+b") as file:
        file.seek(int(index.table["offset"][3]) + 200)
        file.write(bytes(50))
    if where == "remote":  # downloaded again
        assert np.array_equal(read(reader, 3)[1][0], pixels_of(3, SHAPE))
        assert path.with_name(f"{path.name}.damaged").exists()
    else:
        with pytest.raises(DataError, match=f"{path}: its checksum differs"):
            read(reader, 0)


NOT_DAMAGED = """
import gc, os, resource, sys
import numpy as np
from pipeline.data.cache import Cache, check_shards
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.runtime.errors import DataError, as_user_error

index = read_index(sys.argv[1])
read_index(sys.argv[2])
kept = []
def fill():
    gc.collect()  # what an earlier attempt left open would be closed amid the next one
    try:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
out = np.zeros((1, *index.shape), np.uint8)
for attempt in (
    lambda: Reader(index, Cache(index, "")).read(np.array([0]), out),
    lambda: check_shards(index, "sha256"),
    lambda: read_index(sys.argv[1]),
    lambda: read_index(sys.argv[2]),
):
    fill()
    try:
        attempt()
    except (DataError, OSError) as error:
        os.close(kept.pop())
        print(as_user_error(error))
"""


def test_too_many_open_files_are_no_damage(small, serve):
    """Reader, check and index, near or remote, name the limit and its remedy; none says damaged."""
    words = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "-c", NOT_DAMAGED]
    done = subprocess.run(
        [*words, small.location, serve(Path(small.location)).url],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    for line in lines:
        assert "open files are limited to 64 here. Raise the limit" in line
        assert "damaged" not in line
        assert "changed" not in line


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_shard_without_permission_is_no_damage(small):
    """The message asks for permission."""
    Path(small.location, small.shards[0].url).chmod(0)
    with pytest.raises(DataError, match=r"Permission denied\. Give permission"):
        check_shards(small, "sha256")

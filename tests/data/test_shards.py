"""Shards: what is indexed, what is refused, and one checked download per node."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import UNEVEN, label_of, pixels_of

from pipeline.data import remote as fetching
from pipeline.data.cache import Cache, check_shards
from pipeline.data.codecs import MIXED, encode
from pipeline.data.index_writer import write_index
from pipeline.data.labels import NO_LABEL
from pipeline.data.reader import Reader
from pipeline.data.shards import (
    INDEX_NAME,
    ROW,
    read_index,
)
from pipeline.data.tar_scan import NO_LABELS, scan
from pipeline.runtime.documents import read_document, write_document
from pipeline.runtime.errors import CorruptSample, DataError

TABLE_NAME = f"{INDEX_NAME}.samples.npy"

SHAPE = (8, 8, 3)
IMAGE = encode(pixels_of(0, SHAPE), "npy")


@pytest.fixture
def own(uneven, tmp_path):
    """A copy of the uneven set that a test may damage; its folder."""
    return Path(shutil.copytree(uneven.location, tmp_path / "own"))


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_PAUSE", 0.0)


def make_tar(path, members, form=tarfile.PAX_FORMAT, mode="w"):
    """A tar of (name, bytes or tar type) members."""
    with tarfile.open(path, mode, format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type = content
                tar.addfile(info)
    return path


def read_all(index, cache_dir=""):
    out = np.empty((index.num_samples, *index.shape), np.uint8)
    labels = Reader(index, Cache(index, str(cache_dir))).read(np.arange(index.num_samples), out)
    return out, labels


def edit_index(folder, change):
    path = folder / INDEX_NAME
    document = read_document(path)
    change(document)
    write_document(path, document)


# -- what is indexed ----------------------------------------------------------------------------


def test_every_sample_is_read_with_its_label(uneven):
    """Random access gives the pixels and labels that were packed, over empty and tiny shards."""
    assert uneven.sizes == UNEVEN
    out, labels = read_all(uneven)
    for sample in (0, 1, 17, 18, 417, 418, 420, 421, 632, 996):
        assert np.array_equal(out[sample], pixels_of(sample, SHAPE))
    assert labels.tolist() == [label_of(sample) for sample in range(997)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_same(uneven):
    """The independent reader finds the same keys, bytes and labels in the same order."""
    tars = [f"{uneven.location}/{shard.url}" for shard in uneven.shards if shard.nsamples]
    stock = list(wds.WebDataset(tars, shardshuffle=False))
    out, labels = read_all(uneven)
    gc.collect()  # it leaves the tars open; they are closed, with a warning, here
    assert [int(sample["cls"]) for sample in stock] == labels.tolist()
    for sample, image in zip(stock, out, strict=True):
        assert np.array_equal(np.load(io.BytesIO(sample["npy"])), image)


@pytest.mark.parametrize("field", ["npy", "png", "jpg"])
def test_each_format_round_trips(make_shards, tmp_path, field):
    """Raw and PNG exactly, JPEG nearly."""
    index = make_shards(tmp_path, [3, 2], (16, 16, 3), field)
    assert index.field == field
    out, _ = read_all(index)
    wanted = np.stack([pixels_of(k, (16, 16, 3)) for k in range(5)])
    assert np.abs(out.astype(int) - wanted).mean() <= (20 if field == "jpg" else 0)


def test_equal_data_make_equal_bytes(make_shards, uneven, tmp_path):
    """Packing twice gives the same tars, table and fingerprint: nothing depends on the clock."""
    again = make_shards(tmp_path / "again", UNEVEN)
    assert again.fingerprint == uneven.fingerprint
    for name in (INDEX_NAME, TABLE_NAME):
        assert (tmp_path / "again" / name).read_bytes() == Path(uneven.location, name).read_bytes()


def test_fingerprints_differ_with_the_data(make_shards, uneven, tmp_path):
    """Another cut of the same images is another data set: the order is over shards."""
    assert make_shards(tmp_path, [997]).fingerprint != uneven.fingerprint


def test_the_index_is_one_that_wids_tools_read(uneven):
    """The wids-shard-index-v1 schema: name, samples and size of each shard."""
    document = json.loads(Path(uneven.location, INDEX_NAME).read_bytes())
    assert document["__kind__"] == "wids-shard-index-v1"
    for entry, shard in zip(document["shardlist"], uneven.shards, strict=True):
        path = Path(uneven.location, entry["url"])
        assert entry["filesize"] == path.stat().st_size
        assert entry["nsamples"] == shard.nsamples
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_table_is_held_in_memory(own):
    """Sixteen bytes a sample; a table that is cut or changed under a run changes nothing."""
    assert ROW.itemsize == 16
    index = read_index(str(own))
    before = index.table.copy()
    (own / TABLE_NAME).write_bytes(b"")
    assert np.array_equal(index.table, before)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_other_tools_are_indexed(tmp_path, form):
    """Folders as members, nested and long names, upper case, other files: in every tar format."""
    deep = "/".join(["folder" * 5] * 4)
    long = "n" * (60 if form == tarfile.USTAR_FORMAT else 250)
    path = make_tar(
        tmp_path / "a.tar",
        [
            ("train", tarfile.DIRTYPE),
            ("train/1.NPY", IMAGE),
            ("train/1.cls", b" 7\n"),
            ("train/1.json", b"{}"),
            ("other/1.npy", IMAGE),  # another sample: the folder is part of the key
            ("link", tarfile.SYMTYPE),
            ("README", b"no extension"),
            (f"{deep}/{long}.cls", b"3"),  # the label first
            (f"{deep}/{long}.npy", IMAGE),
            ("only.cls", b"5"),  # no image: no sample
            ("last.seg.npy", IMAGE),  # a field of another name
            ("last.npy", IMAGE),
        ],
        form,
    )
    found = scan(path)
    assert found[1]["label"].tolist() == [7, NO_LABEL, 3, NO_LABEL, NO_LABEL]
    index = write_index(tmp_path, [found], SHAPE, {})
    assert (read_all(index)[0] == pixels_of(0, SHAPE)).all()


def test_of_several_images_in_a_sample_each_is_used(tmp_path):
    """A file that ends like an image is an image; the set may hold several formats."""
    png = encode(pixels_of(1, SHAPE), "png")
    both = [("a.npy", IMAGE), ("a.png", png), ("b.npy", IMAGE), ("b.png", png)]
    found = scan(make_tar(tmp_path / "a.tar", both))
    assert (found.shard.nsamples, found.field, found.contents.shared) == (4, MIXED, 4)
    pixels = read_all(write_index(tmp_path, [found], SHAPE, {}))[0]
    expected = [pixels_of(k % 2, SHAPE) for k in range(4)]
    assert np.array_equal(pixels, np.stack(expected))


def test_indexing_needs_no_label(tmp_path):
    """Without ``cls`` every label is -1."""
    found = scan(make_tar(tmp_path / "a.tar", [("1.npy", IMAGE)]))
    assert read_all(write_index(tmp_path, [found], SHAPE, {}))[1].tolist() == [NO_LABEL]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"7", 7),
        (b" 7\n", 7),
        (b"1.0", 1),
        (b"-1", None),
        (b"cat", "cat"),
        (b"0 0 1 0", 2),
        (b"[0, 1]", 1),
        (b"[0., 0., 1.]", 2),
    ],
)
def test_labels_are_numbers_names_or_one_hot(tmp_path, text, label):
    """As tools write them; -1 is their word for no label."""
    found = scan(make_tar(tmp_path / "a.tar", [("a.npy", IMAGE), ("a.cls", text)]))
    assert found.contents.labels == [label]
    assert not found.contents.left_out


@pytest.mark.parametrize("text", [b"", b"2147483648", b"-2", b"1.5", b"a\nb", b"\xff", b"0 1 1"])
def test_a_label_that_is_none_is_counted(tmp_path, text):
    """The images are there all the same."""
    found = scan(make_tar(tmp_path / "a.tar", [("a.npy", IMAGE), ("a.cls", text)]))
    assert found.contents.labels == [None]
    assert found.contents.left_out == {NO_LABELS: 1}


def test_a_tar_without_images_is_refused(tmp_path):
    """With what it holds, and what images are called."""
    path = make_tar(tmp_path / "a.tar", [("a.txt", bytes(20_000))])
    with pytest.raises(DataError, match=r"holds no images \(found: 1 .txt\); known extensions are"):
        scan(path)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(tmp_path, mode):
    """It cannot be read at random; the remedy is named."""
    path = make_tar(tmp_path / "a.tar", [("a.npy", IMAGE)], mode=mode)
    with pytest.raises(DataError, match="unpack"):
        scan(path)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 8, b"x" * 20_000])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    """Empty, text, noise."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar"):
        scan(path)


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path):
    """Stock readers give the samples before the cut and no error; the index never does."""
    whole = make_tar(tmp_path / "whole.tar", [(f"{k}.npy", IMAGE) for k in range(4)]).read_bytes()
    end = 4 * 1024 + 512
    cut = tmp_path / "cut.tar"
    for size in [*range(1, end - 512, 97), *range(0, end - 512, 512)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError):
            scan(cut)


def test_damaged_tars_never_end_in_a_traceback(tmp_path):
    """400 random damages of headers and payloads: an index or a DataError, nothing else."""
    whole = make_tar(
        tmp_path / "whole.tar",
        [("a" * 120 + f"{k}.npy", IMAGE) for k in range(4)] + [("x.cls", b"3")],
    ).read_bytes()
    rng, path = random.Random(0), tmp_path / "damaged.tar"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            scan(path)
        except DataError:
            refused += 1
    assert refused > 100


def test_sparse_members_are_refused(tmp_path):
    """Their bytes do not lie in one piece, so an offset cannot name them."""
    source = tmp_path / "a.npy"
    with source.open("wb") as file:
        file.write(IMAGE)
        file.truncate(1 << 20)
    made = subprocess.run(
        ["tar", "--sparse", "-cf", tmp_path / "a.tar", "-C", tmp_path, "a.npy"], check=False
    )
    if made.returncode or (tmp_path / "a.tar").stat().st_size > 1 << 19:
        pytest.skip("this tar or file system knows no sparse files")
    with pytest.raises(DataError, match="sparse"):
        scan(tmp_path / "a.tar")


def test_a_set_without_images_is_refused(make_shards, tmp_path):
    """Shards may be empty, a set may not."""
    with pytest.raises(DataError, match="hold no images"):
        make_shards(tmp_path, [0, 0])


def test_shards_of_two_formats_are_one_set(tmp_path):
    """Each image is known by its first bytes."""
    png = encode(pixels_of(1, SHAPE), "png")
    scans = [
        scan(make_tar(tmp_path / "a.tar", [("a.npy", IMAGE)])),
        scan(make_tar(tmp_path / "b.tar", [("b.png", png)])),
    ]
    index = write_index(tmp_path, scans, SHAPE, {})
    assert index.field == MIXED
    assert np.array_equal(read_all(index)[0], np.stack([pixels_of(k, SHAPE) for k in range(2)]))


# -- reading an index ---------------------------------------------------------------------------


def test_tars_without_an_index_get_the_command_that_makes_one(own):
    """Somebody else's shards are one command away."""
    (own / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=f"8 tars without an index.*pipeline.prepare {own}"):
        read_index(str(own))


def test_a_missing_folder_is_named(tmp_path):
    """Nothing there, no index, or a file in the way: each said plainly."""
    with pytest.raises(DataError, match="no such folder"):
        read_index(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no index\.json"):
        read_index(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        read_index(str(tmp_path / "file"))
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff", b'{"__kind__": "other"}']
)
def test_a_file_that_is_no_index_is_refused(own, content):
    """With the command that makes it again."""
    (own / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match="not an index of this project"):
        read_index(str(own))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("shape"),
        lambda d: d.update(shape=[8, 8]),
        lambda d: d.update(shape=[8, 0, 3]),
        lambda d: d.update(shape=[8, float("inf"), 3]),
        lambda d: d.update(shardlist=[3]),
        lambda d: d.update(made_by=[3]),
        lambda d: d["shardlist"][0].pop("sha256"),
        lambda d: d["shardlist"][0].update(nsamples="many"),
        lambda d: (d["shardlist"][0].update(nsamples=-1), d["shardlist"][1].update(nsamples=19)),
        lambda d: d["shardlist"][2].update(filesize=0),
    ],
)
def test_an_index_with_broken_fields_is_refused(own, change):
    """Missing, mistyped or impossible fields."""
    edit_index(own, change)
    with pytest.raises(DataError, match="not an index of this project"):
        read_index(str(own))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.tar",
        "/etc/passwd",
        "sub/a.tar",
        "..",
        ".",
        "",
        "./a.tar",
        "a.tar/",
        "pipe:cat /etc/passwd",
        "http://127.0.0.1/a.tar",
        "a.tar::file:b",
        "a\0.tar",
        "a\n.tar",
    ],
)
def test_an_index_may_only_name_files_beside_it(own, name):
    """No path, URL or command from a foreign index is ever followed."""
    edit_index(own, lambda d: d["shardlist"][0].update(url=name))
    with pytest.raises(DataError, match="must be a plain file name beside it"):
        read_index(str(own))


def test_an_index_and_table_of_different_sets_are_refused(own, make_shards, tmp_path):
    """A table copied from elsewhere, cut or flipped never serves wrong offsets."""
    other = make_shards(tmp_path / "other", [5])
    table = (own / TABLE_NAME).read_bytes()
    foreign = Path(other.location, TABLE_NAME).read_bytes()
    for content in (foreign, table[:-16], table[:-1] + b"\1", b"", b"hello"):
        (own / TABLE_NAME).write_bytes(content)
        with pytest.raises(DataError, match="damaged or not of this index"):
            read_index(str(own))
    (own / TABLE_NAME).unlink()
    with pytest.raises(DataError, match=f"no {TABLE_NAME}"):
        read_index(str(own))


def test_counts_that_disagree_are_refused(own):
    """The sum of the shards is the length of the table."""
    edit_index(own, lambda d: (d["shardlist"][0].update(nsamples=2), d.pop("label_counts")))
    with pytest.raises(DataError, match="has 997 rows; the shards of the index have 998 samples"):
        read_index(str(own))


# -- shards that changed ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["auto", "sha256"])
def test_a_flipped_byte_is_found_before_the_run(own, how):
    """Every byte of a small set is checked; a large one when asked for."""
    index = read_index(str(own))
    check_shards(index, how)
    shard = own / index.shards[5].url
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard}: its checksum differs.*--verify"):
        check_shards(index, how)
    check_shards(index, "size")  # the cheap check cannot see it


@pytest.mark.parametrize("how", ["auto", "sha256", "size"])
def test_missing_and_truncated_shards_are_found_before_the_run(own, how):
    """By every kind of check."""
    index = read_index(str(own))
    shard = own / index.shards[5].url
    os.truncate(shard, 10_240)
    with pytest.raises(DataError, match=r"10240 bytes, the index says \d+: truncated or changed"):
        check_shards(index, how)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard}: missing, but listed"):
        check_shards(index, how)


def test_missing_and_truncated_shards_are_found_while_reading(own):
    """A set damaged after the check stops the run with the shard's name."""
    index = read_index(str(own))
    shard = own / index.shards[0].url
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="truncated or changed"):
        read_all(index)
    shard.unlink()
    with pytest.raises(DataError, match="missing, but listed"):
        read_all(index)


def test_a_damaged_sample_is_named(own):
    """Shard, key and offset, and the command that lists all damage."""
    index = read_index(str(own))
    shard, offset = own / index.shards[2].url, int(index.table["offset"][20])
    content = bytearray(shard.read_bytes())
    content[offset : offset + 8] = b"\x93BROKEN\0"
    shard.write_bytes(content)
    with pytest.raises(CorruptSample) as caught:
        read_all(index)
    for part in (str(shard), "000020.npy", f"offset {offset}", f"--verify {own}"):
        assert part in str(caught.value)


# -- remote -------------------------------------------------------------------------------------


@pytest.fixture
def remote(own, serve):
    """(server, index read over http) of the uneven set."""
    server = serve(own)
    return server, read_index(server.url)


def test_remote_shards_read_like_local_ones(remote, uneven, tmp_path):
    """Same pixels, same labels, same fingerprint; each shard fetched once, empty ones never."""
    server, index = remote
    assert index.fingerprint == uneven.fingerprint
    for _ in range(2):  # the second time from the cache
        for one, other in zip(read_all(index, tmp_path / "c"), read_all(uneven), strict=True):
            assert np.array_equal(one, other)
    assert [server.gets[shard.url] for shard in index.shards] == [int(n > 0) for n in UNEVEN]


def test_a_trailing_slash_changes_nothing(remote):
    """``s3://bucket/set/`` is the same set."""
    server, index = remote
    assert read_index(f"{server.url}/").shards == index.shards
    assert read_index(f"{server.url}/").location == server.url


def test_fetch_all_brings_every_shard_once(remote, tmp_path):
    """Threads share the work."""
    server, index = remote
    Cache(index, str(tmp_path / "c")).fetch_all()
    assert [server.gets[shard.url] for shard in index.shards] == [1] * len(UNEVEN)
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_six_processes_make_one_download(remote, tmp_path):
    """Ranks and workers of a node race for a shard: one GET, six equal answers."""
    server, index = remote
    code = (
        "import sys; from pipeline.data.shards import *; from pipeline.data.reader import *\n"
        "from pipeline.runtime.files import *\n"
        "index = read_index(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "print(sha256_of(Cache(index, sys.argv[2]).path(index.shards[2])))"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, server.url, str(tmp_path / "c")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    server.hold.clear()
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    time.sleep(1)  # one waits for the server now, the others for that one
    server.hold.set()
    answers = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert answers == [index.shards[2].sha256] * 6
    assert server.gets[index.shards[2].url] == 1


def test_wrong_bytes_are_never_published(remote, own, tmp_path):
    """A shard that differs from the index raises, at once, and leaves nothing in the cache."""
    server, index = remote
    shard = index.shards[2]
    content = bytearray((own / shard.url).read_bytes())
    content[1000] ^= 1
    (own / shard.url).write_bytes(content)
    with pytest.raises(DataError, match=f"must be {shard.sha256}: damaged .* nothing was kept"):
        Cache(index, str(tmp_path / "c")).path(shard)
    assert server.gets[shard.url] == 1
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


@pytest.mark.parametrize("fault", ["cut_short", "failing"])
def test_an_interrupted_transfer_is_repeated(remote, tmp_path, fault):
    """The connection ends midway, or the server is overloaded, twice: the third try serves."""
    server, index = remote
    shard = index.shards[2]
    getattr(server, fault)[shard.url] = 2
    path = Cache(index, str(tmp_path / "c")).path(shard)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert server.gets[shard.url] == 3


@pytest.mark.parametrize("name", [INDEX_NAME, TABLE_NAME])
def test_an_interrupted_index_is_repeated(remote, name):
    """The index is fetched as patiently as the shards."""
    server, index = remote
    server.cut_short[name] = 1
    server.failing[name] = 1
    assert read_index(server.url).fingerprint == index.fingerprint


def test_a_server_that_stays_broken_is_one_clear_error(remote, tmp_path):
    """After four tries, with the URL; no traceback of the network library."""
    server, index = remote
    server.failing[index.shards[2].url] = 99
    with pytest.raises(DataError, match=r"shard-000002\.tar: cannot be fetched"):
        Cache(index, str(tmp_path / "c")).path(index.shards[2])
    assert server.gets[index.shards[2].url] == fetching.FETCH_ATTEMPTS
    server.close()
    with pytest.raises(DataError, match=r"index\.json: cannot be fetched"):
        read_index(server.url)


def test_missing_remote_files_are_named(remote, own, tmp_path):
    """404 is final."""
    server, index = remote
    (own / index.shards[2].url).unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: not found"):
        Cache(index, str(tmp_path / "c")).path(index.shards[2])
    with pytest.raises(DataError, match=r"index\.json: not found"):
        read_index(f"{server.url}/elsewhere")


def test_an_unknown_scheme_is_refused():
    """With those that work."""
    with pytest.raises(DataError, match=r"cannot open carrier-pigeon://.*Use http\(s\), s3 or gs"):
        read_index("carrier-pigeon://host/set")


def test_an_unusable_cache_folder_is_named(remote, tmp_path):
    """``data.cache_dir`` on a file, or read-only, is the user's to fix."""
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir \(.*file/c\): cannot be used"):
        Cache(remote[1], str(tmp_path / "file" / "c")).path(remote[1].shards[2])


def test_names_with_spaces_and_accents_are_fetched(serve, tmp_path):
    """A URL holds them quoted; quotes of the user's own are kept as they are."""
    (tmp_path / "fotos von 1 \u00e4pfel.tar").write_bytes(b"content")
    url, sha256 = serve(tmp_path).url, hashlib.sha256(b"content").hexdigest()
    for name in ("fotos von 1 \u00e4pfel.tar", "fotos%20von%201%20%C3%A4pfel.tar"):
        fetching.fetch(f"{url}/{name}", tmp_path / "copy", sha256)
        assert (tmp_path / "copy").read_bytes() == b"content"


def test_a_full_disk_is_no_fault_of_the_network(remote, tmp_path):
    """It is named at once; the download is not tried again."""
    server, index = remote
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "from pipeline.data.cache import Cache; from pipeline.data.shards import read_index\n"
        "index = read_index(sys.argv[1]); Cache(index, sys.argv[2]).path(index.shards[2])"
    )
    words = [sys.executable, "-c", code, server.url, str(tmp_path / "c")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert f"DataError: data.cache_dir ({tmp_path / 'c'}): cannot be used" in done.stderr
    assert "File too large" in done.stderr
    assert server.gets[index.shards[2].url] == 1
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_what_a_killed_download_left_is_removed(remote, tmp_path):
    """No half shard stays on the node's disk."""
    _, index = remote
    cache = Cache(index, str(tmp_path / "c"))
    cache.folder.mkdir()
    left = cache.folder / f"{index.shards[2].sha256[:16]}-{index.shards[2].url}.999999.tmp"
    left.write_bytes(b"half")
    cache.path(index.shards[2])
    assert not left.exists()


def test_the_limit_evicts_the_oldest_while_readers_go_on(remote, tmp_path):
    """Room is made by last use; a process that has mapped an evicted shard keeps reading it."""
    _, index = remote
    big = [2, 5, 7]  # together above the limit, any two below
    limit = sum(index.shards[k].filesize for k in big) - 1
    cache = Cache(index, str(tmp_path / "c"), limit / 2**30)
    reader = Reader(index, cache)
    row = np.empty((1, *SHAPE), np.uint8)
    first = {k: np.array([sum(UNEVEN[:k])]) for k in big}
    paths = {}
    for age, k in enumerate(big[:2]):
        reader.read(first[k], row)
        paths[k] = cache.path(index.shards[k])
        os.utime(paths[k], (age, age))
    cache.path(index.shards[2])  # used again: shard 5 is the oldest now
    paths[7] = cache.path(index.shards[7])
    assert [paths[k].exists() for k in big] == [True, False, True]
    reader.read(first[5], row)
    assert np.array_equal(row[0], pixels_of(int(first[5][0]), SHAPE))
    assert not paths[5].exists()


def test_a_limit_below_one_shard_still_serves(remote, tmp_path):
    """Every shard is fetched when its turn comes, one at a time on disk."""
    _, index = remote
    cache = Cache(index, str(tmp_path / "c"), 1 / 2**30)
    out, _ = read_all_with(cache)
    assert np.array_equal(out[996], pixels_of(996, SHAPE))
    assert len(list((tmp_path / "c").glob("*.tar"))) == 1


def read_all_with(cache):
    out = np.empty((cache.index.num_samples, *SHAPE), np.uint8)
    return out, Reader(cache.index, cache).read(np.arange(len(out)), out)


def test_a_shard_evicted_before_it_is_opened_is_fetched_again(remote, tmp_path, monkeypatch):
    """Another process may make room between finding a shard and mapping it."""
    server, index = remote
    cache = Cache(index, str(tmp_path / "c"), 1.0)
    find, evictions = Cache.path, iter([True, True])

    def find_then_lose(self, shard):
        path = find(self, shard)
        if next(evictions, False):
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "path", find_then_lose)
    row = np.empty((1, *SHAPE), np.uint8)
    Reader(index, cache).read(np.array([500]), row)
    assert np.array_equal(row[0], pixels_of(500, SHAPE))
    assert server.gets[index.shards[5].url] == 3


def test_processes_that_evict_each_other_all_get_their_samples(remote, tmp_path):
    """Four processes, room for about one shard, random reads: no error, right pixels."""
    server, _ = remote
    code = (
        "import sys, numpy as np; from pipeline.data.shards import *\n"
        "from pipeline.data.cache import *; from pipeline.data.reader import *\n"
        "index = read_index(sys.argv[1]); cache = Cache(index, sys.argv[2], 5e5 / 2**30)\n"
        "ids = np.random.default_rng(int(sys.argv[3])).integers(0, 997, 60)\n"
        "for k in ids:\n"
        "    out = np.empty((1, *index.shape), np.uint8)\n"
        "    assert Reader(index, cache).read(np.array([k]), out)[0] == k % 10\n"
        "    wanted = np.random.default_rng(k).integers(0, 256, index.shape, dtype=np.uint8)\n"
        "    assert (out[0] == wanted).all()\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, server.url, str(tmp_path / "c"), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    errors = [racer.communicate(timeout=120)[1] for racer in racers]
    line = f"downloaded shards are kept in {tmp_path / 'c'} (data.cache_dir)\n"
    assert errors == [line] * 4

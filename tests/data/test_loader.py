"""Batches against what stock webdataset reads, under any cut, start, damage and signal."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
import webdataset as wds
from accelerate import Accelerator
from conftest import CountingServer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.config.schema import Config, DataConfig, ModelConfig
from pipeline.data.codecs import read_npy
from pipeline.data.loader import Batch, Loader, make_order, normalise, open_data
from pipeline.data.order import Order
from pipeline.data.shards import Index, read_index
from pipeline.models.sampling import to_uint8
from pipeline.runtime.errors import CorruptSample, DataError

# Three workers on a machine with two cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
BATCH = 24
CUTS = [(1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]


class Global(NamedTuple):
    """One global batch, its ranks' rows put together again."""

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def configured(index: Index, **data: Any) -> Config:
    values = {"batch_size": BATCH, "workers": 0} | data
    return Config(data=DataConfig(shards=index.location, **values))


def loader_of(index: Index, rank: int = 0, ranks: int = 1, **data: Any) -> Loader:
    config = configured(index, **data)
    return Loader(config, index, make_order(config, index), rank, ranks)


def read(index: Index, steps: int, *, start: int = 0, ranks: int = 1, **data: Any) -> list[Global]:
    """Global batches ``start`` to ``start + steps``, every rank's loader open at once."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(loader_of(index, rank, ranks, **data).batches(start)))
            for rank in range(ranks)
        ]
        return [_joined([next(stream) for stream in streams]) for _ in range(steps)]


def _joined(parts: list[Batch]) -> Global:
    pixels = np.concatenate([part.images.numpy() for part in parts])  # a copy: the ring goes on
    return Global(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        pixels,
    )


def stock(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, labels) of every sample by id, as stock webdataset reads the same tars."""
    urls = [str(Path(index.location) / shard.url) for shard in index.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the closing to the gc
        dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        samples = [(read_npy(memoryview(s["npy"])), int(s["cls"])) for s in dataset]
        del dataset
        gc.collect()
    return np.stack([pixels for pixels, _ in samples]), np.array([label for _, label in samples])


def assert_same(a: list[Global], b: list[Global]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)


def worker_pids() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def gone(pids: set[int], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        multiprocessing.active_children()  # collects those that have ended
        if not any(psutil.pid_exists(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def new_workers() -> Callable[[], set[int]]:
    """The child processes begun since the test began."""
    before = worker_pids()
    return lambda: worker_pids() - before


@pytest.fixture
def damaged_copy(tmp_path: Path) -> Callable[[Index, Any], Index]:
    """A function (index, ids) -> a copy of the set in which these samples cannot be decoded."""

    def copy(index: Index, ids: Any) -> Index:
        folder = tmp_path / "damaged"
        shutil.copytree(index.location, folder)
        starts = np.cumsum([0, *index.sizes])
        for sample in np.asarray(ids).tolist():
            shard = int(np.searchsorted(starts, sample, side="right")) - 1
            with (folder / index.shards[shard].url).open("r+b") as file:
                file.seek(int(index.table[sample]["offset"]))
                file.write(b"\0" * 16)
        return read_index(str(folder))

    return copy


# -- which samples ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(uneven: Index) -> list[Global]:
    """Two epochs and a bit, read in the training process itself."""
    return read(uneven, 2 * uneven.num_samples // BATCH + 3)


def test_pixels_and_labels_are_what_stock_webdataset_reads(
    uneven: Index, one_process: list[Global]
) -> None:
    """Every row of every batch has the pixels and label that webdataset gives that sample."""
    pixels, labels = stock(uneven)
    for batch in one_process:
        np.testing.assert_array_equal(batch.pixels, pixels[batch.ids])
        np.testing.assert_array_equal(batch.labels, labels[batch.ids])


@pytest.mark.parametrize(("ranks", "workers"), CUTS[1:])
def test_ranks_and_workers_do_not_change_the_batches(
    ranks: int, workers: int, uneven: Index, one_process: list[Global]
) -> None:
    """Ids, labels, pixels and the order of rows are those of one process without workers."""
    cut = read(uneven, len(one_process), ranks=ranks, workers=workers)
    assert_same(cut, one_process)


def test_lanes_and_windows_do_not_depend_on_the_cut_either(uneven: Index) -> None:
    """The order for big data, with blocks, windows and lanes, is cut as well as the uniform one."""
    order = {"block": 16, "window": 100, "lanes": 3}
    whole = read(uneven, 50, **order)
    assert_same(read(uneven, 50, ranks=3, workers=2, **order), whole)
    assert_same(read(uneven, 20, start=30, ranks=2, workers=1, **order), whole[30:])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_exactly_once_per_epoch(workers: int, uneven: Index) -> None:
    """Over two epochs each id comes twice, once in each; the batch over the end holds both."""
    n = uneven.num_samples
    assert n % BATCH, "the carry rule is only seen when an epoch is no whole number of batches"
    batches = read(uneven, 2 * n // BATCH + 1, workers=workers)
    ids = np.concatenate([batch.ids for batch in batches])
    assert all(len(batch.ids) == BATCH for batch in batches)
    for epoch in range(2):
        assert sorted(ids[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    assert ids[:n].tolist() != ids[n : 2 * n].tolist()


def test_a_set_smaller_than_one_batch_fills_it_over_several_epochs(
    make_shards: Callable[..., Index], tmp_path: Path
) -> None:
    """N = 7, batch 24: batches stay full and each 7 positions hold every sample once."""
    index = make_shards(tmp_path / "seven", [3, 0, 4])
    batches = read(index, 7, ranks=2, workers=1)
    ids = np.concatenate([batch.ids for batch in batches]).reshape(-1, 7)
    assert np.sort(ids).tolist() == [list(range(7))] * BATCH


@given(data=st.data())
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_start_and_order_agree(data: st.DataObject, uneven: Index) -> None:
    """For any ranks, batch, start, prefetch and order, the ranks' rows are the global batch."""
    draw = data.draw
    ranks = draw(st.integers(1, 5))
    batch_size = ranks * draw(st.integers(1, 40))
    start = draw(st.integers(0, 10**6))
    order = {
        "block": draw(st.sampled_from([1, 2, 64, 1000])),
        "window": draw(st.sampled_from([0, 1, 50, 5000])),
        "lanes": draw(st.integers(1, 6)),
    }
    prefetch = draw(st.integers(1, 3))
    steps = draw(st.integers(1, 3))
    got = read(
        uneven, steps, start=start, ranks=ranks, batch_size=batch_size, prefetch=prefetch, **order
    )
    expected = Order(uneven.sizes, 0, **order)
    for k, batch in enumerate(got):
        positions, ids = expected.batch(start + k, batch_size)
        assert batch.ids.tolist() == ids.tolist()
        assert batch.labels.tolist() == uneven.table["label"][ids].tolist()
        epochs = positions // uneven.num_samples
        for epoch in np.unique(epochs):
            assert max(Counter(ids[epochs == epoch].tolist()).values()) == 1


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    batch_size=st.integers(1, 40),
    lanes=st.integers(1, 4),
    window=st.integers(0, 20),
    block=st.integers(1, 8),
)
@hypothesis_settings(max_examples=60)
def test_any_shard_sizes_give_each_sample_once_an_epoch(
    sizes: list[int], batch_size: int, lanes: int, window: int, block: int
) -> None:
    """Batches partition the positions and any epoch's positions hold each id once."""
    n = sum(sizes)
    order = Order(sizes, 3, block=block, window=window, lanes=lanes)
    steps = -(-3 * n // batch_size)
    positions, ids = (
        np.concatenate(part)
        for part in zip(*(order.batch(k, batch_size) for k in range(steps)), strict=True)
    )
    assert sorted(positions.tolist()) == list(range(steps * batch_size))
    for epoch in range(3):
        assert sorted(ids[positions // n == epoch].tolist()) == list(range(n))


# -- where it starts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_a_later_start_skips_without_decoding(
    ranks: int,
    workers: int,
    uneven: Index,
    one_process: list[Global],
    damaged_copy: Callable[[Index, Any], Index],
) -> None:
    """Starting at step 25 gives the batches from 25 on, though no earlier sample is readable."""
    start = 25
    skipped = np.concatenate([batch.ids for batch in one_process[:start]])
    index = damaged_copy(uneven, skipped)
    rest = read(index, 41 - start, start=start, ranks=ranks, workers=workers)
    assert_same(rest, one_process[start:41])
    with pytest.raises(CorruptSample):
        read(index, 1)


# -- the ring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (2, 1), (2, 4), (3, 2)])
def test_a_batch_stays_valid_while_the_next_one_is_used(
    workers: int, prefetch: int, uneven: Index
) -> None:
    """Images are unchanged after one further ``next``, however far ahead the workers are."""
    pixels, _ = stock(uneven)
    with closing(loader_of(uneven, workers=workers, prefetch=prefetch).batches()) as batches:
        before = next(batches)
        for k in range(40):
            current = next(batches)
            if k % 4 == 0:
                time.sleep(0.01)  # let the workers run as far ahead as they may
            np.testing.assert_array_equal(before.images.numpy(), pixels[before.ids])
            np.testing.assert_array_equal(current.images.numpy(), pixels[current.ids])
            before = current


def test_the_ring_needs_no_dev_shm(uneven: Index) -> None:
    """A container with Docker's 64 MB of /dev/shm can run it: no image lies there."""
    with closing(loader_of(uneven, workers=2).batches()) as batches:
        next(batches)
        for pid in [os.getpid(), *worker_pids()]:
            mapped = Path(f"/proc/{pid}/maps").read_text()
            assert "/dev/shm/torch" not in mapped


# -- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_the_stream_ends_every_worker(
    taken: int, uneven: Index, new_workers: Callable[[], set[int]]
) -> None:
    """No worker outlives ``close``, whether or not a batch was taken."""
    batches = loader_of(uneven, workers=3).batches()
    for _ in range(taken):
        next(batches)
    pids = new_workers()
    assert len(pids) == 3
    batches.close()
    assert gone(pids)


def test_closing_does_not_wait_for_a_download_that_hangs(
    uneven: Index,
    tmp_path: Path,
    new_workers: Callable[[], set[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker amid a request that never ends is gone soon after ``close``."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        index = replace(uneven, location=url)
        batches = loader_of(index, workers=1, cache_dir=str(tmp_path)).batches()
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            pids = new_workers()
            assert len(pids) == 1
            batches.close()
            assert gone(pids)


def test_a_killed_worker_is_one_message_and_no_hang(
    uneven: Index, new_workers: Callable[[], set[int]]
) -> None:
    """SIGKILL of one worker, as by the kernel when memory runs out: told by the next batch, not
    amid whatever the training process does when it happens; the other workers end.
    """
    batches = loader_of(uneven, workers=2, prefetch=2).batches()
    next(batches)
    pids = new_workers()
    victim = psutil.Process(random.choice(sorted(pids)))
    victim.kill()
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"data.workers \(2\): a data worker was killed"):
        list(batches)
    batches.close()
    assert gone(pids)


def test_a_worker_killed_while_the_queue_is_full_is_no_hang(
    uneven: Index, new_workers: Callable[[], set[int]]
) -> None:
    """Local batches so large that their ids alone would fill the pipe: nobody waits for the rest.

    Without a pause for the workers the test would pass as well, but show less.
    """

    def too_late(*_: object) -> None:
        pytest.fail("the training waits for a worker that is dead")

    batches = loader_of(uneven, workers=2, prefetch=8, batch_size=8192).batches()
    next(batches)
    time.sleep(2)
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(100)
    try:
        for pid in new_workers():  # all: one of them is amid a message
            psutil.Process(pid).kill()
        with pytest.raises(DataError, match=r"data.workers \(2\): a data worker was killed"):
            list(batches)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_one_message_with_shard_key_and_offset(
    workers: int,
    uneven: Index,
    one_process: list[Global],
    damaged_copy: Callable[[Index, Any], Index],
    new_workers: Callable[[], set[int]],
) -> None:
    """Batches before it arrive; then ``CorruptSample``, no traceback of a worker inside."""
    at = 5
    sample = int(one_process[at].ids[7])
    index = damaged_copy(uneven, [sample])
    batches = loader_of(index, workers=workers).batches()
    for expected in one_process[:at]:
        assert next(batches).ids.tolist() == expected.ids.tolist()
    pids = new_workers()
    with pytest.raises(CorruptSample) as caught:
        next(batches)
    message = str(caught.value)
    starts = np.cumsum([0, *index.sizes])
    shard = index.shards[int(np.searchsorted(starts, sample, side="right")) - 1]
    assert f"{shard.url}: sample {sample:06d}.npy at offset" in message
    assert f"offset {index.table[sample]['offset']} " in message
    assert "Traceback" not in message
    assert "\n" not in message
    assert len(pids) == workers
    assert gone(pids), "workers live on while the error is held"


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_damaged_samples_may_be_passed_over(
    ranks: int,
    workers: int,
    uneven: Index,
    one_process: list[Global],
    damaged_copy: Callable[[Index, Any], Index],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The next intact one takes the place, the same on any number of ranks; all else is equal."""
    bad = {int(one_process[5].ids[7])}
    bad |= {uneven.num_samples - 1, (next(iter(bad)) + 1) % uneven.num_samples}
    index = damaged_copy(uneven, sorted(bad))
    found = read(index, 41, ranks=ranks, workers=workers, skip_damaged=3)
    by_id = dict(zip(range(uneven.num_samples), stock(uneven)[0], strict=True))
    for batch, before in zip(found, one_process, strict=False):
        wanted = before.ids.copy()
        while (at := np.isin(wanted, sorted(bad))).any():
            wanted[at] = (wanted[at] + 1) % uneven.num_samples
        assert batch.ids.tolist() == wanted.tolist()
        assert np.array_equal(batch.pixels, np.stack([by_id[k] for k in wanted.tolist()]))
    said = capfd.readouterr().err
    for sample in bad:
        assert f"sample {sample} is damaged" in said
    with pytest.raises(CorruptSample, match=r"data\.skip_damaged \(1\): this is one more"):
        read(index, 41, skip_damaged=1)


def test_a_shard_lost_before_it_is_read_is_named(uneven: Index, tmp_path: Path) -> None:
    """A missing or a shortened shard is a ``DataError`` with its path, also out of a worker."""
    folder = tmp_path / "lost"
    shutil.copytree(uneven.location, folder)
    index = read_index(str(folder))
    largest = folder / max(index.shards, key=lambda shard: shard.nsamples).url
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"{largest.name}: \d+ bytes, the index says"):
        read(index, 10, workers=1)
    largest.unlink()
    with pytest.raises(DataError, match=rf"{largest.name}: missing"):
        read(index, 10, workers=1)


SIGNALLED = """
import sys
import psutil
from pipeline.runtime import signals
signals.install()
from pipeline.config.schema import Config, DataConfig
from pipeline.data.loader import Loader, make_order
from pipeline.data.shards import read_index

index = read_index(sys.argv[1])
config = Config(data=DataConfig(shards=sys.argv[1], batch_size=24, workers=2))
batches = Loader(config, index, make_order(config, index)).batches()
pids = {child.pid for child in psutil.Process().children()}
for _ in range(2):
    print(len(pids), flush=True)
    sys.stdin.readline()
    for _ in range(30):
        next(batches)
still = {child.pid for child in psutil.Process().children()}
batches.close()
print(pids == still, len(psutil.Process().children()), signals.received(), flush=True)
"""


def test_signals_to_the_process_group_leave_the_workers_alone(uneven: Index) -> None:
    """SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C to the group, at the workers' birth and later: batches
    go on until the training process itself closes the stream.
    """
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, uneven.location],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for numbers in (
            (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT),
            (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1),  # a second Ctrl-C means now
        ):
            assert process.stdout.readline() == "2\n"
            for number in numbers:
                os.killpg(process.pid, number)
            time.sleep(0.05)
            process.stdin.write("go\n")
            process.stdin.flush()
        output = process.stdout.read()
        assert process.wait() == 0, output
    same, left, received = output.split()
    assert (same, left) == ("True", "0"), output
    assert received.startswith("SIG")


# -- remote -------------------------------------------------------------------------------------


def test_remote_shards_are_fetched_once_for_all_ranks_and_workers(
    uneven: Index,
    one_process: list[Global],
    serve: Callable[[Path], CountingServer],
    tmp_path: Path,
) -> None:
    """Over http, 2 ranks x 2 workers that race: one GET per shard and the batches of the disk."""
    server = serve(Path(uneven.location))
    index = read_index(server.url)
    batches = read(index, 45, ranks=2, workers=2, cache_dir=str(tmp_path / "cache"))
    assert_same(batches, one_process[:45])
    gets = {name: count for name, count in server.gets.items() if name.endswith(".tar")}
    with_samples = {shard.url for shard in index.shards if shard.nsamples}
    assert gets == dict.fromkeys(with_samples, 1)


# -- the entrance and the way to the device -----------------------------------------------------


def test_images_of_another_shape_are_refused_with_the_remedy(uneven: Index) -> None:
    """The message has both shapes and both ways out."""
    config = replace(configured(uneven), model=ModelConfig(image_size=64, channels=1))
    with pytest.raises(DataError) as caught:
        open_data(config, Accelerator(cpu=True))
    for part in ("8x8 with 3 channels", "64x64 with 1 channel", "--size 64", "model.image_size"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (9, r"labels 0 \(-1: none\) to 9, but model\.num_classes \(9\) wants 0 to 8"),
        (12, r"no sample has the label 10, 11, but .*num_classes to 10"),
        (40, r"label 10, 11, 12, 13, 14, 15, 16, 17, 18, \.\.\."),
    ],
)
def test_classes_are_the_labels_of_the_shards_each_and_all(
    classes: int, said: str, uneven: Index
) -> None:
    """Of a class that no image has, half of every grid would be images that G never learned."""
    config = replace(configured(uneven), model=ModelConfig(image_size=8, num_classes=classes))
    with pytest.raises(DataError, match=said):
        open_data(config, Accelerator(cpu=True))
    right = replace(config, model=replace(config.model, num_classes=10))
    assert open_data(right, Accelerator(cpu=True)).num_samples == 997


def test_opening_checks_every_byte_of_a_small_set(uneven: Index, tmp_path: Path) -> None:
    """A flipped bit is found before the first step, not in the middle of an epoch."""
    folder = tmp_path / "flipped"
    shutil.copytree(uneven.location, folder)
    model = ModelConfig(image_size=8, channels=3)
    config = Config(model=model, data=DataConfig(shards=str(folder)))
    index = open_data(config, Accelerator(cpu=True))
    assert index.num_samples == uneven.num_samples
    with (folder / index.shards[2].url).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match="checksum differs"):
        open_data(config, Accelerator(cpu=True))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_normalise_values_type_and_layout(channels: int, channels_last: bool) -> None:
    """0 -> -1, 255 -> 1 exactly, float32 NCHW in the layout asked for; the input is untouched."""
    images = torch.zeros(2, 4, 6, channels, dtype=torch.uint8)
    images[0, 0, 0, 0], images[0, 0, 1, 0], images[0, 2, 3, 0] = 127, 128, 255
    kept = images.clone()
    out = normalise(images, torch.device("cpu"), channels_last)
    assert out.dtype == torch.float32
    assert out.shape == (2, channels, 4, 6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)
    assert out[1, 0, 0, 0] == -1.0
    assert out[0, 0, 2, 3] == 1.0
    assert out[0, 0, 0, 0].item() == pytest.approx(-1 / 255, abs=1e-7)
    assert out[0, 0, 0, 1].item() == pytest.approx(1 / 255, abs=1e-7)
    assert torch.equal(images, kept)


def test_every_grey_level_survives_the_way_to_the_device_and_back() -> None:
    """to_uint8(normalise(x)) == x for all 256 values: real and generated images share one scale."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(to_uint8(normalise(images, torch.device("cpu"))), images)

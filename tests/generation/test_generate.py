"""Sets, pictures, films and exports: real commands, real ranks, what others read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluating import MODEL, add_snapshot, generator_of, make_config
from launching import REPO, environment, free_port, kill, rank_process
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import generate
from pipeline.config.schema import ModelConfig
from pipeline.data.cache import Cache, check_shards
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.generation import export, image_sets, latent
from pipeline.generation.image_set import ImageSet
from pipeline.generation.latent import Table
from pipeline.models import sampling
from pipeline.models.dcgan import init_weights, make_generator
from pipeline.models.noise import rng
from pipeline.runs.snapshot import export_snapshot, load_snapshot
from pipeline.runtime.documents import read_document, write_document
from pipeline.runtime.errors import CheckpointError, GenerationError, UserError

NUM = 150  # three blocks, the last one not full


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return add_snapshot(folder, make_config(folder), 30)


@pytest.fixture(scope="module")
def expected(snapshot: Path) -> np.ndarray:
    """(NUM, 32, 32, 1): what every way must lead to."""
    return images_of(snapshot, Table(MODEL, 0).cut(0, NUM))


def images_of(snapshot: Path, z: torch.Tensor) -> np.ndarray:
    network, _ = load_snapshot(snapshot)
    return sampling.draw_images(network, z)  # type: ignore[arg-type]


def made(command: str, snapshot: Path, out: Path, *words: object) -> Path:
    """The command without a process of its own: its errors come as exceptions."""
    arguments = [command, "--snapshot", snapshot, "--out", out, *words]
    generate.generate(generate.parse([str(word) for word in arguments]))
    return out


def process(*words: object, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_port", str(free_port()), "--"]
    return subprocess.Popen(
        [*launcher, str(REPO / "pipeline" / "generate.py"), *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stock_samples(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{key: decoded sample} of a tar by webdataset's own stages, which leave no file open."""
    from webdataset import autodecode, tariterators

    decode = autodecode.Decoder([autodecode.imagehandler("rgb8")])
    with path.open("rb") as file:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        return {s["__key__"]: decode(s) for s in tariterators.group_by_keys(files)}


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def pixels_in(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])[..., None]


# -- sets of images -----------------------------------------------------------------------------


def test_the_formats_hold_the_same_images(
    snapshot: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """PNG files, npz, and shards that our reader and stock webdataset read."""
    png = made("images", snapshot, tmp_path / "png", "--num", NUM)
    assert np.array_equal(pixels_in(png), expected)
    assert sorted(p.name for p in png.iterdir())[-2:] == ["00000149.png", "generated.json"]
    npz = made("images", snapshot, tmp_path / "x.npz", "--num", NUM, "--format", "npz")
    with np.load(npz, allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], expected)
        assert json.loads(str(archive["made_by"]))["num"] == NUM
    shards = made("images", snapshot, tmp_path / "s", "--num", NUM, "--format", "shards")
    index = read_index(str(shards))
    check_shards(index, "sha256")
    out = np.empty_like(expected)
    Reader(index, Cache(index, "")).read(np.arange(NUM), out)
    assert np.array_equal(out, expected)
    stock = {k: v for shard in index.shards for k, v in stock_samples(shards / shard.url).items()}
    assert list(stock) == [f"{row:08d}" for row in range(NUM)]
    read = np.stack([sample["png"] for sample in stock.values()])
    assert np.array_equal(read[..., :1], expected)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_larger_set_begins_with_the_smaller_one(
    snapshot: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    few = made("images", snapshot, tmp_path / "few", "--num", 7)
    assert np.array_equal(pixels_in(few), expected[:7])
    other = made("images", snapshot, tmp_path / "other", "--num", 7, "--seed", 1)
    assert not np.array_equal(pixels_in(other), expected[:7])


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(snapshot: Path, tmp_path: Path) -> None:
    """Real ranks over gloo: every file of the set is equal, index and checksums included."""
    for ranks in (1, 2):
        words = ["--snapshot", snapshot, "--num", NUM, "--format", "shards"]
        running = process("images", *words, "--out", tmp_path / f"{ranks}", ranks=ranks)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 0, output
        assert f"written: {NUM} images" in output
    assert bytes_in(tmp_path / "1") == bytes_in(tmp_path / "2")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_leaves_nothing_complete(
    snapshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "many"
    running = process("images", "--snapshot", snapshot, "--num", 200_000, "--out", out, ranks=2)
    try:
        deadline = time.monotonic() + 90
        while not list((tmp_path / "many.tmp").glob(".generate/0*")):
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank_process(running, 1).send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    finally:
        kill(running)
    assert running.returncode != 0
    assert "stopped by" in output
    assert 'generate.py", line' not in output  # torchrun adds a traceback of its own
    assert not out.exists()


def test_an_interrupted_set_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    """Finished parts are not made again; the part that was cut short is."""
    G, table, rows = generator(), Table(MODEL, 0), 5 * 64
    accelerator = Accelerator(cpu=True)
    for format in ("png", "npz", "shards"):
        whole = ImageSet(tmp_path / f"{format}-whole", format, rows, (32, 32, 1), {"seed": 0})
        image_sets.write(whole, lambda a, b: sampling.draw_images(G, table.cut(a, b)), accelerator)
        done: list[int] = []

        def images(start: int, stop: int, done: list[int] = done) -> np.ndarray:
            if len(done) == 3:
                done.append(-1)
                raise OSError(28, "No space left on device")
            done.append(start)
            return sampling.draw_images(G, table.cut(start, stop))

        job = ImageSet(tmp_path / f"{format}-cut", format, rows, (32, 32, 1), {"seed": 0})
        with pytest.raises(GenerationError, match="the disk is full"):
            image_sets.write(job, images, accelerator)
        assert not job.out.exists()
        assert image_sets.write(job, images, accelerator) == "written"
        assert done == [0, 64, 128, -1, 192, 256]
        assert not job.unfinished.exists()
        if format == "npz":
            assert job.out.read_bytes() == whole.out.read_bytes()
        else:
            assert bytes_in(job.out) == bytes_in(whole.out)
        assert image_sets.write(job, images, accelerator) == "complete"
        assert len(done) == 6


FORMATS = ("png", "npz", "shards")
PART_HARM = {
    "cut": lambda raw: raw[:-1],
    "empty": lambda _: b"",
    "flipped": lambda raw: raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:],
    "longer": lambda raw: raw + b"0",
    "deleted": None,
}


def small_set(out: Path, format: str) -> tuple[ImageSet, Callable[[int, int], np.ndarray]]:
    """(a set of four parts of 64 images each, what draws its images)."""
    G, table = generator(), Table(MODEL, 0)
    job = ImageSet(out, format, 4 * 64, (32, 32, 1), {"seed": 0, "num": 4 * 64})
    return job, lambda start, stop: sampling.draw_images(G, table.cut(start, stop))


def harm(path: Path, how: str) -> None:
    change = PART_HARM[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


def some_part(job: ImageSet) -> Path:
    return job.parts_folder / job.files_of(1)[-1]


def content_of(out: Path) -> dict[str, bytes]:
    return bytes_in(out) if out.is_dir() else {"": out.read_bytes()}


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_part_is_set_aside_and_made_again(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of a finished part, harmed before the command goes on or while it does."""
    accelerator = Accelerator(cpu=True)
    whole, images = small_set(tmp_path / "whole", format)
    image_sets.write(whole, images, accelerator)
    for how in PART_HARM:
        job, _ = small_set(tmp_path / how, format)

        def full(start: int, stop: int) -> np.ndarray:
            if start == 128:
                raise OSError(28, "No space left on device")
            return images(start, stop)

        def harmful(start: int, stop: int, job: ImageSet = job, how: str = how) -> np.ndarray:
            if start == 192:
                harm(some_part(job), how)
            return images(start, stop)

        with pytest.raises(GenerationError, match="the disk is full"):
            image_sets.write(job, full, accelerator)
        harm(some_part(job), how)
        with pytest.raises(GenerationError, match="1 of 4 parts were changed while others were"):
            image_sets.write(job, harmful, accelerator)
        assert not job.out.exists()
        assert image_sets.write(job, images, accelerator) == "written"
        said = capsys.readouterr().err
        assert said.count("its part is made again") == 2
        assert said.count(f"set aside as {some_part(job).name}.damaged") == 2 * (how != "deleted")
        found = {k: v for k, v in content_of(job.out).items() if ".damaged" not in k}
        assert found == content_of(whole.out), how


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_marker_is_set_aside_and_its_part_made_again(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = Accelerator(cpu=True)
    job, images = small_set(tmp_path / "x", format)
    for content in (b"", b"[", b"{}", "file name", "an earlier set"):
        with pytest.raises(GenerationError, match="the disk is full"):
            image_sets.write(
                job,
                lambda a, b: images(a, b) if a < 192 else exec("raise OSError(28, '')"),  # type: ignore[return-value]
                accelerator,
            )
        marker = job.work.path / "000001"
        document = read_document(marker)
        if content == "file name":
            write_document(marker, document | {"files": {"../../mine": [1, "0"]}})
        elif content == "an earlier set":
            write_document(marker, document | {"settings": "0"})
        else:
            marker.write_bytes(content)
    assert image_sets.write(job, images, accelerator) == "written"
    assert capsys.readouterr().err.count("set aside as 000001.damaged") == 5


@pytest.mark.parametrize("format", FORMATS)
def test_a_fifo_or_a_link_in_place_of_an_unfinished_part_is_replaced(
    format: str, tmp_path: Path
) -> None:
    """It is neither waited for nor written through."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    job, images = small_set(tmp_path / "x", format)
    job.parts_folder.mkdir(parents=True)
    job.work.path.mkdir(exist_ok=True)
    job.work.begin()
    os.mkfifo(job.parts_folder / job.files_of(0)[0])
    (job.parts_folder / job.files_of(1)[0]).symlink_to(mine)
    assert image_sets.write(job, images, Accelerator(cpu=True)) == "written"
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("format", FORMATS)
def test_a_complete_set_that_was_changed_is_never_called_complete(
    format: str, tmp_path: Path
) -> None:
    """Any byte of any of its files: one message that names the set."""
    accelerator = Accelerator(cpu=True)
    job, images = small_set(tmp_path / "set", format)
    image_sets.write(job, images, accelerator)
    files = [job.out] if format == "npz" else sorted(job.out.iterdir())
    random = np.random.default_rng(0)
    for number in [*random.integers(len(files), size=40), *([-1] * 20)]:
        path = files[number]
        before = path.read_bytes()
        for _ in range(4):
            at, bit = int(random.integers(len(before))), 1 << int(random.integers(8))
            path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
            if path.name == "index.json" and b"wids_version" in before[at - 20 : at + 20]:
                continue  # another version of that schema changes nothing for us
            with pytest.raises(UserError) as caught:
                image_sets.write(job, images, accelerator)
            assert str(job.out) in str(caught.value)
            assert "Traceback" not in str(caught.value)
        path.write_bytes(before[: int(random.integers(len(before)))])
        with pytest.raises(UserError):
            image_sets.write(job, images, accelerator)
        path.write_bytes(before)
    assert image_sets.write(job, images, accelerator) == "complete"


def test_what_lies_there_is_never_replaced(snapshot: Path, tmp_path: Path) -> None:
    """The same set again is complete; anything else is refused, and named."""
    out = made("images", snapshot, tmp_path / "x", "--num", 5)
    before = bytes_in(out)
    made("images", snapshot, out, "--num", 5)
    with pytest.raises(UserError, match=r"says generated.json:\n  seed: was 0, is now 1"):
        made("images", snapshot, out, "--num", 5, "--seed", 1)
    with pytest.raises(GenerationError, match="holds something else"):
        made("images", snapshot, out, "--num", 5, "--format", "shards")
    assert bytes_in(out) == before
    (tmp_path / "empty").mkdir()
    made("images", snapshot, tmp_path / "empty", "--num", 5)
    (tmp_path / "empty" / "00000003.png").unlink()
    with pytest.raises(GenerationError, match=r" 1 files of the set are missing, .* 00000003\.png"):
        made("images", snapshot, tmp_path / "empty", "--num", 5)
    shards = made("images", snapshot, tmp_path / "s", "--num", 5, "--format", "shards")
    (shards / "shard-000000.tar").unlink()
    with pytest.raises(
        GenerationError, match=r"files of the set are missing, .* shard-000000\.tar"
    ):
        made("images", snapshot, shards, "--num", 5, "--format", "shards")
    G, config = load_snapshot(snapshot)
    config = replace(config, model=replace(config.model, z_distribution="normal"))
    other = export_snapshot(tmp_path, 30, G.state_dict(), config)
    with pytest.raises(UserError, match="z_distribution: was uniform, is now normal"):
        made("images", other, out, "--num", 5)
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(GenerationError, match="holds something else"):
        made("images", snapshot, tmp_path / "a.npz", "--num", 5, "--format", "npz")


def test_files_of_others_are_one_message(snapshot: Path, tmp_path: Path) -> None:
    """An npz that is a plain array or damaged, a record that is no object."""
    out = tmp_path / "a.npz"
    words = ("--num", 5, "--format", "npz")
    with out.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(GenerationError, match="holds something else"):
        made("images", snapshot, out, *words)
    with out.open("wb") as file:
        np.savez_compressed(file, made_by=np.array("x" * 5000))
    content = bytearray(out.read_bytes())
    content[60] ^= 255
    out.write_bytes(content)
    with pytest.raises(GenerationError, match="holds something else"):
        made("images", snapshot, out, *words)
    settings = tmp_path / "x.tmp" / ".generate" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text("[]")
    with pytest.raises(UserError, match=r"must hold a JSON object.* Remove"):
        made("images", snapshot, tmp_path / "x", "--num", 5)


def test_a_folder_of_the_user_beside_out_is_left_alone(snapshot: Path, tmp_path: Path) -> None:
    """OUT.tmp is where a set grows; one that this command has not begun is neither taken over nor
    removed.
    """
    mine = tmp_path / "x.tmp" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    for out, words in (("x", ()), ("x.npz", ("--format", "npz"))):
        mine.parent.rename(tmp_path / f"{out}.tmp")
        mine = tmp_path / f"{out}.tmp" / "mine"
        with pytest.raises(GenerationError, match=r"x.*\.tmp, which holds something else"):
            made("images", snapshot, tmp_path / out, "--num", 5, *words)
    mine.parent.rename(tmp_path / "hub.tmp")
    made("hub", snapshot, tmp_path / "hub")
    assert (tmp_path / "hub.tmp" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "hub.tmp"]


def test_a_begun_set_of_other_settings_is_refused(snapshot: Path, tmp_path: Path) -> None:
    settings = tmp_path / "x.tmp" / ".generate" / "settings.json"
    settings.parent.mkdir(parents=True)
    write_document(settings, {"seed": 3})
    with pytest.raises(UserError, match="seed: was 3, is now 0"):
        made("images", snapshot, tmp_path / "x", "--num", 5)
    settings.write_text("{")
    with pytest.raises(UserError, match=r"is not JSON.* Remove"):
        made("images", snapshot, tmp_path / "x", "--num", 5)


def test_two_commands_on_one_set_do_not_mix(snapshot: Path, tmp_path: Path) -> None:
    lock = tmp_path / "x.tmp" / ".generate" / "lock"
    lock.parent.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 2)"
    code += "; print(1, flush=True); input()"
    words = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing"):
            made("images", snapshot, tmp_path / "x", "--num", 5)
        other.kill()
    made("images", snapshot, tmp_path / "x", "--num", 5)


def generator() -> torch.nn.Module:
    return sampling.make_sampler(MODEL, generator_of(30).state_dict())


# -- z ------------------------------------------------------------------------------------------


def test_truncation_shrinks_z_and_so_the_variety(snapshot: Path, tmp_path: Path) -> None:
    table, half = Table(MODEL, 0), Table(MODEL, 0, 0.5)
    assert torch.equal(half.cut(3, 9), table.cut(3, 9) / 2)
    wide = pixels_in(made("images", snapshot, tmp_path / "1", "--num", 32)).astype(float)
    narrow = made("images", snapshot, tmp_path / "2", "--num", 32, "--truncation", 0.3)
    assert pixels_in(narrow).astype(float).std(0).mean() < 0.7 * wide.std(0).mean()


def test_classes_go_round_or_are_one() -> None:
    """Row i is of class i mod num_classes; with ``of_class`` the same z, of that class."""
    model = ModelConfig(z_dim=4, num_classes=3)
    rows = Table(model, 0, truncation=0.5).cut(62, 68)
    assert rows[:, 4:].argmax(1).tolist() == [2, 0, 1, 2, 0, 1]
    assert rows[:, 4:].sum(1).tolist() == [1] * 6
    plain = ModelConfig(z_dim=4)
    assert torch.equal(rows[:, :4], Table(plain, 0, truncation=0.5).cut(62, 68))
    one = Table(model, 0, of_class=1).cut(62, 68)
    assert one[:, 4:].argmax(1).tolist() == [1] * 6
    assert torch.equal(one[:, :4], Table(plain, 0).cut(62, 68))
    between = latent.walk(model, Table(model, 0).rows([0, 1]), 2)[0, 1]
    assert between[4:].tolist() == [0.5, 0.5, 0]


def test_a_class_that_g_does_not_have_is_refused(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"--class \(3\): this G has no classes"):
        made("grid", snapshot, tmp_path / "g.png", "--class", 3)


def test_rows_have_the_same_z_by_number_and_by_cut() -> None:
    table = Table(MODEL, 5)
    assert torch.equal(table.rows([70, 3]), torch.cat([table.cut(70, 71), table.cut(3, 4)]))
    assert latent.parse_rows("3,17, 40-42", "--rows") == [3, 17, 40, 41, 42]
    for wrong in ("", "a", "5-3", "1,,2", "-1", "0-99999999", "1.5"):
        with pytest.raises(GenerationError, match=r"--rows .* must be row numbers"):
            latent.parse_rows(wrong, "--rows")


def test_a_walk_of_normal_z_keeps_to_the_sphere_and_one_of_uniform_z_to_the_cube() -> None:
    """Arcs keep lengths between those of the ends; lines keep inside and even in pace."""
    normal = ModelConfig(z_dim=100, z_distribution="normal")
    points = Table(normal, 0).rows([0, 1, 2])
    legs = latent.walk(normal, points, 10)
    assert legs.shape == (2, 11, 100)
    assert torch.allclose(legs[0, 0], points[0], atol=1e-5)
    assert torch.equal(legs[0, -1].round(decimals=4), legs[1, 0].round(decimals=4))
    lengths, ends = legs.norm(dim=2), points.norm(dim=1)
    assert lengths.min() > ends.min() - 1e-3
    assert lengths.max() < ends.max() + 1e-3
    uniform = ModelConfig(z_dim=100, z_distribution="uniform")
    corners = Table(uniform, 0).rows([0, 1])
    line = latent.walk(uniform, corners, 4, closed=True)
    assert line.shape == (2, 5, 100)
    assert line.abs().max() <= 1
    assert torch.allclose(line[0, 2], corners.mean(0), atol=1e-6)
    assert torch.allclose(line[1, -1], corners[0], atol=1e-6)
    same = latent.slerp(points[0], points[0], torch.linspace(0, 1, 3))
    assert torch.allclose(same, points[0].expand(3, -1))


def test_arithmetic_is_that_of_the_means() -> None:
    a, b, c = torch.full((3, 4), 3.0), torch.full((2, 4), 2.0), torch.full((1, 4), 10.0)
    model = ModelConfig(z_dim=4)
    means, result = latent.arithmetic(model, a, b, c)
    assert means[:, 0].tolist() == [3, 2, 10]
    assert result.tolist() == [11] * 4
    around = latent.neighbours(model, result, 0.25, seed=0)
    assert torch.equal(around[4], result)
    away = (around - result).abs()
    assert away.max() <= 0.25
    assert (away[[0, 1, 2, 3, 5, 6, 7, 8]].max(1).values > 0).all()
    assert torch.equal(around, latent.neighbours(model, result, 0.25, seed=0))


def test_arithmetic_leaves_the_class_alone() -> None:
    """z is added and subtracted; the class is that of c, also in the eight images around it."""
    model = ModelConfig(z_dim=4, num_classes=3)
    table = Table(model, 0)
    a, b, c = (table.rows(latent.parse_concept(f"class:{k}", "--a", table)) for k in (2, 0, 1))
    assert torch.equal(a, table.rows([2, 5, 8]))
    _, result = latent.arithmetic(model, a, b, c)
    assert torch.allclose(result[:4], (a.mean(0) - b.mean(0) + c.mean(0))[:4])
    assert result[4:].tolist() == [0, 1, 0]
    assert latent.neighbours(model, result, 0.25, seed=0)[:, 4:].tolist() == [[0, 1, 0]] * 9
    for other, said in (
        (table, "classes 0 to 2"),
        (Table(ModelConfig(z_dim=4), 0), "no classes"),
        (Table(model, 0, of_class=1), "--class 1 gives every row"),
    ):
        with pytest.raises(GenerationError, match=rf"--a \(class:3\): .*{said}"):
            latent.parse_concept("class:3", "--a", other)


# -- pictures -----------------------------------------------------------------------------------


def test_a_grid_shows_the_rows_in_order(
    snapshot: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    out = made("grid", snapshot, tmp_path / "g.png", "--rows", "5,0-2", "--columns", 2)
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture[:32, 32:], expected[0, :, :, 0])
    assert np.array_equal(picture[32:, 32:], expected[2, :, :, 0])
    words = ("--rows", "5,17", "--numbers", "--scale", 2, "--overwrite")
    large = np.asarray(Image.open(made("grid", snapshot, out, *words)))
    assert large.shape == (64 + 13, 2 * 64)
    assert np.array_equal(large[:64:2, :64:2], expected[5, :, :, 0])
    assert (large[64:] < 128).any()
    with pytest.raises(GenerationError, match="row number 123456 is wider than an image of 32"):
        made("grid", snapshot, tmp_path / "n.png", "--rows", "7,123456", "--numbers")
    made("grid", snapshot, tmp_path / "n.png", "--rows", "12345", "--numbers")


def test_a_film_repeats_and_its_frames_are_the_images(
    snapshot: Path, expected: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gray frames lose nothing; the grid beside it has a row for each leg."""
    out = made("walk", snapshot, tmp_path / "w.gif", "--rows", "0,4,2", "--steps", 3)
    assert "interpolation: linear, for uniform z" in capsys.readouterr().out
    frames = []
    with Image.open(out) as film:
        assert film.info["loop"] == 0
        for k in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(k)
            frames.append(np.asarray(film.convert("L")))
    assert len(frames) == 7
    for frame, row in ((0, 0), (3, 4), (6, 2)):
        assert np.array_equal(frames[frame], expected[row, :, :, 0])
    with Image.open(tmp_path / "w.png") as grid:
        assert grid.size == (4 * 32, 2 * 32)
    made("walk", snapshot, tmp_path / "c.gif", "--rows", "0,4,2", "--steps", 3, "--closed")
    with Image.open(tmp_path / "c.gif") as film:
        assert film.n_frames == 9  # type: ignore[attr-defined]
    with pytest.raises(GenerationError, match="must be two rows or more"):
        made("walk", snapshot, tmp_path / "one.gif", "--rows", "3")
    assert not (tmp_path / "one.gif").exists()


def test_the_figure_of_a_sum_has_exemplars_means_and_nine_results(
    snapshot: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    words = ("--a", "0,1,2", "--b", "3,4", "--c", "5-7", "--noise", 0.1)
    picture = np.asarray(Image.open(made("arithmetic", snapshot, tmp_path / "s.png", *words)))
    assert picture.shape == (4 * 32 + 4, 3 * (32 + 24) + 3 * 32)
    assert np.array_equal(picture[32:64, :32], expected[1, :, :, 0])
    table = Table(MODEL, 0)
    z = table.rows([0, 1, 2]).mean(0) - table.rows([3, 4]).mean(0) + table.rows([5, 6, 7]).mean(0)
    middle = picture[-64:-32, -64:-32]
    assert np.array_equal(middle, images_of(snapshot, z[None])[0, :, :, 0])


# -- with classes, and without convolutions -------------------------------------------------------

CLASSES = 3
OTHERS = {
    "classes": replace(MODEL, num_classes=CLASSES),
    "mlp": replace(MODEL, architecture="mlp", ngf=16, ndf=8, num_classes=CLASSES),
}


@pytest.fixture(scope="module", params=sorted(OTHERS))
def conditional(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a G with classes, a DCGAN's and an MLP's; as large as to tell images apart."""
    folder, model = tmp_path_factory.mktemp("run"), OTHERS[request.param]
    G = make_generator(model)
    init_weights(G, rng(0, "test"))
    with torch.no_grad():
        for weights in G.parameters():
            weights.mul_(4 if weights.ndim > 1 else 1)
    return add_snapshot(folder, replace(make_config(folder), model=model), 1, G)


def test_the_class_decides_what_is_drawn(conditional: Path, tmp_path: Path) -> None:
    """The same z of other classes: other images, in rows and with --class; the card names it."""
    _, config = load_snapshot(conditional)
    assert config.model.num_classes == CLASSES
    table = Table(config.model, 0)
    z = table.cut(0, 1).repeat(CLASSES, 1)
    z[:, config.model.z_dim :] = torch.eye(CLASSES)
    drawn = images_of(conditional, z)
    for k in range(CLASSES):
        assert not np.array_equal(drawn[k], drawn[k - 1])
        words = ("--rows", "0", "--class", k)
        one = made("grid", conditional, tmp_path / f"{k}.png", *words)
        assert np.array_equal(np.asarray(Image.open(one)), drawn[k, :, :, 0])
    hub = made("hub", conditional, tmp_path / "hub", "--class", 1, "--truncation", 0.5)
    card = (hub / "README.md").read_text()
    assert "rows 0-63 of seed 0, z times 0.5, all of class 1" in card
    assert f"a class as {CLASSES} one-hot numbers" in card
    assert np.array_equal(images_of(hub, z), drawn)
    grid = np.asarray(Image.open(hub / "grid.png"))
    halved = Table(config.model, 0, 0.5, of_class=1).cut(0, 1)
    assert np.array_equal(grid[:32, :32], images_of(conditional, halved)[0, :, :, 0])


def test_sets_of_every_class_keep_their_labels(conditional: Path, tmp_path: Path) -> None:
    """PNG and shards hold the same images; shards say of which class each is, also by --class."""
    _, config = load_snapshot(conditional)
    expected = images_of(conditional, Table(config.model, 0).cut(0, 70))
    assert np.array_equal(
        pixels_in(made("images", conditional, tmp_path / "png", "--num", 70)), expected
    )
    for words, labels in (((), [k % 3 for k in range(70)]), (("--class", 2), [2] * 70)):
        out = tmp_path / f"shards{len(words)}"
        made("images", conditional, out, "--num", 70, "--format", "shards", *words)
        index, found = read_index(str(out)), np.empty_like(expected)
        assert Reader(index, Cache(index, "")).read(np.arange(70), found).tolist() == labels
        assert words or np.array_equal(found, expected)


def test_sums_of_classes_and_walks_are_drawn(conditional: Path, tmp_path: Path) -> None:
    _, config = load_snapshot(conditional)
    words = ("--a", "class:0", "--b", "class:1", "--c", "2,5")
    picture = np.asarray(Image.open(made("arithmetic", conditional, tmp_path / "s.png", *words)))
    table = Table(config.model, 0)
    means = [table.rows(rows).mean(0) for rows in ([0, 3, 6], [1, 4, 7], [2, 5])]
    z = means[0] - means[1] + means[2]
    z[config.model.z_dim :] = torch.tensor([0.0, 0, 1])
    middle = picture[-64:-32, -64:-32]
    assert np.array_equal(middle, images_of(conditional, z[None])[0, :, :, 0])
    made("walk", conditional, tmp_path / "w.gif", "--rows", "0,1", "--steps", 2)
    ends = np.asarray(Image.open(tmp_path / "w.png"))
    assert np.array_equal(ends[:, -32:], images_of(conditional, table.cut(1, 2))[0, :, :, 0])


def test_onnx_takes_the_class_behind_z(conditional: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    out = made("onnx", conditional, tmp_path / "G.onnx")
    network, config = load_snapshot(conditional)
    z = Table(config.model, 0).cut(0, 4)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"z": z.numpy()})[0] - network(z).numpy()).max() < 1e-4
    with pytest.raises(SystemExit):
        made("onnx", conditional, tmp_path / "H.onnx", "--class", 1)


# -- exports ------------------------------------------------------------------------------------


def test_onnx_draws_the_same_images(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file, any batch size, no trace of the machine; the difference is printed."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    out = made("onnx", snapshot, tmp_path / "G.onnx")
    found = re.search(r"largest difference .*: (\S+)", capsys.readouterr().out)
    assert found
    assert float(found[1]) < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["G.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    z = Table(MODEL, 0).cut(0, 3)
    ours = generator()(z).numpy()
    assert np.abs(session.run(None, {"z": z.numpy()})[0] - ours).max() < 1e-5
    assert str(REPO).encode() not in out.read_bytes()
    described = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert described["z"] == "8 numbers, uniform"


def test_an_onnx_file_that_differs_is_refused(snapshot: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    G = generator()
    content = export.onnx_bytes(G, MODEL, {})  # type: ignore[arg-type]
    with torch.no_grad():
        G.layers.to_image.weight.mul_(1.1)
    with pytest.raises(GenerationError, match="differ from those of torch"):
        export.onnx_difference(content, G, MODEL, 0)  # type: ignore[arg-type]


def test_the_hub_folder_works_with_this_pipeline_and_without(
    snapshot: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model card's own lines draw what G draws; no path of this machine leaves it."""
    hub = made("hub", snapshot, tmp_path / "hub", "--license", "mit")
    assert sorted(p.name for p in hub.iterdir()) == sorted(export.HUB_FILES)
    assert np.array_equal(images_of(hub, Table(MODEL, 0).cut(0, 9)), expected[:9])
    card = (hub / "README.md").read_text()
    front = OmegaConf.create(card.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    for path in hub.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    monkeypatch.chdir(hub)
    with_pipeline, alone = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(with_pipeline.splitlines()) == 5
    drawn: dict[str, np.ndarray] = {}
    exec(with_pipeline, drawn)
    assert np.array_equal(drawn["images"][:9], expected[:9])
    assert len(alone.splitlines()) < 20
    names: dict[str, torch.Tensor] = {}
    exec(alone, names)
    assert torch.allclose(names["images"], generator()(names["z"]), atol=1e-5)
    with pytest.raises(GenerationError, match="exists already; give another name"):
        made("hub", snapshot, hub)


def test_the_commands_of_the_model_card_work(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the folder, where grid.png lies already."""
    hub = made("hub", snapshot, tmp_path / "hub")
    block = re.search(r"```bash\n(.*?)```", (hub / "README.md").read_text(), re.DOTALL)
    assert block
    monkeypatch.chdir(hub)
    for line in block[1].splitlines():
        assert line.startswith("python -m pipeline.generate ")
        generate.generate(generate.parse(line.split()[3:]))
    assert (hub / "samples.png").is_file()
    assert (hub / "images" / "00000999.png").is_file()


def test_only_a_hub_folder_is_ever_uploaded(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        GenerationError, match=r"--out .*: was not made by this command, it lacks README\.md"
    ):
        made("hub", snapshot, tmp_path / "mine", "--push", "me/x")


def test_a_hub_folder_of_other_weights_is_not_uploaded(snapshot: Path, tmp_path: Path) -> None:
    """A folder that was made before is uploaded for the same G alone; its card may be edited."""
    hub, other = made("hub", snapshot, tmp_path / "hub"), tmp_path / "run"
    newer = add_snapshot(other, make_config(tmp_path), 31)
    with pytest.raises(GenerationError, match=rf"{hub}\): exists and holds another G than {newer}"):
        made("hub", newer, hub, "--push", "me/x")
    network, config = load_snapshot(snapshot)
    (hub / "README.md").write_text("mine")
    export.check_hub_folder(hub, network, config.model, snapshot)
    normal = replace(config.model, z_distribution="normal")
    with pytest.raises(GenerationError, match="another G than"):
        export.check_hub_folder(hub, network, normal, snapshot)
    (hub / export.HUB_WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(GenerationError, match="another G than"):
        export.check_hub_folder(hub, network, config.model, snapshot)


# -- mistakes -----------------------------------------------------------------------------------


def test_a_file_is_replaced_only_when_asked(snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.png"
    out.write_text("mine")
    with pytest.raises(GenerationError, match="exists already; give another name, or --overwrite"):
        made("grid", snapshot, out)
    assert out.read_text() == "mine"
    made("grid", snapshot, out, "--overwrite")
    (tmp_path / "w.png").write_text("mine")
    with pytest.raises(GenerationError, match=r"w\.png\): exists already"):
        made("walk", snapshot, tmp_path / "w.gif")
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(GenerationError, match="exists already; give another name"):
        made("grid", snapshot, tmp_path / "dir.png", "--overwrite")


def test_weights_that_cannot_be_used_are_refused(snapshot: Path, tmp_path: Path) -> None:
    for name in ("nan", "damaged"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_bytes((snapshot / "config.yaml").read_bytes())
        weights = load_file(snapshot / "generator.safetensors")
        weights["layers.to_image.weight"][0, 0, 0, 0] = float("nan")
        save_file(weights, folder / "generator.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        made("grid", tmp_path / "nan", tmp_path / "g.png")
    content = (tmp_path / "damaged" / "generator.safetensors").read_bytes()
    (tmp_path / "damaged" / "generator.safetensors").write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="cannot be used"):
        made("grid", tmp_path / "damaged", tmp_path / "g.png")
    with pytest.raises(CheckpointError, match="holds no G"):
        made("grid", tmp_path, tmp_path / "g.png")
    for change, said in (("gone", "statistics are missing"), ("negative", "variance is negative")):
        weights = load_file(snapshot / "generator.safetensors")
        variance = weights.pop("layers.norm_4.running_var")
        if change == "negative":
            weights["layers.norm_4.running_var"] = -variance
        save_file(weights, tmp_path / "damaged" / "generator.safetensors")
        with pytest.raises(CheckpointError, match=said):
            made("grid", tmp_path / "damaged", tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()


WRONG_WEIGHTS = {
    "layers.to_image.weight has shape": lambda w: w.update(
        {"layers.to_image.weight": w["layers.to_image.weight"][:1].contiguous()}
    ),
    "has dtype torch.int64": lambda w: w.update(
        {"layers.to_image.weight": w["layers.to_image.weight"].to(torch.int64)}
    ),
    "has dtype torch.complex64": lambda w: w.update(
        {"layers.norm_4.running_var": w["layers.norm_4.running_var"].to(torch.complex64)}
    ),
    "has dtype torch.float8_e4m3fn": lambda w: w.update(
        {"layers.norm_4.running_var": w["layers.norm_4.running_var"].to(torch.float8_e4m3fn)}
    ),
    "has dtype torch.float32": lambda w: w.update(
        {"layers.norm_4.num_batches_tracked": torch.tensor(1.0)}
    ),
    "layers.to_image.weight is missing": lambda w: [w.pop("layers.to_image.weight")],
    "'more' is none of its tensors": lambda w: w.update(more=torch.zeros(1)),
}


@pytest.fixture(scope="module")
def hub_folder(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("hub", snapshot, tmp_path_factory.mktemp("hub") / "hub")


@pytest.mark.parametrize("said", WRONG_WEIGHTS)
def test_weights_of_a_hub_folder_that_do_not_fit_are_one_message(
    hub_folder: Path, tmp_path: Path, said: str
) -> None:
    """It may come from anyone, without a checksum."""
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    weights = load_file(folder / "model.safetensors")
    WRONG_WEIGHTS[said](weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))}.*{said}"):
        made("grid", folder, tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()


def test_a_configuration_of_any_size_is_compared_before_memory_is_taken(
    hub_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    config = (folder / "config.yaml").read_text()
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.yaml").write_text(re.sub(r"ngf: .*", "ngf: 65536", config))  # 20 TiB
    with pytest.raises(CheckpointError, match=r"belong to another architecture.* has shape"):
        made("grid", folder, tmp_path / "g.png")


def test_every_byte_of_the_weights_in_a_hub_folder_is_checked(
    hub_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    weights, random = folder / "model.safetensors", np.random.default_rng(0)
    before = weights.read_bytes()
    for at in random.integers(len(before), size=60):
        bit = 1 << int(random.integers(8))
        weights.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        with pytest.raises(CheckpointError, match="cannot be used"):
            load_snapshot(folder)
    for kind in ("fifo", "device", "folder"):
        weights.unlink()
        if kind == "fifo":
            os.mkfifo(weights)
        elif kind == "device":
            weights.symlink_to("/dev/zero")
        else:
            weights.mkdir()
        with pytest.raises(CheckpointError):
            load_snapshot(folder)


def test_a_hub_folder_is_not_pushed_with_one_byte_changed(
    snapshot: Path, hub_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    G, config = load_snapshot(snapshot)
    export.check_hub_folder(folder, G, config.model, snapshot)
    for name in ("model.safetensors", "config.yaml", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        with pytest.raises(GenerationError, match="holds another G"):
            export.check_hub_folder(folder, G, config.model, snapshot)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images", "--run", "R", "--out", "x"], "--num"),
        (
            ["images", "--run", "R", "--num", "0", "--out", "x"],
            "--num: 0: must be a whole number from 1",
        ),
        (["images", "--run", "R", "--num", "9", "--out", "x", "--format", "npz"], "end in .npz"),
        (["grid", "--run", "R", "--out", "x.jpg"], "must end in .png"),
        (
            ["grid", "--out", "x.png"],
            "arguments --snapshot/--checkpoint --run is required",
        ),
        (
            ["grid", "--run", "R", "--out", "x.png", "--truncation", "1.5"],
            "--truncation: 1.5: must",
        ),
        (
            ["grid", "--run", "R", "--out", "x.png", "--truncation", "nan"],
            "--truncation: nan: must",
        ),
        (["grid", "--run", "S", "--out", "/proc/x/g.png"], "cannot be written"),
        (["grid", "--run", "S", "--out", "~nobody-here/g.png"], "cannot be written"),
        (["grid", "--run", "S", "--out", f"{'x' * 251}.png"], "cannot be written"),
        (["images", "--run", "S", "--out", "x" * 250, "--num", "3"], "cannot be written"),
        (["grid", "--snapshot", "~nobody-here/s", "--out", "x.png"], "--snapshot (~nobody-here/s)"),
        (["grid", "--run", "x" * 300, "--out", "x.png"], "cannot be read"),
        (["hub", "--run", "S", "--out", "h", "--license", "a: b"], "must be an identifier"),
        (["grid", "--run", "R", "--out", "x.png"], "--run (R): has no snapshot"),
        (
            ["grid", "--run", "S/stopped", "--out", "x.png"],
            "--checkpoint S/stopped/checkpoints/step_00000006",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path
) -> None:
    """All of these end before torch is imported."""
    (tmp_path / "S" / "snapshots" / "step_00000001").mkdir(parents=True)
    (tmp_path / "S" / "stopped" / "checkpoints" / "step_00000006").mkdir(parents=True)
    command = [sys.executable, "-m", "pipeline.generate", *words]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["S"]


def test_help_names_every_default_and_does_not_import_torch() -> None:
    """Each command says what it does, and --help takes no seconds."""
    code = """if True:
        import contextlib, sys
        from pipeline import generate
        for name in generate.COMMANDS:
            with contextlib.suppress(SystemExit):
                generate.parse([name, "--help"])
        assert "torch" not in sys.modules
    """
    env = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "200"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, line in generate.COMMANDS.items():
        assert f"generate {name} [-h]" in done.stdout
        assert f"{line[1:]}.\n" in done.stdout
    assert done.stdout.count("noise table of this seed (default: 0)") == len(generate.COMMANDS)
    assert "variations around the result (default: 0.25)" in done.stdout


def test_pictures_beyond_the_memory_are_refused(snapshot: Path, tmp_path: Path) -> None:
    """Before an image is made."""
    out, film = tmp_path / "g.png", tmp_path / "w.gif"
    with pytest.raises(GenerationError, match="41,943,040,000 pixel values, at most 536,870,912"):
        made("grid", snapshot, out, "--rows", "0-9999", "--scale", 64)
    with pytest.raises(GenerationError, match="give fewer rows or steps, or a smaller --scale"):
        made("walk", snapshot, film, "--rows", "0-2000", "--steps", 10000)
    with pytest.raises(GenerationError, match=r"--rows \(0-9999,7\): .* at most 10000 in all"):
        made("grid", snapshot, out, "--rows", "0-9999,7")
    assert not list(tmp_path.glob("*.*"))


def test_the_newest_snapshot_of_a_run_is_taken(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for step in (30, 4):
        add_snapshot(tmp_path / "run", config, step)
    (tmp_path / "run" / "snapshots" / "step_00000099.tmp").mkdir()
    words = ["grid", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "g.png")]
    generate.generate(generate.parse([*words, "--rows", "0"]))
    newest = images_of(tmp_path / "run" / "snapshots" / "step_00000030", Table(MODEL, 0).cut(0, 1))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "g.png")), newest[0, :, :, 0])

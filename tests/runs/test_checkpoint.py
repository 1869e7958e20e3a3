"""Checkpoints: whole or not there, every byte checked, nothing ever unpickled."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import resource
import shutil
import signal
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import STATE
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.config.schema import Config, ModelConfig, TrainConfig
from pipeline.models.dcgan import Generator, init_weights, make_discriminator
from pipeline.models.noise import rng, z_rows
from pipeline.models.sampling import draw_images, make_sampler
from pipeline.runs import checkpoint, disk_use, snapshot
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.documents import sealed
from pipeline.runtime.errors import CheckpointError, RunFolderError
from pipeline.runtime.files import sha256_of

MODEL = ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4)
CONFIG = Config(model=MODEL)


def small_generator(seed: int = 0) -> Generator:
    G = Generator(MODEL)
    init_weights(G, rng(seed, "weights of G"))
    return G


def adam(network: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    sum(p.square().sum() for p in network.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def save(run_dir: Path, step: int, seed: int = 0) -> Path:
    G = small_generator(seed)
    return checkpoint.save(
        run_dir, step, {"G": G}, {"G": adam(G)}, STATE | {"images_seen": step * 4}
    )


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    """Weights, optimizer moments and state come back bitwise."""
    G = small_generator()
    optimizer = adam(G)
    path = checkpoint.save(tmp_path, 7, {"G": G}, {"G": optimizer}, STATE | {"images_seen": 28})
    found = checkpoint.read(path)
    assert path.name == "step_00000007"
    assert (found.state["step"], found.state["images_seen"]) == (7, 28)
    assert all(torch.equal(found.weights["G"][k], v) for k, v in G.state_dict().items())
    for k, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(found.optimizers["G"]["state"][k][name], value)


@pytest.mark.parametrize("name", ["G.safetensors", "optimizers.pt", "state.json"])
def test_one_flipped_bit_anywhere_is_noticed_and_the_previous_one_used(
    name: str, tmp_path: Path
) -> None:
    """A damaged newest checkpoint is named; the one before it is loaded."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    content = bytearray((newest / name).read_bytes())
    for position in np.random.default_rng(0).integers(0, len(content), 20):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (newest / name).write_bytes(damaged)
        found, messages = checkpoint.read_newest(tmp_path)
        if name == "state.json" and json.loads(content) == try_json(damaged):
            continue  # white space
        assert found is not None
        assert found.state["step"] == 1
        assert list(messages) == [newest]
        assert "step_00000002" in messages[newest]


def try_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    """A run is never silently started anew over damaged checkpoints."""
    for step in (1, 2):
        (save(tmp_path, step) / "G.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002.*step_00000001.*Restore them"):
        checkpoint.read_newest(tmp_path)


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path) -> None:
    """What a killed writer leaves is ignored, then removed."""
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints" / "step_00000002.tmp"
    torn.mkdir()
    found, _ = checkpoint.read_newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1
    checkpoint.remove_unfinished(tmp_path)
    assert not torn.exists()


def test_pruning_keeps_the_newest_and_every_mth(tmp_path: Path) -> None:
    """keep=2, keep_every=4 of steps 1 to 9."""
    for step in range(1, 10):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 9, keep=2, keep_every=4)
    assert [step_of(p) for p in committed(tmp_path)] == [4, 8, 9]


def test_pruning_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    """A folder of a later step, left by something else, is not counted as the newest."""
    for step in (4, 8, 9, 10):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 9, keep=1, keep_every=4)
    assert [step_of(p) for p in committed(tmp_path)] == [4, 8, 9, 10]


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_a_folder_of_another_step_is_no_checkpoint_of_its_name(how: str, tmp_path: Path) -> None:
    """A copy under another name is named as damaged; a link is not even listed."""
    path = save(tmp_path, 3)
    other = path.with_name("step_00000009")
    if how == "copied":
        shutil.copytree(path, other)
    else:
        other.symlink_to(path)
    found, damaged = checkpoint.read_newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 3
    wanted = {other: f"{other}: state.json is of step 3"} if how == "copied" else {}
    assert damaged == wanted


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path: Path) -> None:
    """An older one is not used in its place."""
    save(tmp_path, 1)
    (save(tmp_path, 2) / "G.safetensors").chmod(0)
    with pytest.raises(RunFolderError, match="cannot be read"):
        checkpoint.read_newest(tmp_path)


def test_a_pickle_is_refused_even_with_right_checksums(tmp_path: Path) -> None:
    """Code in a checkpoint never runs, whoever wrote its checksums."""
    path = save(tmp_path, 1)
    proof = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> object:
            return os.mkdir, (str(proof),)

    torch.save({"G": Bomb()}, path / "optimizers.pt")
    state = json.loads((path / "state.json").read_text())
    state["files"]["optimizers.pt"] = sha256_of(path / "optimizers.pt")
    (path / "state.json").write_text(json.dumps(sealed(state)))
    with pytest.raises(CheckpointError, match="not tensors alone"):
        checkpoint.read(path)
    assert not proof.exists()


def test_file_names_in_the_state_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Paths come from the folder, never from a file in it."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["files"]["../../secret.safetensors"] = "0" * 64
    (path / "state.json").write_text(json.dumps(sealed(state)))
    with pytest.raises(CheckpointError, match=r"secret\.safetensors', which is no file beside it"):
        checkpoint.read(path)


def test_a_snapshot_alone_gives_the_same_images(tmp_path: Path) -> None:
    """G_ema's weights with their own statistics, loaded without the run."""
    G = small_generator()
    path = snapshot.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    loaded, config = snapshot.load_snapshot(path)
    assert config.model == MODEL
    assert not any(module.training for module in loaded.modules())
    z = z_rows(MODEL, 0, "grid", 0, 9)
    expected = draw_images(make_sampler(MODEL, G.state_dict()), z)
    assert np.array_equal(draw_images(loaded, z), expected)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
def test_a_fault_of_the_computation_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    """PyTorch's own error comes out, and no half-written folder stays: a device that runs out of
    memory or fails raises RuntimeError too. The meta device cannot compute and has nothing to copy.
    """
    G = small_generator()
    with pytest.raises(RuntimeError):
        snapshot.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG, "meta")
    with pytest.raises(RuntimeError):
        checkpoint.save(tmp_path, 3, {"G": G.to("meta")}, {}, STATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_full_disk_is_named_whatever_file_it_meets(tmp_path: Path) -> None:
    """Of a checkpoint and of a snapshot; the earlier checkpoint stays, no ``.tmp`` folder does."""
    G = small_generator()
    optimizer = adam(G)
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead
    try:
        for size in (500, sum(4 * p.numel() for p in G.parameters()) + 5000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(RunFolderError, match="step_00000002: could not be written"):
                checkpoint.save(tmp_path, 2, {"G": G}, {"G": optimizer}, STATE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        with pytest.raises(RunFolderError, match="snapshots/step_00000002: could not be written"):
            snapshot.export_snapshot(tmp_path, 2, G.state_dict(), CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.glob("*/*")] == ["step_00000001"]


def test_a_snapshot_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """Weights and configuration must belong together; no folder, one clear message."""
    G = small_generator()
    path = snapshot.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    text = (path / "config.yaml").read_text()
    assert "ngf: 4" in text
    changed = text.replace("ngf: 4", "ngf: 8")
    (path / "config.yaml").write_text(changed)
    with pytest.raises(CheckpointError, match=r"config\.yaml: was changed since it was written"):
        snapshot.load_snapshot(path)
    (path / "config.yaml").write_text(changed.partition("\n")[2])  # the remedy of the message
    with pytest.raises(CheckpointError, match=r"ngf is 8, but .* with 4"):
        snapshot.load_snapshot(path)
    with pytest.raises(CheckpointError, match="not a snapshot"):
        snapshot.load_snapshot(tmp_path)
    with pytest.raises(ValueError, match="another architecture"):
        make_sampler(replace(MODEL, image_size=64), G.state_dict())


@pytest.mark.parametrize("name", ["generator.safetensors", "config.yaml"])
def test_one_flipped_bit_of_a_snapshot_is_refused(name: str, tmp_path: Path) -> None:
    """Or it changes nothing: the bit is of a name that nothing reads."""
    G = small_generator()
    path = snapshot.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    content = (path / name).read_bytes()
    unharmed, config_before = snapshot.load_snapshot(path)
    expected = unharmed.state_dict()
    for position in np.random.default_rng(0).integers(0, len(content), 200):
        changed = bytearray(content)
        changed[position] ^= 1
        (path / name).write_bytes(changed)
        try:
            loaded, config = snapshot.load_snapshot(path)
        except CheckpointError:
            continue
        assert config == config_before
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_a_snapshot_in_the_folder_of_another_step_is_refused(tmp_path: Path) -> None:
    """The message names both steps; in a folder without a step it may lie."""
    path = snapshot.export_snapshot(tmp_path, 3, small_generator().state_dict(), CONFIG)
    other = path.rename(path.with_name("step_00000012"))
    with pytest.raises(CheckpointError, match=r"step_00000012: .* holds the weights of step 3"):
        snapshot.load_snapshot(other)
    snapshot.load_snapshot(other.rename(tmp_path / "best"))


def test_a_checkpoint_names_its_folder_and_the_versions_that_wrote_it(tmp_path: Path) -> None:
    """state.json is text of one value a line; it has the version of each library that computes."""
    path = save(tmp_path, 1)
    found = checkpoint.read(path)
    assert found.path == path
    libraries = ("torch", "accelerate", "numpy", "webdataset")
    expected = {"python": platform.python_version()} | {name: version(name) for name in libraries}
    assert found.state["versions"] == expected
    assert (path / "state.json").read_text().startswith('{\n "run_id": "a",\n "precision"')


def test_the_digest_of_the_state_does_not_depend_on_the_order_of_its_keys(tmp_path: Path) -> None:
    """A tool may sort state.json; a value that it changes is noticed."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(dict(reversed(state.items()))))
    assert checkpoint.read(path).state["step"] == 1
    (path / "state.json").write_text(json.dumps(state | {"step": 2}))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        checkpoint.read(path)


def test_the_reason_why_optimizers_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    """The first line of PyTorch's own error is in the message."""
    path = save(tmp_path, 1)
    torch.save({"G": Path("code")}, path / "optimizers.pt")
    state = json.loads((path / "state.json").read_text())
    state["files"]["optimizers.pt"] = sha256_of(path / "optimizers.pt")
    (path / "state.json").write_text(json.dumps(sealed(state)))
    with pytest.raises(CheckpointError, match="not tensors alone: Weights only load failed") as no:
        checkpoint.read(path)
    assert len(str(no.value).splitlines()) == 1


def test_the_message_about_damaged_checkpoints_has_a_line_for_each(tmp_path: Path) -> None:
    """Newest first, indented, then the remedy."""
    for step in (1, 2):
        (save(tmp_path, step) / "G.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_newest(tmp_path)
    folder = tmp_path / "checkpoints"
    reason = "G.safetensors is damaged (its checksum differs)"
    assert str(caught.value).splitlines() == [
        f"no checkpoint in {folder} is usable:",
        f"  {folder}/step_00000002: {reason}",
        f"  {folder}/step_00000001: {reason}",
        f"Restore them from a copy; or move them and {tmp_path / 'progress'} away to start this "
        "run anew.",
    ]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """The second one is read, and neither the first nor a killed writer's folder stays."""
    torn = tmp_path / "checkpoints" / "step_00000001.tmp"
    torn.mkdir(parents=True)
    (torn / "junk").touch()
    for seed in (0, 1):
        path = save(tmp_path, 1, seed)
    found = checkpoint.read(path)
    expected = small_generator(1)
    adam(expected)
    assert all(torch.equal(found.weights["G"][k], v) for k, v in expected.state_dict().items())
    assert [one.name for one in path.parent.iterdir()] == ["step_00000001"]
    assert not (path / "junk").exists()


def test_pruning_keeps_the_best_and_those_not_yet_evaluated(tmp_path: Path) -> None:
    """keep=1 of steps 1 to 5: step 2 has the lowest FID, step 4 has no score."""
    for step in range(1, 6):
        save(tmp_path, step)
    scores = {1: 30.0, 2: 20.0, 3: 25.0}
    rows = [
        {"step": k, "weights": "ema", "protocol": "p", "headline": "fid", "scores": {"fid": v}}
        for k, v in scores.items()
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint.prune(tmp_path, 5, keep=1, keep_every=0, keep_best=True)
    assert [step_of(p) for p in committed(tmp_path)] == [2, 4, 5]
    checkpoint.prune(tmp_path, 5, keep=1, keep_every=0)
    assert [step_of(p) for p in committed(tmp_path)] == [5]


def test_what_cannot_be_removed_stops_nothing(tmp_path: Path) -> None:
    """A run goes on if an old checkpoint cannot be renamed, or a ``.tmp`` is no folder."""
    for step in range(1, 4):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000001.tmp" / "in the way").mkdir(parents=True)
    checkpoint.prune(tmp_path, 3, keep=1, keep_every=0)
    assert [step_of(p) for p in committed(tmp_path)] == [1, 3]
    (folder / "step_00000009.tmp").touch()
    torn = tmp_path / "snapshots" / "step_00000002.tmp"
    torn.mkdir(parents=True)
    checkpoint.remove_unfinished(tmp_path)
    assert not torn.exists()
    assert not (folder / "step_00000001.tmp").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """With the reason of the system: here a file lies where the folder must be."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunFolderError, match=r"step_00000001: could not be written: \[Errno \d+\]"):
        save(tmp_path, 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "other words"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "[Errno 13] Permission denied"),
        (SafetensorError("first line\nsecond line"), "first line"),
    ],
)
def test_a_failed_write_says_why_and_what_to_do(error: Exception, reason: str) -> None:
    """A full disk is recognized by its number or, from safetensors, by its words."""
    assert str(checkpoint._unwritable(Path("run"), error)) == (
        f"run: could not be written: {reason}. Earlier checkpoints are intact; free space or fix "
        "the folder, then run the same command again."
    )


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
def test_a_snapshot_goes_to_the_device_that_is_asked_for(tmp_path: Path) -> None:
    """Its file holds its step; the meta device stands for any other than the CPU."""
    path = snapshot.export_snapshot(tmp_path, 3, small_generator().state_dict(), CONFIG)
    with safe_open(path / "generator.safetensors", "pt") as file:
        assert json.loads(file.metadata()["snapshot"])["step"] == 3
    loaded, _ = snapshot.load_snapshot(path, "meta")
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


def test_a_folder_for_the_hub_is_loaded_like_a_snapshot(tmp_path: Path) -> None:
    """Its weights have another file name. Without config.yaml neither is a snapshot."""
    G = small_generator()
    path = snapshot.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    (path / "generator.safetensors").rename(path / "model.safetensors")
    loaded, _ = snapshot.load_snapshot(path)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in G.state_dict().items())
    (path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="not a snapshot"):
        snapshot.load_snapshot(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_run_that_diverged_are_refused(value: float) -> None:
    """One NaN or infinity in one tensor is enough; the message names the folder."""
    G = small_generator()
    snapshot.check_finite(G, Path("run"))
    with torch.no_grad():
        next(G.parameters()).view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=re.escape("run: its weights are NaN or infinite")):
        snapshot.check_finite(G, Path("run"))


@pytest.mark.parametrize(
    ("train", "kept", "snapshots"),
    [
        (TrainConfig(total_steps=100, keep=2, keep_every=30, checkpoint_every=15), 2 + 3, 6),
        (TrainConfig(total_steps=100, keep=2, keep_every=0, checkpoint_every=0), 2, 1),
    ],
)
def test_the_bytes_of_a_run_are_those_of_its_kept_files(
    train: TrainConfig, kept: int, snapshots: int
) -> None:
    """In fp32: G, G_ema, D and two moments each of G and D; a snapshot is one G."""
    total, one = disk_use.checkpoint_bytes(Config(model=MODEL, train=train))
    g, d = (
        sum(p.numel() for p in network.parameters())
        for network in (small_generator(), make_discriminator(MODEL))
    )
    assert one == 4 * (2 * g + d) + 8 * (g + d)
    assert total == kept * one + snapshots * 4 * g


def test_the_bytes_that_a_run_has_written_are_counted(tmp_path: Path) -> None:
    """Of its checkpoints and snapshots, and of no other file."""
    folders = [
        save(tmp_path, 1),
        snapshot.export_snapshot(tmp_path, 1, small_generator().state_dict(), CONFIG),
    ]
    (tmp_path / "metrics.jsonl").write_text("row")
    (folders[0] / "folder").mkdir()
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    assert len(files) == 3 + 2
    assert disk_use.written_bytes(tmp_path) == sum(path.stat().st_size for path in files)

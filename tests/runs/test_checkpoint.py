"""Checkpoints: whole or not there, every byte checked, nothing ever unpickled."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.schema import Config, ModelConfig
from pipeline.models.dcgan import Generator, init_weights
from pipeline.models.noise import rng, z_rows
from pipeline.models.sampling import draw_images, make_sampler
from pipeline.runs import checkpoint
from pipeline.runs.run_folder import committed, step_of
from pipeline.runtime.errors import CheckpointError, RunFolderError

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
    return checkpoint.save(run_dir, step, {"G": G}, {"G": adam(G)}, {"images_seen": step * 4})


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    """Weights, optimizer moments and state come back bitwise."""
    G = small_generator()
    optimizer = adam(G)
    path = checkpoint.save(tmp_path, 7, {"G": G}, {"G": optimizer}, {"images_seen": 28})
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
        assert len(messages) == 1
        assert "step_00000002" in messages[0]


def try_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    """A run is never silently started anew over damaged checkpoints."""
    for step in (1, 2):
        (save(tmp_path, step) / "G.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002.*step_00000001.*Move them away"):
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
    checkpoint.prune(tmp_path, keep=2, keep_every=4)
    assert [step_of(p) for p in committed(tmp_path)] == [4, 8, 9]


def test_a_pickle_is_refused_even_with_right_checksums(tmp_path: Path) -> None:
    """Code in a checkpoint never runs, whoever wrote its checksums."""
    path = save(tmp_path, 1)
    proof = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> object:
            return os.mkdir, (str(proof),)

    torch.save({"G": Bomb()}, path / "optimizers.pt")
    state = json.loads((path / "state.json").read_text())
    state["files"]["optimizers.pt"] = checkpoint.sha256_of(path / "optimizers.pt")
    del state["digest"]
    state["digest"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="not tensors alone"):
        checkpoint.read(path)
    assert not proof.exists()


def test_file_names_in_the_state_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Paths come from the folder, never from a file in it."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["files"]["../../secret.safetensors"] = "0" * 64
    del state["digest"]
    state["digest"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"secret\.safetensors is damaged"):
        checkpoint.read(path)


def test_a_snapshot_alone_gives_the_same_images(tmp_path: Path) -> None:
    """G_ema's weights with their own statistics, loaded without the run."""
    G = small_generator()
    path = checkpoint.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    loaded, config = checkpoint.load_snapshot(path)
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
        checkpoint.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG, "meta")
    with pytest.raises(RuntimeError):
        checkpoint.save(tmp_path, 3, {"G": G.to("meta")}, {}, {})
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
                checkpoint.save(tmp_path, 2, {"G": G}, {"G": optimizer}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        with pytest.raises(RunFolderError, match="snapshots/step_00000002: could not be written"):
            checkpoint.export_snapshot(tmp_path, 2, G.state_dict(), CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.glob("*/*")] == ["step_00000001"]


def test_a_snapshot_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """Weights and configuration must belong together; no folder, one clear message."""
    G = small_generator()
    path = checkpoint.export_snapshot(tmp_path, 3, G.state_dict(), CONFIG)
    text = (path / "config.yaml").read_text()
    assert "ngf: 4" in text
    (path / "config.yaml").write_text(text.replace("ngf: 4", "ngf: 8"))
    with pytest.raises(CheckpointError, match="cannot be used"):
        checkpoint.load_snapshot(path)
    with pytest.raises(CheckpointError, match="not a snapshot"):
        checkpoint.load_snapshot(tmp_path)
    with pytest.raises(ValueError, match="another architecture"):
        make_sampler(replace(MODEL, image_size=64), G.state_dict())

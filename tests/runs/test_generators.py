"""Every form in which ``evaluate --checkpoint`` and ``generate --snapshot`` take a G."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import my_generator
import numpy as np
import pytest
import torch
from conftest import write_shards
from evaluating import (
    MODEL,
    add_checkpoint,
    add_snapshot,
    evaluated,
    generator_of,
    make_config,
    make_run,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import generate
from pipeline.config.loading import dump
from pipeline.evaluation.scorer import Scorer
from pipeline.models.dcgan import Generator, init_weights
from pipeline.models.noise import rng
from pipeline.runs.generators import best_in_run, open_generator
from pipeline.runs.results import Ledger, best, read_rows
from pipeline.runtime.errors import CheckpointError, GenerationError

OWN = "my_generator:Own"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generated(*words: object) -> None:
    generate.generate(generate.parse([str(word) for word in words]))


def pixels_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def forms_of(run: Path, folder: Path) -> dict[str, str]:
    """The G_ema of step 20 in every form of this pipeline."""
    snapshot = run / "snapshots" / "step_00000020"
    generated("hub", "--snapshot", snapshot, "--out", folder / "hub")
    alone = folder / "downloaded.safetensors"
    shutil.copy(snapshot / "generator.safetensors", alone)
    forms = {
        "snapshot": snapshot,
        "its file": snapshot / "generator.safetensors",
        "file alone": alone,
        "hub": folder / "hub",
        "file of hub": folder / "hub" / "model.safetensors",
    }
    return {name: str(path) for name, path in forms.items()}


def test_every_form_gives_the_same_images_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By either name of the option; a form is moved away from its run before it is scored."""
    run = make_run(tmp_path, (20,))
    forms = forms_of(run, tmp_path)
    outputs, printed = {}, {}
    for name, location in forms.items():
        out = tmp_path / f"drawn from {name}"
        generated("images", "--checkpoint", location, "--num", 70, "--out", out)
        outputs[name] = pixels_in(out)
        capsys.readouterr()
        words = (f"data.shards={tmp_path / 'shards'}", f"eval.cache_dir={tmp_path / 'references'}")
        words += ("eval.extractor=tiny_extractor:Tiny", "eval.num_images=100")
        away = tmp_path / f"elsewhere-{len(printed)}"
        if Path(location).is_dir():
            shutil.copytree(location, away)
        else:
            away.mkdir()
            away = Path(shutil.copy(location, away / "x.safetensors"))
        evaluated("--snapshot", away, *words)
        printed[name] = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("eval/")
        ]
    for name in forms:
        assert np.array_equal(outputs[name], outputs["snapshot"]), name
        assert printed[name] == printed["snapshot"]
        assert printed[name]


def test_an_onnx_file_is_a_generator(tmp_path: Path) -> None:
    """Its pixels are those of torch but for single grey levels, where rounding decides."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    run = make_run(tmp_path, (20,))
    generated("onnx", "--run", run, "--out", tmp_path / "G.onnx")
    for name, source in {
        "onnx": tmp_path / "G.onnx",
        "torch": run / "snapshots/step_00000020",
    }.items():
        generated("images", "--snapshot", source, "--num", 70, "--out", tmp_path / name)
    a, b = (pixels_in(tmp_path / name).astype(int) for name in ("onnx", "torch"))
    assert np.abs(a - b).max() <= 1
    assert (a != b).mean() < 0.01
    opened = open_generator(str(tmp_path / "G.onnx"))
    assert (opened.model.z_dim, opened.model.z_distribution) == (MODEL.z_dim, MODEL.z_distribution)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="is no ONNX file of a G"):
        open_generator(str(tmp_path / "bad.onnx"))
    with pytest.raises(GenerationError, match="hub needs a G of a run"):
        generated("hub", "--snapshot", tmp_path / "G.onnx", "--out", tmp_path / "h")


def test_a_checkpoint_gives_g_ema_and_its_files_either_network(tmp_path: Path) -> None:
    run = make_run(tmp_path, ())
    path = add_checkpoint(run, 15)  # G_ema is that of step 16
    wanted = {"": 16, "G_ema.safetensors": 16, "G.safetensors": 15}
    for name, step in wanted.items():
        opened = open_generator(str(path / name))
        snapshot = add_snapshot(
            tmp_path / f"s{name}", make_config(tmp_path), step, generator_of(step)
        )
        expected = open_generator(str(snapshot)).G.state_dict()
        assert all(torch.equal(expected[k], v) for k, v in opened.G.state_dict().items())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_class_of_the_user_is_scored_with_its_weights(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against any real images, without a run; a function may bring its own weights."""
    weights, G = tmp_path / f"w.{kind}", my_generator.loaded()
    if kind == "pt":
        torch.save(G.state_dict(), weights)
    else:
        save_file(G.state_dict(), weights)
    write_shards(tmp_path / "shards", [60], (32, 32, 1))
    words = ("--against", tmp_path / "shards", "eval.extractor=tiny_extractor:Tiny")
    words += ("eval.num_images=80", f"eval.cache_dir={tmp_path / 'references'}")
    found = []
    for form in ([OWN, "--weights", weights], ["my_generator:loaded"]):
        evaluated("--checkpoint", *form, *words)
        out = capsys.readouterr().out.splitlines()
        found.append([line for line in out if line.startswith("eval/")])
        generated("images", "--snapshot", *form, "--num", 5, "--out", tmp_path / str(len(found)))
    assert found[0] == found[1] != []
    assert np.array_equal(pixels_in(tmp_path / "1"), pixels_in(tmp_path / "2"))


@pytest.mark.parametrize(
    ("location", "weights", "said"),
    [
        ("nowhere/step_1", "", "no such file or folder. Give a folder of snapshots/"),
        ("no_such_module:G", "", "cannot be imported"),
        ("my_generator:Nothing", "", "cannot be imported"),
        (OWN, "", "add --weights FILE"),
        (OWN, "other.safetensors", "is not the state dict of this G"),
        (OWN, "missing.pt", "--weights missing.pt: cannot be read"),
        ("my_generator:Needy", "right.safetensors", "cannot be called without arguments"),
        ("my_generator:Unstated", "right.safetensors", "does not say the length of z"),
        ("my_generator:Loud", "right.safetensors", r"must be in \[-1, 1\]; 64 of them are in"),
        ("my_generator:Flat", "right.safetensors", r"must make images \(64, 1 or 3, S, S\)"),
        ("my_generator:not_a_module", "", "must give a torch.nn.Module, not str"),
        ("plain.safetensors", "", "does not say of which architecture it is"),
        ("plain.safetensors", "right.safetensors", "--weights .* is for module:Class only"),
        (".", "", "holds no G"),
    ],
)
def test_what_is_no_generator_is_one_message(
    location: str, weights: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(my_generator.loaded().state_dict(), "right.safetensors")
    save_file({"layer.weight": torch.zeros(3)}, "other.safetensors")
    save_file({"x": torch.zeros(3)}, "plain.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_generator(location, weights)


def test_a_file_alone_is_checked_byte_by_byte(tmp_path: Path) -> None:
    snapshot = add_snapshot(tmp_path, make_config(tmp_path), 20)
    content = bytearray((snapshot / "generator.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        open_generator(str(tmp_path / "x.safetensors"))
    tensors = load_file(snapshot / "generator.safetensors")
    assert tensors


# -- the scored images ----------------------------------------------------------------------------


def scored_sha256(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """Evaluate, and return the sha256 of the images that went into the extractor."""
    seen: list[bytes] = []
    score = Scorer.score

    def watched(self: Scorer, images: Any, *rest: Any) -> dict[str, float]:
        seen.append(images(0, self.protocol.num_images).tobytes())
        return score(self, images, *rest)

    monkeypatch.setattr(Scorer, "score", watched)
    evaluated(*words)
    (found,) = seen
    return hashlib.sha256(found).hexdigest()


@pytest.mark.parametrize("labels", ["none", "data", "uniform"])
def test_generate_draws_exactly_the_images_that_were_scored(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sha256 of both; without --scored they are others. Of a conditional G with both rules."""
    write_shards(tmp_path / "shards", [70, 60], (32, 32, 1))
    config = make_config(tmp_path)
    if labels != "none":
        config = replace(
            config,
            model=replace(MODEL, num_classes=10),
            eval=replace(config.eval, labels=labels),
        )
    G = Generator(config.model)
    init_weights(G, rng(0, "test"))
    run = add_snapshot(tmp_path / "run", config, 10, G).parents[1]
    (run / "config.yaml").write_text(dump(config))
    expected = scored_sha256(monkeypatch, "--run", run, "eval.seed=5")
    words = ("images", "--run", run, "--num", 100, "--seed", 5, "--format", "npz")
    generated(*words, "--scored", "--out", tmp_path / "scored.npz")
    generated(*words, "--out", tmp_path / "others.npz")
    digests = []
    for name in ("scored", "others"):
        with np.load(tmp_path / f"{name}.npz") as archive:
            digests.append(hashlib.sha256(archive["arr_0"].tobytes()).hexdigest())
            about = json.loads(str(archive["made_by"]))
            assert about.get("table") == ("evaluation" if name == "scored" else None)
    assert digests[0] == expected != digests[1]


def test_the_best_scored_snapshot_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the newest protocol, among the weights that are still there."""
    run = make_run(tmp_path, (10, 20, 30))
    words = ("grid", "--run", run, "--best", "--rows", "0", "--out", tmp_path / "g.png")
    with pytest.raises(CheckpointError, match="no snapshot or checkpoint of this run has a score"):
        generated(*words)
    evaluated("--run", run, "--pending")
    first = best(read_rows(run))
    assert first is not None
    assert best_in_run(run)[1]["step"] == first["step"]
    capsys.readouterr()
    generated(*words)
    assert f"best: step {first['step']}, {first['headline']} " in capsys.readouterr().out
    shutil.rmtree(run / "snapshots" / f"step_{first['step']:08d}")
    second = best([row for row in read_rows(run) if row["step"] != first["step"]])
    assert second is not None
    assert best_in_run(run)[1]["step"] == second["step"]
    ledger = Ledger(run)  # weights that were replaced have no score
    ledger.append(first | {"step": 30, "generator": "0" * 16, "protocol": "newer"})
    ledger.close()
    assert best_in_run(run)[1]["protocol"] != "newer"

"""The extractors of torch-fidelity beside Inception: weights from files, features, names of scores.

The published weights are not there, so the networks have random ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluating import evaluated, make_run
from torch import Tensor, nn
from torch_fidelity import feature_extractor_clip as theirs
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from pipeline.config.choices import OF_TORCH_FIDELITY
from pipeline.config.loading import load
from pipeline.config.schema import EvalConfig
from pipeline.data import remote
from pipeline.evaluation import pretrained
from pipeline.evaluation.dinov2 import DIMS, DinoV2, VisionTransformer
from pipeline.evaluation.extractors import load_extractor
from pipeline.evaluation.pretrained import published
from pipeline.evaluation.protocol import Protocol, ReferenceProtocol
from pipeline.runs.results import read_rows
from pipeline.runtime.errors import ConfigError, EvaluationError

CPU = torch.device("cpu")
SMALL = "dinov2-vit-s-14"


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)


def random_dinov2(dim: int = 384, depth: int = 2, gated: bool = False) -> dict[str, Tensor]:
    """Return random weights under the names of the published files, of fewer layers."""
    generator = torch.Generator().manual_seed(0)
    hidden = 4 * dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + 37 * 37, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for k in range(depth):
        shapes |= {f"blocks.{k}.{n}.{p}": (dim,) for n in ("norm1", "norm2") for p in PARTS}
        shapes |= {f"blocks.{k}.ls{n}.gamma": (dim,) for n in (1, 2)}
        linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        if gated:
            linear |= {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        else:
            linear |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
    return {
        name: torch.randn(shape, generator=generator) * 0.05 + ("norm" in name)
        for name, shape in shapes.items()
    }


PARTS = ("weight", "bias")


def by_pytorch(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute DINOv2 by PyTorch's own encoder layers, with LayerScale multiplied into weights."""
    dim = w["cls_token"].shape[-1]
    x = nn.functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 14)
    grid = w["pos_embed"][0, 1:].T.reshape(1, dim, 37, 37)
    grid = nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    x = torch.cat([w["cls_token"].expand(len(x), 1, dim), x.flatten(2).transpose(1, 2)], 1)
    x = x + torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    for k in range(2):
        start = f"blocks.{k}."
        b = {n.removeprefix(start): v for n, v in w.items() if n.startswith(start)}
        layer = nn.TransformerEncoderLayer(
            dim, dim // 64, 4 * dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        )
        one, two = b["ls1.gamma"], b["ls2.gamma"]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": b["attn.qkv.weight"],
                "self_attn.in_proj_bias": b["attn.qkv.bias"],
                "self_attn.out_proj.weight": b["attn.proj.weight"] * one[:, None],
                "self_attn.out_proj.bias": b["attn.proj.bias"] * one,
                "linear1.weight": b["mlp.fc1.weight"],
                "linear1.bias": b["mlp.fc1.bias"],
                "linear2.weight": b["mlp.fc2.weight"] * two[:, None],
                "linear2.bias": b["mlp.fc2.bias"] * two,
            }
            | {f"{n}.{p}": b[f"{n}.{p}"] for n in ("norm1", "norm2") for p in PARTS}
        )
        x = layer.train()(x)
    return nn.functional.layer_norm(x, (dim,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 0]


def write(folder: Path, weights: Any, name: str = SMALL) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / published(name).file
    torch.save(weights, path)
    return path


def test_every_name_of_the_registry_is_an_extractor() -> None:
    """The configuration knows them without importing torch-fidelity."""
    registered = {n for n in FEATURE_EXTRACTORS_REGISTRY if ":" not in n} - {"efficientnet-lite0"}
    assert registered | {"inception"} == set(OF_TORCH_FIDELITY)
    for name in OF_TORCH_FIDELITY:
        of = published("inception" if name == "inception-v3-compat" else name)
        assert of.sha256 or name in DIMS


def test_dinov2_is_the_network_of_pytorchs_own_layers() -> None:
    weights = random_dinov2()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    found = VisionTransformer(weights, 224)(x)
    torch.testing.assert_close(found, by_pytorch(weights, x), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


def test_the_giant_has_gated_layers() -> None:
    """silu(x W1) * (x W2), as published; its parameters alone say so."""
    weights = random_dinov2(64, 1, gated=True)
    block = VisionTransformer(weights, 224).blocks[0]
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    first, second = (
        x @ weights["blocks.0.mlp.w12.weight"].T + weights["blocks.0.mlp.w12.bias"]
    ).chunk(2, -1)
    hidden = first * torch.sigmoid(first) * second
    exact = hidden @ weights["blocks.0.mlp.w3.weight"].T + weights["blocks.0.mlp.w3.bias"]
    torch.testing.assert_close(block._feed_forward(x), exact, rtol=1e-4, atol=1e-4)


def test_weights_are_found_by_file_and_by_folder(tmp_path: Path, accelerator: Accelerator) -> None:
    """Both give the same features and identity; other weights have another one."""
    path = write(tmp_path / "a", random_dinov2())
    found = [
        load_extractor(EvalConfig(extractor=SMALL, extractor_weights=str(p)), accelerator)
        for p in (path, path.parent)
    ]
    features = [e(images(), CPU)["dinov2"] for e in found]
    assert torch.equal(*features)
    assert features[0].shape == (3, 384)
    assert found[0].sha256 == found[1].sha256
    assert (found[0].layer, found[0].logits, found[0].dim) == ("dinov2", None, 384)
    other = write(tmp_path / "b", random_dinov2() | {"norm.bias": torch.zeros(384)})
    changed = load_extractor(EvalConfig(extractor=SMALL, extractor_weights=str(other)), accelerator)
    assert changed.sha256 != found[0].sha256


def test_the_preprocessing_of_dinov2_is_torch_fidelitys(tmp_path: Path) -> None:
    """Only the construction of the network is ours."""
    ours = DinoV2(SMALL, ["dinov2"], write(tmp_path, random_dinov2()))
    assert DinoV2.forward is FEATURE_EXTRACTORS_REGISTRY[SMALL].forward
    batch = torch.from_numpy(images()).permute(0, 3, 1, 2)
    assert ours(batch)[0].dtype == torch.float32


def random_clip(path: Path) -> None:
    """Write a TorchScript archive, as OpenAI publishes, of a small random CLIP."""
    torch.manual_seed(0)
    visual = theirs.CLIPVisual(32, 64, 1, 64, 32)
    visual.text_projection = nn.Parameter(torch.zeros(64, 32))

    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text_projection = visual.visual, visual.text_projection

        def forward(self, x: Tensor) -> Tensor:
            return x  # torch-fidelity reads the weights only

    traced = torch.jit.trace(Encoded(), torch.zeros(1))
    traced.save(str(path))


def test_clip_is_torch_fidelitys_with_a_verified_file(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.pt"
    with pytest.warns(FutureWarning, match="torch.jit"):
        random_clip(path)
    config = EvalConfig(extractor="clip-vit-b-32", extractor_weights=str(path))
    with pytest.raises(EvaluationError, match=r"sha256 is .*, must be 40d36571.*clip-vit-b-32"):
        load_extractor(config, accelerator)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(theirs.MODEL_METADATA["clip-vit-b-32"], "hash", digest)
    extractor = load_extractor(config, accelerator)
    with pytest.warns(FutureWarning, match="torch.jit"):
        original = theirs.FeatureExtractorCLIP("clip-vit-b-32", ["clip"], str(path))
    batch = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(extractor(images(), CPU)["clip"], original(batch)[0])
    assert (extractor.sha256, extractor.logits) == (digest, None)


@pytest.mark.parametrize("name", ["vgg16", "dinov2-vit-l-14", "clip-rn50", "inception-v3-compat"])
def test_missing_weights_are_one_message(
    name: str, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the file, how to get it, and the extractor that needs no download."""
    config = EvalConfig(extractor=name, extractor_weights=str(tmp_path))
    with pytest.raises(EvaluationError, match=r"folder has no .*fetch-weights --to DIR.*lite0"):
        load_extractor(config, accelerator)
    closed = "http://127.0.0.1:9/"
    of = published(name.removesuffix("-v3-compat"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(remote, "FETCH_PAUSE", 0.0)
    monkeypatch.setattr(
        pretrained, "published", lambda _: dataclasses.replace(of, url=closed + of.file)
    )
    with pytest.raises(EvaluationError, match=r"cannot be downloaded.*fetch-weights --to DIR"):
        load_extractor(EvalConfig(extractor=name), accelerator)


def test_files_of_other_networks_are_one_message(tmp_path: Path, accelerator: Accelerator) -> None:
    """No traceback, whatever the file holds."""
    for weights in (random_dinov2(64), {"x": torch.zeros(1)}, [1], random_dinov2() | {"y": 1}):
        path = write(tmp_path, weights)
        config = EvalConfig(extractor=SMALL, extractor_weights=str(path))
        with pytest.raises(EvaluationError, match=r"eval.extractor \(dinov2-vit-s-14\): its file"):
            load_extractor(config, accelerator)
    path.write_bytes(b"no pickle")
    with pytest.raises(EvaluationError, match=r"eval.extractor \(dinov2-vit-s-14\): its file"):
        load_extractor(config, accelerator)


def test_names_are_those_of_the_literature() -> None:
    """FD of DINOv2 means ViT-L/14 (Stein et al. 2023); other sizes and networks are named."""

    def key(extractor: str, layer: str, score: str = "fid") -> str:
        made = ReferenceProtocol(
            **dict.fromkeys((f.name for f in dataclasses.fields(ReferenceProtocol)), "")
            | {"extractor": extractor, "layer": layer, "reference_images": 60_000}
            | {"precision": "fp32"}
        )
        return Protocol(
            reference=made, metrics=("fid",), num_images=50_000, seed=0, weights="ema",
            labels="none", kid_subset_size=1000, dim=8, is_full=True, is_undersampled=False,
        ).key(score)  # fmt: skip

    assert key("dinov2-vit-l-14", "dinov2") == "eval/fd_dinov2_50k_full"
    assert key("dinov2-vit-l-14", "dinov2", "kid") == "eval/kd_dinov2_50k_ref50k"
    assert key("dinov2-vit-s-14", "dinov2") == "eval/fd_dinov2-vit-s-14_50k_full"
    assert key("clip-vit-b-32", "clip") == "eval/fd_clip-vit-b-32_50k_full"
    assert key("vgg16", "fc2_relu", "recall") == "eval/recall_vgg16_fc2_relu_50k_ref50k"


def test_a_run_is_scored_with_dinov2(tmp_path: Path) -> None:
    """Without a word about the run: the name needs no permission, as a module does."""
    run = make_run(tmp_path, (10,), num_images=64)
    path = write(tmp_path / "weights", random_dinov2(depth=1))
    words = (f"eval.extractor={SMALL}", f"eval.extractor_weights={path.parent}")
    evaluated("--run", run, *words, "eval.metrics=[kid]", "eval.reference_images=32")
    (row,) = read_rows(run)
    assert row["headline"] == "eval/kd_dinov2-vit-s-14_64_ref32"
    assert math.isfinite(row["scores"][row["headline"]])
    with pytest.raises(ConfigError, match=r"must be one of inception, .*dinov2-vit-l-14"):
        load(run / "config.yaml", ["eval.extractor=dinov3"])

"""Scores equal those of torch-fidelity bit for bit; references and metric keys are checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import write_shards
from evaluating import TINY
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics

from pipeline.config.schema import EvalConfig
from pipeline.data.shards import Index
from pipeline.evaluation.candidates import chosen_ids
from pipeline.evaluation.extractors import Extractor, extract, load_extractor
from pipeline.evaluation.metrics import (
    Reference,
    compute_scores,
    make_reference,
    read_reference,
    table,
    write_reference,
)
from pipeline.evaluation.protocol import Protocol, make_protocol
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.signals import Agreement

BATCH = 64
NAMES = {
    "frechet_inception_distance": "fid",
    "inception_score_mean": "is",
    "inception_score_std": "is_std",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


class Rows(Dataset[Tensor]):
    """Images (N, H, W, 3) uint8 as a dataset for torch-fidelity."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.images[row]).permute(2, 0, 1).contiguous()

    def __len__(self) -> int:
        return len(self.images)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("reals"), [150], (32, 32, 3))


def blobs(count: int, seed: int) -> np.ndarray:
    """Return bright squares of random position and size on dark noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, 32, 32, 3), dtype=np.uint8)
    for image in images:
        top, left, side = rng.integers(0, 20, 3)
        image[top : top + side + 4, left : left + side + 4] += rng.integers(50, 190, 3, np.uint8)
    return images


def features_of(
    images: np.ndarray, extractor: Extractor, accelerator: Accelerator
) -> dict[str, Tensor]:
    found = extract(
        lambda a, b: images[a:b], len(images), extractor, accelerator, BATCH, Agreement(1)
    )
    assert found is not None
    return found


def both(
    settings: dict[str, Any],
    fake: np.ndarray,
    real: np.ndarray,
    accelerator: Accelerator,
    index: Index,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return our scores and those of ``calculate_metrics``, of the same images, by metric key."""
    extractor = load_extractor(EvalConfig(**settings), accelerator)
    config = EvalConfig(**settings, num_images=len(fake), batch_size=BATCH)
    protocol = make_protocol(config, extractor, index)
    reference = make_reference(
        protocol.reference, features_of(real, extractor, accelerator)[extractor.layer]
    )
    features = features_of(fake, extractor, accelerator)
    ours = compute_scores(features, extractor, reference, protocol)
    theirs = calculate_metrics(
        input1=Rows(fake),
        input2=Rows(real),
        cuda=False,
        batch_size=BATCH,
        isc=extractor.logits is not None,
        fid=protocol.has_fid,
        kid=True,
        prc=True,
        feature_extractor=extractor.name,
        kid_subset_size=protocol.kid_subset_size,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
        **{f"feature_layer_{metric}": extractor.layer for metric in ("fid", "kid", "prc")},
    )
    theirs.pop("f_score")
    renamed = {protocol.key(NAMES[name]): value for name, value in theirs.items()}
    return ours, renamed


def test_every_score_is_calculate_metrics_to_the_last_bit(
    accelerator: Accelerator, index: Index
) -> None:
    """FID, IS, KID, precision and recall of the same images, with a short last batch."""
    settings = {"extractor": TINY}
    ours, theirs = both(settings, blobs(150, 1), blobs(150, 2), accelerator, index)
    assert ours == theirs
    assert len(ours) == len(NAMES)
    assert ours["eval/fd_tiny-extractor-Tiny_16_150"] > 0


def test_lite0_scores_are_calculate_metrics_too(accelerator: Accelerator, index: Index) -> None:
    """``calculate_metrics`` finds the extractor by its registered name."""
    settings = {"extractor": "efficientnet-lite0", "layer": "320"}
    ours, theirs = both(settings, blobs(70, 1), blobs(70, 2), accelerator, index)
    assert ours == theirs
    assert not any("/fd_" in key for key in ours)  # 70 images: no covariance of 320 numbers


def make(num_images: int, available: int, dim: int = 16, **settings: Any) -> Protocol:
    """Return a protocol of Inception for an index of ``available`` real images."""
    index = Index("nowhere", "npy", (32, 32, 1), (), np.zeros(available, "V16"))
    extractor = Extractor("inception", None, "2048", "logits_unbiased", dim, "abc", "fp32")
    return make_protocol(EvalConfig(num_images=num_images, **settings), extractor, index)


@pytest.mark.parametrize(
    ("generated", "real", "expected"), [(32, 32, True), (31, 32, False), (32, 31, False)]
)
def test_a_frechet_distance_needs_twice_as_many_images_as_numbers(
    generated: int, real: int, expected: bool
) -> None:
    """With fewer it is mostly bias. KID, which is unbiased, is the headline score then."""
    protocol = make(generated, real)
    assert protocol.has_fid is expected
    assert protocol.headline == protocol.key("fid" if expected else "kid")


def test_only_inceptions_scores_on_fifty_thousand_images_have_the_plain_names() -> None:
    """Other keys contain the number of images, or extractor and layer."""
    plain = make(50_000, 60_000)
    assert [plain.key(s) for s in ("fid", "is", "kid")] == ["eval/fid", "eval/is", "eval/kid"]
    assert make(10_000, 60_000).key("fid") == "eval/fid_10k"
    assert make(2_500, 60_000).key("kid") == "eval/kid_2500"
    side = dataclasses.replace(plain.reference, extractor="efficientnet-lite0", layer="1280")
    other = dataclasses.replace(plain, reference=side)
    assert other.key("fid") == "eval/fd_efficientnet-lite0_1280"
    assert other.key("kid_std") == "eval/kd_std_efficientnet-lite0_1280"


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 51},
        {"reference_images": 40},
        {"seed": 1},
        {"weights": "raw"},
        {"batch_size": 32},
    ],
)
def test_every_setting_that_matters_makes_another_protocol(change: dict[str, Any]) -> None:
    """The id differs; for the same settings it is the same."""
    settings: dict[str, Any] = {"num_images": 50, "available": 60}
    assert make(**settings).id == make(**settings).id
    assert make(**settings | change).id != make(**settings).id


def test_more_real_images_than_the_shards_have_are_refused() -> None:
    """The message has both numbers."""
    with pytest.raises(
        EvaluationError, match=r"reference_images \(61\).*has 60 images.*at most 60"
    ):
        make(50, 60, reference_images=61)


@pytest.mark.parametrize(
    ("generated", "real", "field"), [(9, 60, "num_images"), (60, 9, "reference_images")]
)
def test_fewer_images_than_the_metrics_need_are_refused(
    generated: int, real: int, field: str
) -> None:
    """Otherwise torch-fidelity raises from kthvalue, or returns NaN as Inception Score."""
    with pytest.raises(EvaluationError, match=rf"eval\.{field} \(9\): .*at least 10"):
        make(generated, real)
    make(10, 10)


def test_the_chosen_real_images_are_a_fixed_random_set() -> None:
    """They are a prefix of one permutation, so shards sorted by class are sampled evenly."""
    ids = chosen_ids(1000, 100)
    assert len(set(ids.tolist())) == 100
    assert np.array_equal(ids, chosen_ids(1000, 200)[:100])
    assert 300 < ids.mean() < 700


# -- reference files ----------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Reference]:
    torch.manual_seed(0)
    reference = make_reference(make(50, 60).reference, torch.randn(60, 16))
    path = tmp_path / "new" / "reference.safetensors"
    write_reference(path, reference)
    return path, reference


def test_a_reference_is_read_as_it_was_written(stored: tuple[Path, Reference]) -> None:
    """Settings, values and dtypes are the same."""
    path, reference = stored
    again = read_reference(path, reference.protocol)
    assert again.protocol == reference.protocol
    assert torch.equal(again.features, reference.features)
    assert np.array_equal(again.mu, reference.mu)
    assert np.array_equal(again.sigma, reference.sigma)
    assert (again.mu.dtype, again.sigma.dtype) == (np.float32, np.float64)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "other"},
        {"reference_images": 61},
        {"extractor": "efficientnet-lite0"},
        {"extractor_sha256": "def"},
        {"precision": "bf16"},
        {"preprocessing": "v2"},
        {"layer": "768"},
    ],
)
def test_a_reference_with_other_settings_is_refused(
    stored: tuple[Path, Reference], change: dict[str, Any]
) -> None:
    """The message has the value of the file and the needed one."""
    path, reference = stored
    ((name, value),) = change.items()
    with pytest.raises(EvaluationError, match=rf"{name}: .*, needed {value}"):
        read_reference(path, dataclasses.replace(reference.protocol, **change))


@pytest.mark.parametrize("damage", ["missing", "empty", "one bit", "cut"])
def test_a_damaged_reference_is_refused(stored: tuple[Path, Reference], damage: str) -> None:
    """Missing, empty and truncated files, and a single wrong bit."""
    path, reference = stored
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    files = {"empty": b"", "one bit": bytes(content), "cut": bytes(content[:-50])}
    path.unlink() if damage == "missing" else path.write_bytes(files[damage])
    wanted = "no such file" if damage == "missing" else "damaged or not a reference"
    with pytest.raises(EvaluationError, match=rf"{wanted}.*evaluate reference"):
        read_reference(path, reference.protocol)


def test_features_that_are_not_finite_are_refused(stored: tuple[Path, Reference]) -> None:
    """One NaN among the features is enough."""
    _, reference = stored
    protocol = make(50, 60)
    extractor = Extractor("inception", None, "2048", None, 16, "abc", "fp32")
    features = torch.randn(50, 16)
    features[3, 3] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        compute_scores({"2048": features}, extractor, reference, protocol)


def test_the_table_marks_the_best_step() -> None:
    """It has a column for each score that the rows have."""
    protocol = make(50, 60)
    rows = [
        {"step": step, "scores": {protocol.key("fid"): fid, protocol.key("recall"): 0.5}}
        for step, fid in ((100, 30.25), (200, 20.5))
    ]
    assert table(rows, protocol, 200).splitlines() == [
        "    step         FID      RECALL",
        "     100       30.25         0.5",
        "     200        20.5         0.5  best",
    ]

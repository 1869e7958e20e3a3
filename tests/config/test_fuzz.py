"""Any value for any key: a valid configuration, or one message that names the key."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from evaluating import add_checkpoint, add_snapshot, make_config, make_run
from launching import REPO, run
from safetensors.torch import load_file, save_file

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config, ModelConfig, flatten
from pipeline.config.sizes import discriminator_size, generator_size
from pipeline.config.values import types_of_keys
from pipeline.models.dcgan import make_discriminator, make_generator
from pipeline.papers import probe
from pipeline.runs.snapshot import load_snapshot
from pipeline.runtime.errors import CheckpointError, ConfigError, DamagedSnapshot

VALUES = [
    *("", "null", "~", "???", "''", '""', "true", "True", "yes", "off", "maybe", "'1'"),
    *("0", "-0", "-0.0", "1", "+1", "-1", "2", "007", "1_000", "0x10", "0o7", "1:30", "3.5", ".5"),
    *("1e3", "1e-4", "1e999", "-1e999", ".inf", "-.inf", ".nan", "nan", "inf", "Infinity", "1e"),
    *("2147483647", "2147483648", "4294967296", "1099511627775", "9223372036854775808"),
    *("1" * 39, "1" * 41, "9" * 5000, "a" * 4096, "a" * 5000, "[" * 99, "{a: " * 99),
    *(
        "٣",
        "１",
        "²",
        "½",
        "\x1b[31m",
        "a\x00b",
        '"\\0"',
        "\udcff",
        "\u202e",
        "🦊",
        " ",
        "\t",
        "\n",
    ),
    *("[]", "[1]", "[a, b]", "[[a]]", "[null]", "[", "]", "{}", "{a: 1}", "a: b", "- a", "# x"),
    *("*a", "&a 1", "!!int 3", "!!python/name:os.system ''", "|\n a", "a\n---\nb", "%", "@", "`"),
    *("=", "==1", "=1", "a=b", "${", "${}", "${x}", "${oc.env:PATH}", "${oc.env:HOME}", "$HOME"),
    *(
        "${model.ngf}",
        "${stability.augment}",
        "${oc.decode:1}",
        "\\${x}",
        "%s",
        "{0}",
        "../..",
        "/",
    ),
    *("https://u:p@h/x?token=t", "auto", "fp32", "cpu", "~nobody/x", "None", "[color]"),
]


KEYS = list(flatten(Config()))
FIRST = {str(types_of_keys()[key]): key for key in reversed(KEYS)}.values()


@pytest.mark.parametrize("key", KEYS)
def test_every_value_is_taken_or_refused_by_name(tmp_path, key):
    """All values for the first key of each type, a third of them for the others."""
    values = VALUES if key in FIRST else VALUES[KEYS.index(key) % 3 :: 3]
    path = tmp_path / "c.yaml"
    path.touch()
    wanted = types_of_keys()[key]
    kinds = typing.get_args(wanted) if type(None) in typing.get_args(wanted) else (wanted,)
    for value in values:
        try:
            config = load(path, [f"{key}={value}"])
        except ConfigError as error:
            message = str(error)
            assert key in message, value
            assert len(message) < 2000, value
            assert all(line.isprintable() for line in message.split("\n")), value
        else:
            found = flatten(config)[key]
            if kinds[0] in (bool, int, float, str):
                assert type(found) in kinds, value
                assert found is None or not isinstance(found, float) or math.isfinite(found)
            path.write_text(dump(config))
            assert load(path) == config, value
            path.write_text("")


def test_numbers_are_decimal_digits(tmp_path):
    """``010`` is neither ten nor eight, and ``tracking.name=010`` is a name."""
    path = tmp_path / "c.yaml"
    path.write_text("tracking:\n  name: 010\n  tags: [1.10, on, 0x1]\neval:\n  layer: 320\n")
    config = load(path, ["optim.g_lr=3", "model.ngf=+8"])
    assert (config.tracking.name, config.eval.layer) == ("010", "320")
    assert config.tracking.tags == ["1.10", "on", "0x1"]
    assert (config.optim.g_lr, config.model.ngf) == (3.0, 8)


COMMANDS = [
    ("train.compile=1", "train.compile (1): must be true or false, e.g. train.compile=false"),
    ("train.compile='1'", "train.compile ('1'): must be true or false"),
    ("train.compile=0x10", "train.compile (0x10): must be true or false"),
    ("data.prefetch=1099511627775", "data.prefetch (1099511627775): must be at most 1024"),
    ("model.ngf=1_000", "model.ngf (1_000): must be a whole number in decimal digits"),
    ("optim.d_steps=2147483648", "optim.d_steps (2147483648): must be at most 65536"),
    ("run.dir.x=1", "run.dir.x (1): run.dir holds one value and no keys; write run.dir=VALUE"),
    ("a.b.c=1", "a.b.c (1): unknown key; sections: run, model"),
    ("optim.betas[0]=1", "optim.betas[0] (1): unknown key; did you mean optim.beta"),
    ("", "'': must read section.key=value"),
    ("=1", "(1): unknown key; sections: run, model"),
    ("x", "'x': must read section.key=value"),
    ("x==1", "x (=1): unknown key; sections: run, model"),
    ("model.ng\x1bf=1", r"model.ng\x1bf (1): unknown key; did you mean model.ngf?"),
    ("model.ngf=٣", "model.ngf (٣): must be a whole number"),
    ("optim.g_lr=1e999", "optim.g_lr (inf): must be a finite number"),
    (
        "model.ngf=65536",
        "model.ngf (65536), model.ndf (128), model.z_dim (100): G, its average and D need",
    ),
    (
        "data.prefetch=1024 data.workers=256 data.batch_size=1048576",
        "data.prefetch (1024), data.workers (256), data.batch_size (1048576): the batches",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "reason"), COMMANDS, ids=[o[:30] or "-" for o, _ in COMMANDS])
def test_a_command_refuses_it_in_one_message(tmp_path, override, reason):
    """Exit code 2, no traceback, and no run folder."""
    words = override.split(" ") if " " in override else [override]
    config = REPO / "configs" / "dcgan_64.yaml"
    status, output = run(1, config, f"run.dir={tmp_path / 'run'}", *words)
    assert status == 2, output
    assert reason in output
    assert "Traceback" not in output
    assert "\x1b" not in output
    assert not (tmp_path / "run").exists()


def test_a_snapshot_cannot_ask_for_more_than_its_weights(tmp_path):
    """G of 33,000 GiB by its configuration, with the weights of a small one."""
    folder = add_snapshot(tmp_path, make_config(tmp_path), 3)
    path = folder / "config.yaml"
    lines = path.read_text().splitlines()[1:]  # without the checksum
    path.write_text("\n".join(lines).replace("ngf: 4", "ngf: 65536"))
    file = folder / "generator.safetensors"
    save_file(load_file(file), file)  # without what it says of its architecture
    with pytest.raises(DamagedSnapshot, match="belong to another architecture"):
        load_snapshot(folder)


def test_a_run_cannot_ask_for_more_than_its_checkpoint(tmp_path):
    """D of 2,000 GiB by its configuration, with the checkpoint of a small one."""
    run_dir = make_run(tmp_path, steps=())
    add_checkpoint(run_dir, 3)
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("ndf: 4", "ndf: 65536"))
    with pytest.raises(CheckpointError, match="D cannot be loaded: it is smaller than model"):
        probe.load_discriminators(run_dir, None, 0)


def test_the_sizes_of_networks_are_those_that_are_built():
    """But for the numbers that are one per unit, which are few."""
    for settings in (
        {"ngf": 16, "ndf": 8},
        {"image_size": 256, "channels": 1, "num_classes": 10, "kernel_size": 5},
        {"architecture": "mlp", "image_size": 28, "maxout": 5, "num_classes": 3},
    ):
        model = ModelConfig(**settings)
        with torch.device("meta"):
            networks = make_generator(model), make_discriminator(model)
        built = [sum(p.numel() for p in network.parameters()) for network in networks]
        for size, found in zip(
            (generator_size(model), discriminator_size(model)), built, strict=True
        ):
            assert size <= found <= 1.05 * size

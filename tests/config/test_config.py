"""The configuration: what loads, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.changes import fixed_differences
from pipeline.config.loading import dump, load
from pipeline.config.schema import (
    Config,
    StabilityConfig,
    flatten,
)
from pipeline.config.sizes import micro_batching
from pipeline.runtime.errors import ConfigError

CHECKOUT = Path(__file__).parents[2]
SHIPPED = sorted((CHECKOUT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """A function that writes a YAML file at the top of a checkout and returns its path."""
    (tmp_path / "pyproject.toml").touch()

    def write(content: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


# -- what loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    """Each YAML that we ship is a valid configuration (sweeps are W&B's own format)."""
    if path.name.startswith("sweep"):
        pytest.skip("a W&B sweep, not a configuration")
    assert isinstance(load(path), Config)


RADFORD = {
    **{"model.architecture": "dcgan", "model.z_dim": 100, "model.z_distribution": "uniform"},
    **{"model.kernel_size": 5, "model.loss": "non_saturating", "data.batch_size": 128},
    **{"optim.g_lr": 2e-4, "optim.d_lr": 2e-4, "optim.beta1": 0.5, "optim.beta2": 0.999},
    **{"optim.d_steps": 1, "model.num_classes": 0, "model.d_norm": "batch"},
    "train.ema_decay": 0.0,
}
GOODFELLOW = {
    **{
        "model.architecture": "mlp",
        "model.image_size": 28,
        "model.channels": 1,
        "model.z_dim": 100,
    },
    **{"model.ngf": 1200, "model.ndf": 240, "model.maxout": 5, "model.dropout": 0.5},
    **{"model.loss": "non_saturating", "data.batch_size": 100, "optim.d_steps": 1},
    "train.ema_decay": 0.0,
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dcgan_64", RADFORD | {"model.image_size": 64, "model.ngf": 128, "model.channels": 3}),
        ("dcgan_32", RADFORD | {"model.image_size": 32, "model.ngf": 128}),
        ("gan_mlp", GOODFELLOW),
    ],
)
def test_the_papers_configurations_hold_the_papers_values(name, values):
    """Sections 4 and 5 of the two papers, and nothing that was found since."""
    config = load(CHECKOUT / "configs" / f"{name}.yaml")
    assert {key: flatten(config)[key] for key in values} == values
    assert config.stability == StabilityConfig()


def test_the_stable_configuration_is_the_papers_with_two_options():
    paper, stable = (load(CHECKOUT / "configs" / f"dcgan_64{s}.yaml") for s in ("", "_stable"))
    assert {line.split(":")[0] for line in fixed_differences(flatten(paper), stable)} == {
        "train.ema_decay",
        "stability.augment",
    }


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "model:\n", "model: null\n", "run: ~\n", "model: {}\n", "---\n"]
)
def test_an_empty_file_or_section_is_all_defaults(write, text):
    """What is not said keeps its default."""
    config = load(write(text))
    assert (config.model, config.optim) == (Config().model, Config().optim)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: " + "[" * 50_000, "line 1 is nested deeper than section, key and list"),
        ("model: " + "{a: " * 50_000, "line 1 is nested deeper than section, key and list"),
        ("- " * 50_000, "line 1 is nested deeper than section, key and list"),
        ("model: {ngf: 1" + "0" * 5000 + "}", "model.ngf (1000"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "line 1 has an anchor or alias"),
        ("model: {ngf: 3, ngf: 4}", "line 1 has the key ngf twice"),
        ("tracking: {tags: [" + "a, " * 3000 + "]}", "line 1 has more than 2000 values"),
        ("model: {}\n---\nmodel: {}\n", "line 2 has a second document"),
        (
            "model: !!python/name:os.system ''",
            "has a tag (tag:yaml.org,2002:python/name:os.system)",
        ),
        ("model:\n  ? [a]\n  : 3\n", "line 2 has a key that is no name"),
        ("run:\n  dir: \x00\n", "not valid YAML: unacceptable character #x0000"),
        ("run:\n  dir: é\n".encode("latin1"), "is not UTF-8: byte 12"),
        ("#" * (1 << 20) + "\n", "has 1048577 bytes; at most 1048576 are read"),
        ('run: {dir: "a\\0b"}', "must be text in UTF-8 without control characters"),
        ("run: {dir: " + "a" * 5000 + "}", "must have at most 4096 characters"),
        ("\n".join(f"k{k}: 1" for k in range(900)), "and 860 more"),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_a_file_beyond_a_configuration_is_one_message(write, text, reason):
    """It names the line and what is there; the file is refused before anything is built of it."""
    assert reason in refusal(write(text))


@pytest.mark.parametrize("text", ["\ufeffmodel:\n  ngf: 3\n", "model:\r\n  ngf: 3\r\n"], ids=ascii)
def test_a_file_of_another_editor_is_read(write, text):
    assert load(write(text)).model.ngf == 3


@pytest.mark.parametrize("name", ["fifo", "zero"])
def test_a_file_that_never_ends_is_refused(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path) if name == "fifo" else path.symlink_to("/dev/zero")
    assert "is no regular file" in refusal(path)


def test_precedence_is_defaults_then_file_then_command_line(write):
    """The command line wins over the file, the file over the defaults."""
    config = load(write("model:\n  ngf: 16\n  ndf: 16\n"), ["model.ndf=8"])
    assert (config.model.ngf, config.model.ndf, config.model.z_dim) == (16, 8, 100)


def test_the_last_of_repeated_overrides_wins(write):
    """As in every shell tool."""
    assert load(write(""), ["model.ngf=1", "model.ngf=2"]).model.ngf == 2


def test_short_exponents_are_numbers(write):
    """``1e-4`` is a float although YAML 1.1 calls it a string."""
    assert load(write("optim:\n  g_lr: 1e-4\n"), ["optim.d_lr=4e-4"]).optim.g_lr == 1e-4


def test_a_config_is_frozen_and_plain(write):
    """The program sees dataclasses and lists, never OmegaConf nodes, and cannot change them."""
    config = load(write("tracking:\n  tags: [a, b]\n"))
    assert type(config.tracking.tags) is list
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.ngf = 3


def test_importing_the_config_is_cheap():
    """It needs neither torch nor numpy: --help and faults answer at once."""
    code = (
        "import sys, pipeline.config.schema; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_is_documented():
    """Each field is followed by a string that says what it means."""
    wing = CHECKOUT / "pipeline" / "config"
    source = [
        line
        for name in ("schema.py", "recipe.py")
        for line in (wing / name).read_text().splitlines()
    ]
    for key in flatten(Config()):
        name = key.partition(".")[2]
        at = [k for k, line in enumerate(source) if line.startswith(f"    {name}: ")]
        assert at, key
        assert any(source[k + 1].startswith('    """') for k in at), key


# -- faults -------------------------------------------------------------------------------------


def test_all_faults_are_listed_at_once(write):
    """One run shows every mistake of the file and of the command line."""
    text = "model:\n  ngff: 3\n  kernel_size: 7\noptim:\n  g_lr: fast\nextra: 1\n"
    message = refusal(write(text), "data.batchsize=3", "train.compile=perhaps", "--oops")
    assert message.startswith("7 faults in the configuration")
    for part in (
        "ngff",
        "kernel_size (7)",
        "g_lr (fast)",
        "extra",
        "batchsize",
        "perhaps",
        "oops",
    ):
        assert part in message
    assert "[command line]" in message


def test_all_impossible_values_are_listed_at_once(write):
    """The second kind of fault, values no run could honour, is collected too."""
    message = refusal(write("model:\n  ngf: 0\n  channels: 2\noptim:\n  beta1: 1.0\n"))
    assert "3 faults" in message
    assert "model.channels (2): must be 1 (gray) or 3 (RGB)" in message


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("data.batchsize=4", "data.batch_size"),
        ("optim.batch_size=4", "data.batch_size"),  # the right name in the wrong section
        ("batch_size=4", "data.batch_size"),
        ("optim.glr=1", "optim.g_lr"),
        ("modle.ngf=4", "model.ngf"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(write, override, guess):
    """Did you mean: by spelling, and by name in another section."""
    assert f"unknown key; did you mean {guess}?" in refusal(write(""), override)


def test_an_unknown_key_without_a_neighbour_gets_the_list(write):
    """A wild guess is answered with the keys of that section, or with the sections."""
    assert "keys of optim: g_lr, d_lr, beta1, beta2" in refusal(write(""), "optim.zzzzzz=4")
    assert "sections: run, model, data" in refusal(write("qqqqq:\n  zzzzz: 1\n"))


@pytest.mark.parametrize(
    "text",
    [
        "- model\n",
        "- run:\n    seed: 3\n",
        "3\n",
        "hello\n",
        "2020-01-01\n",
        "model: 3\n",
        "model: abc\n",
        "model: [1, 2]\n",
        "model: ${run}\n",
        "3: 4\n",
        "true: {a: 1}\n",
        "null: 4\n",
        "model:\n  1.5: 4\n",
        "model:\n  null: 4\n",
        "? [a]\n: 3\n",
        "model:\n  ngf: 3\n  ngf: 4\n",
        "model: {ngf: 3}\nmodel: {ndf: 4}\n",
        "model:\n\tngf: 3\n",
        "model: {}\n---\nmodel: {}\n",
        "model: [1\n",
        'model: !!python/object/apply:os.system ["true"]\n',
        "run:\n  dir: ${\n",
        bytes(range(256)),
        b"\x00\x01\x02",
        "model:\n  ngf: 3\n".encode("utf-16"),
        "run:\n  dir: é\n".encode("latin1"),
    ],
    ids=ascii,
)
def test_a_file_that_is_no_configuration_gets_one_clear_message(write, text):
    """Whatever the file holds: one ConfigError naming it, never a traceback of a library."""
    path = write(text)
    message = refusal(path)
    assert str(path) in message
    assert "full_key" not in message  # OmegaConf's own words


def test_a_section_given_one_value_names_its_keys(write):
    """``model: 3`` is answered with what a section holds."""
    assert "model (3): must hold keys; keys of model: architecture" in refusal(write("model: 3\n"))


def test_a_missing_file_names_the_configs_beside_it(write):
    """A mistyped --config shows what there is."""
    near = write("")
    message = refusal(near.with_name("confg.yaml"))
    assert "no such file" in message
    assert str(near) in message


def test_a_folder_is_no_config(tmp_path):
    """``--config configs`` is a clear fault."""
    assert f"--config {tmp_path}: is no regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.ngf=3.5", "must be a whole number in decimal digits, e.g. model.ngf=64"),
        ("model.ngf=", "must be a whole number"),
        ("model.ngf=true", "must be a whole number"),
        ("model.ngf=[1]", "model.ngf ([1]): must be a whole number"),
        ("model.ngf.x=1", "model.ngf holds one value and no keys; write model.ngf=VALUE"),
        ("model.ngf=???", "model.ngf"),
        (
            "model.loss=wgan",
            "must be one of non_saturating, minimax, hinge, least_squares",
        ),
        ("train.precision=no", "must be one of auto, fp32, bf16, fp16"),
        ("train.compile=maybe", "must be true or false, e.g. train.compile=false"),
        ("run.dir=null", "must be text, e.g. run.dir=runs/default"),
        ("tracking.tags=a", "must be a list, e.g. tracking.tags=[a,b]"),
        ("model=3", "must hold keys"),
        ("=3", "unknown key"),
        (".=3", "unknown key"),
        ("model..ngf=3", "unknown key"),
        ("a.b.c.d=1", "unknown key"),
        ("model.ngf", "must read section.key=value"),
        ("model.ngf=[1", "model.ngf ([1): not valid YAML"),
        ("run.dir=${", "has a ${ that begins no reference"),
        ("model.ngf=1" + "0" * 5000, "must be a whole number"),
        ("data.shards=" + "[" * 3000 + "]" * 3000, "nested deeper"),
    ],
)
def test_a_wrong_type_or_form_is_refused(write, override, reason):
    """The message says what the value should have been."""
    assert reason in refusal(write(""), override)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.seed=-1", "between 0 and 2**63 - 1"),
        ("run.seed=9223372036854775808", "between 0 and 2**63 - 1"),
        ("run.dir=''", "must be a folder"),
        ("run.dir=s3://bucket/run", "must be a folder"),
        ("data.cache_dir=s3://bucket/cache", "must be a folder"),
        ("data.shards=''", "must be a folder or URL"),
        ("model.image_size=48", "32, 64, 128 or 256"),
        ("model.channels=4", "1 (gray) or 3 (RGB)"),
        ("model.z_dim=0", "at least 1"),
        ("data.batch_size=0", "at least 1"),
        ("data.batch_size=1", "at least 2 images"),
        ("data.workers=-1", "0 or more"),
        ("data.lanes=0", "at least 1"),
        ("data.block=0", "at least 1"),
        ("data.cache_gib=.inf", "finite"),
        ("data.cache_gib=.nan", "finite"),
        ("optim.g_lr=.inf", "finite"),
        ("optim.d_steps=10000000000000000000000", "below 2**40"),
        ("model.ngf=10000000", "at most 65536"),
        ("model.num_classes=100000000000", "at most 65536"),
        ("optim.g_lr=0", "above 0"),
        ("optim.beta2=1", "in [0, 1)"),
        ("train.ema_decay=1", "in [0, 1)"),
        ("train.micro_batch=0", "must divide data.batch_size (128) evenly"),
        ("train.micro_batch=48", "must divide data.batch_size (128) evenly"),
        ("train.micro_batch=1", "at least 2 images"),
        ("train.exact_sum=true", "train.micro_batch (null): must be set with train.exact_sum"),
        ("train.total_steps=0", "at least 1"),
        ("train.checkpoint_minutes=-1", "0 or more"),
        ("optim.d_steps=0", "at least 1"),
        ("model.num_classes=1", "0 or at least 2"),
        ("model.dropout=0.5", "must be 0: it belongs to model.architecture=mlp"),
        ("model.maxout=5", "must be 0: it belongs to model.architecture=mlp"),
        ("stability.r1_gamma=-1", "0 or more"),
        ("schedule.shape=step", "must be one of cosine, linear"),
        ("schedule.g_lr=-1", "null or 0 to 1e30"),
        ("schedule.beta2=1", "null or in [0, 1)"),
        ("schedule.end=100", "must be 0 unless schedule has a last value"),
        ("schedule.d_lr=0", "must be the step from which schedule.d_lr holds"),
        ("train.ema_kimg=-1", "between 0 and 1000000"),
        ("train.ema_rampup=0.05", "must be 0 without train.ema_kimg"),
        ("tracking.timeout=501", "between 0 and 500"),
        ("stability.r1_every=0", "at least 1"),
        ("stability.penalty_share=0", "above 0 and at most 1"),
        ("stability.penalty=double", "must be one of exact, tangent, along, random"),
        ("stability.label_smoothing=0.5", "in [0, 0.5)"),
        ("stability.augment=[color,blur]", "any of color, translation, cutout"),
        ("stability.augment=[color,color]", "any of color, translation, cutout"),
    ],
)
def test_an_impossible_value_is_refused(write, override, reason):
    """What no run could honour fails before anything starts, naming key, value and requirement."""
    message = refusal(write(""), override)
    assert override.partition("=")[0] in message
    assert reason in message


EXACT = ("train.micro_batch=16", "train.exact_sum=true")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.loss=hinge", "stability.label_smoothing=0.1"], "must be 0 with model.loss=hinge"),
        (["model.loss=relativistic", "stability.label_smoothing=0.1"], "with model.loss=relat"),
        (
            ["train.precision=fp16", "stability.r1_gamma=1"],
            "must be bf16 or fp32 with stability.r1_gamma, unless model.d_norm is none or spectral",
        ),
        (
            ["train.sync_batchnorm=true", "stability.r2_gamma=1"],
            "must be false with stability.r2_gamma and stability.penalty=exact, unless",
        ),
        (
            ["train.precision=fp16", "schedule.r2_gamma=1", "schedule.end=9"],
            "must be bf16 or fp32 with stability.r2_gamma, unless model.d_norm is none or spectral",
        ),
        (
            ["model.d_norm=batch", "stability.penalty_share=0.5"],
            "must be 1 unless model.d_norm is none or spectral",
        ),
        (["train.init=/a", "run.fork=/b"], "must be empty with run.fork, which keeps the step"),
        (["model.architecture=mlp", "model.image_size=7"], "must be between 8 and 256"),
        *(
            ([*EXACT, value], "must be")
            for value in (
                *("train.precision=fp16", "train.sync_batchnorm=true", "train.compile=true"),
                "train.grad_dtype=bf16",
            )
        ),
    ],
)
def test_an_impossible_combination_is_refused(write, overrides, reason):
    """The first value is allowed, the others not beside it."""
    load(write(""), overrides[:1])
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load(write(""), overrides)


def test_a_removed_key_of_an_old_run_folder_is_read_if_it_changed_nothing(write):
    """Run folders keep every key with its value; one that was in use names what took its place."""
    load(write("train: {cuda_graph: false}"))
    with pytest.raises(
        ConfigError, match=r"train.cuda_graph \(true\): no longer exists; set train"
    ):
        load(write("train: {cuda_graph: true}"))


def test_the_old_name_of_spectral_norm_is_read_where_a_run_wrote_it(write):
    """A user's file or command line is told the new name; an old run's own files still load."""
    load(write("model: {spectral_norm: false}"))
    told = "no longer exists; set model.d_norm=spectral"
    assert told in refusal(write("model: {spectral_norm: true}"))
    assert told in refusal(write(""), "model.spectral_norm=true")
    saved = load(write("model: {spectral_norm: true}"), saved=True)
    assert saved.model.d_norm == "spectral"
    before = flatten(Config()) | {"model.spectral_norm": True}
    del before["model.d_norm"]
    assert fixed_differences(before, saved) == []
    assert fixed_differences(before, Config()) == ["model.d_norm: spectral -> batch"]


@pytest.mark.parametrize("gamma", ["stability.r1_gamma", "schedule.r2_gamma"])
def test_a_resume_keeps_the_way_of_a_penalty(write, gamma):
    """It computes other bits; without a penalty it computes nothing and is free."""
    words = [f"{gamma}=1", *(["schedule.end=9"] if gamma.startswith("schedule") else [])]
    before = flatten(load(write(""), [*words, "stability.penalty=tangent"]))
    changed = fixed_differences(before, load(write(""), words))
    assert changed == ["stability.penalty: tangent -> exact"]
    del before["stability.penalty"]  # of a version that computed exact alone
    assert fixed_differences(before, load(write(""), words)) == []
    without = flatten(load(write(""), ["stability.penalty=tangent"]))
    assert fixed_differences(without, load(write(""))) == []


# -- interpolations -----------------------------------------------------------------------------


def test_interpolations_resolve(write, monkeypatch):
    """Another key and the environment may be named in a value."""
    monkeypatch.setenv("SWEEP_DIR", "/scratch/me")
    text = "model:\n  ngf: 32\n  ndf: ${model.ngf}\nrun:\n  dir: ${oc.env:SWEEP_DIR}/run\n"
    config = load(write(text), ["data.cache_dir=${run.dir}/cache"])
    assert config.model.ndf == 32
    assert config.run.dir == "/scratch/me/run"
    assert config.data.cache_dir == "/scratch/me/run/cache"


def test_an_interpolated_path_is_absolute_too(write, monkeypatch, tmp_path):
    """A path that is relative only after interpolation counts from the same folder."""
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    monkeypatch.chdir(tmp_path)
    assert load(write("run:\n  dir: ${oc.env:WANDB_RUN_ID}\n")).run.dir == str(tmp_path / "one")


@pytest.mark.parametrize(
    "value",
    [
        *("${model.nope}", "${nope:1}", "${oc.decode:1}", "${oc.env:SLURM_NONE}", "${run.dir}"),
        *("${model.ndf}", "${${oc.env:HOME}}", "${model.nope:", "${oc.env:A" + "${" * 5000),
    ],
)
def test_an_interpolation_without_a_value_is_a_fault_of_its_key(write, value):
    """Missing key, unknown resolver, missing variable, wrong type, a cycle: all ConfigErrors."""
    message = refusal(write(f'model:\n  ngf: "{value}"\n  ndf: "${{model.ngf}}"\n'))
    assert f"model.ngf ({value!r}"[:80] in message
    assert os.environ["HOME"] not in message.partition("\n")[2]


def test_references_that_multiply_end(write):
    """Each key is looked up once: 2**60 empty texts would take for ever, full ones all memory."""
    keys = [f"{s}.{k}" for s, k in (key.split(".") for key in flatten(Config()))]
    texts = [key for key in keys if flatten(Config())[key] in ("", None)]
    for last in ('""', "abcdefgh"):
        words = [f"{key}=${{{after}}}${{{after}}}" for key, after in itertools.pairwise(texts)]
        refusal(write(""), *words, f"{texts[-1]}={last}", "optim.g_lr=-1")


def test_all_broken_interpolations_are_listed(write):
    """Also those inside lists."""
    message = refusal(write('model:\n  ngf: ${model.a}\ntracking:\n  tags: ["${model.b}"]\n'))
    assert "2 faults" in message
    assert "tracking.tags" in message


# -- paths --------------------------------------------------------------------------------------


def test_paths_in_a_file_count_from_its_checkout(tmp_path, monkeypatch):
    """A config of a checkout means the same folders from any working folder."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / "configs").mkdir(parents=True)
    elsewhere.mkdir()
    (checkout / "pyproject.toml").touch()
    path = checkout / "configs" / "a.yaml"
    path.write_text("run:\n  dir: runs/a\ndata:\n  shards: data/a\n  cache_dir: ~/cache\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(path, ["data.shards=data/mine"])
    assert config.run.dir == str(checkout / "runs/a")
    assert config.data.shards == str(elsewhere / "data/mine")
    assert config.data.cache_dir == "/home/someone/cache"
    monkeypatch.chdir(checkout / "configs")
    assert load("a.yaml").run.dir == str(checkout / "runs/a")


def test_defaults_and_files_outside_a_checkout_count_from_the_working_folder(tmp_path, monkeypatch):
    """Without a checkout there is only the current folder."""
    if any((folder / "pyproject.toml").exists() for folder in tmp_path.parents):
        pytest.skip("the temporary folder lies in a checkout")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("data:\n  shards: here\n")
    config = load("configs/a.yaml")
    assert config.data.shards == str(tmp_path / "here")
    assert config.run.dir == str(tmp_path / "runs/default")


@pytest.mark.parametrize("url", ["s3://bucket/set", "https://host/set", "gs://bucket/set"])
def test_urls_stay_as_they_are(write, url):
    """``data.shards`` may be remote."""
    assert load(write(""), [f"data.shards={url}"]).data.shards == url


def test_an_unknown_home_folder_is_a_plain_name(write, tmp_path, monkeypatch):
    """``~nobody/x`` without such a user is a folder name, as in a shell."""
    monkeypatch.chdir(tmp_path)
    path = write('run:\n  dir: "~no-such-user/x"\n')
    assert load(path).run.dir == str(tmp_path / "~no-such-user/x")


# -- dump, differences, batches -----------------------------------------------------------------

AWKWARD = [
    "1e-4",
    "on",
    "null",
    "~",
    "007",
    "a: b",
    "${x}",
    "\\${x}",
    "é 🐈",
    "\n",
    " x ",
    "{a",
    "",
]
texts = st.sampled_from(AWKWARD) | st.text(
    st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12
).filter(lambda text: text != "???")


@settings(max_examples=60, deadline=None)
@given(
    name=texts,
    tags=st.lists(texts.filter(bool), max_size=3),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-12, 1e3),
)
def test_load_reads_what_dump_wrote(tmp_path_factory, name, tags, seed, rate):
    """The configuration in a run folder is the configuration that ran, whatever its strings."""
    default = Config()
    config = Config(
        run=dataclasses.replace(default.run, dir="/runs/${odd} name", seed=seed),
        data=dataclasses.replace(default.data, shards="s3://b/set", cache_dir="/cache"),
        optim=dataclasses.replace(default.optim, g_lr=rate),
        tracking=dataclasses.replace(default.tracking, name=name, tags=tags),
        eval=dataclasses.replace(default.eval, cache_dir="/references"),
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_fixed_differences_name_what_may_not_change(write):
    """A resume may move, log and scale differently, but not compute something else."""
    old = flatten(load(write("")))
    free = [
        "run.dir=/x",
        "data.workers=7",
        "train.total_steps=9",
        "tracking.name=y",
        "data.shards=/z",
    ]
    assert fixed_differences(old, load(write(""), free)) == []
    new = load(write(""), [*free, "optim.g_lr=1e-3", "data.batch_size=64", "data.block=2"])
    assert fixed_differences(old, new) == [
        "data.batch_size: 128 -> 64",
        "data.block: None -> 2",
        "optim.g_lr: 0.0002 -> 0.001",
    ]
    del old["optim.g_lr"], old["optim.d_lr"]  # keys that did not exist: today's defaults
    assert fixed_differences(old, load(write(""))) == []


def test_what_may_not_change_is_written_down():
    """The frozen keys: adding one here, or freeing one, is a decision about resumed runs."""
    fixed = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(Config)
        for entry in dataclasses.fields(getattr(Config(), section.name))
        if not entry.metadata.get("may_change")
    }
    assert {
        "run.seed",
        "data.batch_size",
        "data.block",
        "data.window",
        "data.lanes",
        "train.precision",
        "train.micro_batch",
        "train.ema_decay",
        "train.mirror",
        *(
            key
            for key in flatten(Config())
            if key.startswith(("model.", "optim.", "stability.", "schedule."))
        ),
    } <= fixed
    assert not {key for key in fixed if key.startswith("tracking.")}


@pytest.mark.parametrize(
    ("world", "micro", "expected"),
    [(1, None, (128, 1)), (4, None, (32, 1)), (1, 32, (32, 4)), (2, 32, (32, 2)), (4, 32, (32, 1))],
)
def test_micro_batching_cuts_the_batch_evenly(write, world, micro, expected):
    """batch_size = ranks x accumulation x micro_batch."""
    config = load(write(""), [f"train.micro_batch={micro}"] if micro else [])
    assert micro_batching(config, world) == expected


def test_micro_batching_says_which_sizes_fit(write):
    """The remedy is in the message."""
    with pytest.raises(ConfigError, match=r"world_size \(3\): use 126 or 129, or another number"):
        micro_batching(load(write("")), 3)
    config = load(write(""), ["train.micro_batch=64"])
    with pytest.raises(ConfigError, match=r"\(4\) x train.micro_batch \(64\) = 256: use 256, or"):
        micro_batching(config, 4)


def test_an_empty_override_is_the_empty_text(tmp_path: Path) -> None:
    """``eval.layer=`` is the documented default; of a number it is no value."""
    path = tmp_path / "config.yaml"
    path.write_text('eval: {layer: "320"}\n')
    assert load(path, ["eval.layer="]).eval.layer == ""
    with pytest.raises(ConfigError, match=r"train.keep \(\): must be"):
        load(path, ["train.keep="])

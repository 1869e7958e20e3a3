"""Finding a key: the page, ``train --keys``, hints to wrong guesses, and ``--key=value``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import key_page
import pytest
from launching import REPO, environment

from pipeline.config.hints import SYNONYMS, hint
from pipeline.config.keys import ON_RESUME, all_keys
from pipeline.config.schema import Config, flatten
from pipeline.config.values import convert, written
from pipeline.config.yaml_file import parse_override


def command(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the checkout."""
    return subprocess.run(
        [sys.executable, "-m", f"pipeline.{module}", *map(str, words)],
        cwd=REPO,
        env=environment() | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """If this fails, run `make keys`."""
    assert key_page.PAGE.read_text() == key_page.page()


def test_every_key_is_listed_with_a_default_that_can_be_typed() -> None:
    """The defaults on the page, typed on a command line, are the defaults."""
    keys = {key.name: key for key in all_keys()}
    defaults = flatten(Config())
    assert keys.keys() == defaults.keys()
    for name, key in keys.items():
        assert convert(name, parse_override(key.default)) == defaults[name], name
        assert key.text.endswith("."), name
        assert key.on_resume in ON_RESUME.values()
    assert keys["run.dir"].on_resume == "may change"
    assert keys["optim.g_lr"].on_resume == "with run.accept_changes"
    assert keys["model.ngf"].on_resume == "fixed"
    assert keys["train.ema_decay"].files["dcgan_64_stable.yaml"] == "0.999"
    assert written([1, 2]) == "[1,2]"


def test_keys_are_printed_by_word() -> None:
    """--keys finds by name, then by meaning; a word that nobody knows is answered, with code 2."""
    assert len(command("train", "--keys").stdout) > 10_000
    found = command("train", "--keys", "batch_size").stdout
    assert found.startswith("data.batch_size  whole number; default 128; on resume: fixed\n")
    assert "64 in" in found
    assert "train.mirror  true or false" in command("train", "--keys", "Flip").stdout
    unknown = command("train", "--keys", "epochs")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "did you mean train.total_steps?" in unknown.stderr


@pytest.mark.parametrize(
    ("guess", "answer"),
    [
        ("data.path", "did you mean data.shards?"),
        ("data.dir", "did you mean data.shards?"),
        ("train.epochs", "did you mean train.total_steps?"),
        ("train.device", "a GPU is used if there is one"),
        ("train.resume", "the same command resumes the run in run.dir"),
        ("tracking.mode", "did you mean tracking.wandb?"),
        ("optim.lr", "did you mean optim.g_lr and optim.d_lr?"),
        ("train.gpus", "accelerate launch --multi_gpu --num_processes N"),
        ("train.fp16", "did you mean train.precision?"),
        ("Batch-Size", "did you mean data.batch_size?"),
        ("output_dir", "did you mean run.dir?"),
        ("wandb", "did you mean tracking.wandb?"),
        ("seed", "did you mean run.seed?"),
        ("data.worker", "did you mean data.workers?"),
        ("modle.imagesize", "did you mean model.image_size?"),
        ("train.cat", "keys of train: total_steps, init"),
        ("tracking.colour", "keys of tracking: wandb, project"),
        ("cat", "sections: run, model"),
    ],
)
def test_a_wrong_guess_gets_a_right_hint_or_none(guess: str, answer: str) -> None:
    assert answer in hint(guess)


def test_hints_name_keys_that_exist_and_answer_none_that_does() -> None:
    """The table of synonyms follows the schema."""
    keys = flatten(Config())
    for words, answer in SYNONYMS.items():
        assert not set(words.split()) & keys.keys()
        named = [word.strip("?,;.") for word in answer.split() if word.partition(".")[2]]
        sections = {key.partition(".")[0] for key in keys}
        for name in named:
            if name.partition(".")[0] in sections:
                assert name in keys, answer


def test_an_override_may_have_two_hyphens(tiny_config: Path) -> None:
    """--section.key=value, W&B's form, is section.key=value in any place; others are answered."""
    words = ("optim.g_lr=0", "--config", tiny_config, "--optim.d_lr=0", "--data.prefetch=0")
    for module in ("train", "doctor"):
        done = command(module, *(words if module == "train" else words[1:]))
        assert done.returncode == 2, done.stderr
        assert "data.prefetch (0): must be at least 1" in done.stderr
        assert "optim.d_lr (0.0): must be above 0" in done.stderr
    unknown = command("train", "--config", tiny_config, "--epochs=3")
    assert unknown.returncode == 2
    assert "--epochs=3: no such option; did you mean train.total_steps?" in unknown.stderr
    assert "--config FILE is missing" in command("train").stderr

"""Give every key of the configuration every odd value, from the command line to the first step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random

from base import SECRET_NAME, Case, Ended, Process, Verdict, check_always, last_line
from world import World

from pipeline.config.schema import Config, flatten

VALUES = (
    *("", "null", "~", "true", "yes", "1", "'1'", "0x10", "0o17", "1_000", "-1", "0", "+1", "01"),
    *("1e3", "1e400", "1e-400", "nan", "inf", "-inf", ".5", "1.5", "2147483648", "1099511627775"),
    *("9223372036854775807", "9223372036854775808", "9" * 400, "9" * 5000, "[]", "[1,2]", "[[]]"),
    *("{}", "{a: 1}", "a b", "é", "😀", "\x1b[31m", "${run.dir}", f"${{oc.env:{SECRET_NAME}}}"),
    *(f"${{oc.env:{SECRET_NAME},x}}", "${", "$", "!!python/name:os.system", "*a", "&a b", "a: b"),
    *("x" * 300, "x" * 70_000, "/dev/null", "/dev/zero", "/proc/self/mem", "..", "/", "~nobody9/x"),
    *("http://127.0.0.1:9/x", "s3://", "file:///", "://", "-", "--help", ",", ":", "'", '"', "#"),
    *("2020-01-01", "1:30", "%s", "\\", "color", "[color, 5]", "module:Class", "os:system", "a=b"),
)
SHAPES = (
    *("run.dir.x=1", "a.b.c=1", "optim.betas[0]=1", ".=1", "=1", "run=1", "run.=1", ".dir=1"),
    *("run..dir=1", "model[ngf]=8", "model.ngf[0]=8", "a=1", "model", "=", "", "model.ngf:8"),
    *("MODEL.NGF=8", "model.ngf =8", "model. ngf=8", "__class__=1", "run.__class__=1", "é.é=1"),
    *("stability.augment[0]=color", "tracking.tags.0=a", "[run.dir]=1", "${run.dir}=1", "?=1"),
)
TRAINING = 20.0
"""Seconds; a training that has not ended then has accepted a large number of steps."""


def cases(world: World) -> Iterator[Case]:
    for key in flatten(Config()):
        for value in VALUES:
            shown = value if len(value) < 99 else f"{value[:3]}*{len(value)}"
            name = f"{key}={shown}".encode("unicode_escape").decode()
            yield Case("fuzz", key.partition(".")[0], name, partial(run, f"{key}={value}", key))
    for shape in SHAPES:
        yield Case("fuzz", "shape", shape, partial(run, shape, shape.partition("=")[0].strip()))


def run(item: str, key: str, world: World, _: Random) -> Verdict:
    world.restore()
    began = time.time()
    words = [*world.words("train"), "train.total_steps=2", f"run.dir={world.at}/fuzzed"]
    process = Process([*words, item], world.at)
    ended = process.wait(TRAINING)
    if ended.late and "error" not in ended.output:
        ended = Ended(0, ended.output, ended.resident)
    if (bad := check_always(world.at, ended, began)) is not None:
        return bad
    if ended.code == 0:
        return Verdict("harmless")
    named = key in ended.output or key.partition("[")[0] in ended.output
    return Verdict("detected" if named else "names no file", last_line(ended.output))

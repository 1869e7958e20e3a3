"""A view of a run in W&B that may be slow, dead or absent without the run noticing.

Everything about W&B happens in one daemon thread behind a bounded queue. A server that refuses or
never answers costs the run nothing but a line of warning: the rows then go to a
``wandb/offline-run-*`` folder of the run folder, which ``wandb sync`` uploads.
"""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import netrc
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.schema import Config
from pipeline.runtime.console import say

STEP_KEY = "train/step"
METRIC_GROUPS = ("loss", "scores", "perf", "progress", "memory", "eval", "samples")
QUEUE_ROWS = 10_000  # a day of rows at one in ten seconds; images wait as paths, not as pixels
FLUSH_SECONDS = 1.0  # wandb-core's default of 15 s is what a SIGTERM to it would cost
SAAS_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # one service under two names
TRUTH = " metrics.jsonl and samples/ have everything."


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG on disk that W&B shall show."""

    path: Path
    caption: str


class WandbLog:
    """A W&B run that can be slow, dead or absent without its owner noticing.

    One daemon thread imports wandb, opens the run and sends the rows. When W&B cannot be reached,
    or its helper process dies (a SIGTERM to the whole job ends it at once), the thread goes on
    with an offline folder of the same run id.
    """

    def __init__(
        self,
        config: Config,
        run_id: str,
        job_type: str = "train",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Start W&B for a training run, or beside it: any other job type is a run of its own.

        Args:
            config: all of it becomes the W&B config.
            run_id: the training run's. Another job type is the run ``<run_id>-<job_type>`` in the
                same group: two processes that write one run id overwrite each other's rows.
            job_type: ``train`` or, for evaluations, ``eval``.
            extra: further entries of the W&B config.
        """
        self._config, self._timeout = config, config.tracking.timeout
        self._identity = (run_id, job_type, dict(extra or {}))
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._recent: deque[tuple[float, dict[str, Any]]] = deque()
        self._ended, self._failed, self._abandoned, self._dropped = False, False, False, 0
        self._folder = ""
        self._thread: threading.Thread | None = None
        self._mode = wandb_mode(config)
        if self._mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb-rows", daemon=True)
            self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over a row with ``train/step`` in it; never waits, never raises."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._dropped += 1

    def close(self, failed: bool = False) -> None:
        """Wait up to ``tracking.timeout`` seconds for the last rows, then give up on them."""
        if self._thread is None:
            return
        self._failed = failed
        deadline = time.monotonic() + self._timeout
        if self._thread.is_alive():  # it has ended if W&B failed altogether
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=self._timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandoned = True
            _kill_core()  # else wandb's exit hook waits for it, without limit
            self._thread.join(2.0)
            what = f" What W&B has recorded: {_upload(self._folder)}" if self._folder else ""
            say(f"W&B did not take the last rows within {self._timeout:g} s.{TRUTH}{what}")
        if self._dropped:
            say(f"W&B was too slow: {self._dropped} rows were not sent to it.{TRUTH}")
        self._thread = None

    def _work(self) -> None:
        mode = self._mode
        for fallback in (True, False):
            try:
                return self._session(mode)
            except Exception as error:  # wandb fails in many ways; none of them may end a run
                if self._abandoned:
                    return
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                then = "going on offline." if fallback else f"going on without it.{TRUTH}"
                say(f"W&B ({mode}) failed, {then} [{reason}]")
            finally:
                _shut_down()  # after a failure wandb-core would still hold the run id
            mode = "offline"

    def _session(self, mode: str) -> None:
        """Send rows until the end of the run; raises whatever wandb raises."""
        run_id, job_type, extra = self._identity
        run = open_run(self._config, run_id, mode, job_type, extra)
        self._folder = run.settings.sync_dir
        say(f"W&B: {run.url}" if mode == "online" else f"W&B: offline, {_upload(self._folder)}")
        for _, row in self._recent:  # those that a killed wandb-core may not have written yet
            run.log(_shown(row))
        while not self._ended:
            row_or_end = self._queue.get()
            if row_or_end is None:
                self._ended = True
                break
            now = time.monotonic()
            while self._recent and self._recent[0][0] < now - 3 * FLUSH_SECONDS:
                self._recent.popleft()
            self._recent.append((now, row_or_end))
            run.log(_shown(row_or_end))
        run.finish(exit_code=int(self._failed))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    import wandb

    return {
        key: wandb.Image(str(v.path), caption=v.caption) if isinstance(v, Picture) else v
        for key, v in row.items()
    }


def _shut_down() -> None:
    """End wandb-core now, so that wandb's exit hook, which has no time limit, finds nothing."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
    _kill_core()


def open_run(
    config: Config, run_id: str, mode: str, job_type: str, extra: Mapping[str, Any]
) -> Any:
    """A W&B run as ``WandbLog`` describes it, blocking for up to a third of the timeout.

    Raises:
        Exception: whatever wandb raises when it is not installed, not reachable or not willing.
    """
    # Error reports and telemetry of the client go to its makers; a dead network makes its exit
    # hooks wait for them (12 s measured with 0.31).
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if mode == "online" and not _has_key():
        raise LookupError("no API key configured; log in with: wandb login")  # else wandb asks
    tracking, suffix = config.tracking, "" if job_type == "train" else f"-{job_type}"
    wished: dict[str, Any] = {
        "mode": mode,
        "silent": True,
        "console": "off",
        "init_timeout": max(1.0, tracking.timeout / 3),
        "finish_timeout": max(1.0, tracking.timeout / 2),
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
        "x_disable_stats": job_type != "train",
    }
    known = {k: v for k, v in wished.items() if k in wandb.Settings.model_fields}
    wandb.setup(settings=wandb.Settings(silent=True))  # the login line comes before init's settings
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        id=run_id + suffix,
        name=(tracking.name or Path(config.run.dir).name) + suffix,
        group=tracking.group or run_id,
        job_type=job_type,
        tags=tracking.tags,
        dir=Path(config.run.dir).expanduser(),
        config={**dataclasses.asdict(config), "train_run_id": run_id, **extra},
        allow_val_change=True,  # a resume may change total_steps and the like
        resume="allow",  # also offline: without it the rows of a second folder overwrite the first
        reinit="create_new",
        settings=wandb.Settings(**known),
    )
    define_metrics(run)
    return run


def define_metrics(run: Any) -> None:
    """Plot everything over ``train/step``; each job defines all of it, or W&B forgets the rest."""
    run.define_metric(STEP_KEY, hidden=True)
    for group in METRIC_GROUPS:
        run.define_metric(f"{group}/*", step_metric=STEP_KEY)


def wandb_mode(config: Config) -> str:
    """``online``, ``offline`` or ``disabled``, found without importing wandb.

    For ``tracking.wandb=auto``: WANDB_MODE, else what ``wandb offline`` or ``wandb online`` wrote
    to wandb's settings file, else online if a key is configured, else offline.
    """
    if config.tracking.wandb != "auto":
        return config.tracking.wandb
    asked = os.environ.get("WANDB_MODE") or _settings_files().get("mode", "")
    names = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
    if asked == "disabled":
        return "disabled"
    return names.get(asked) or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    """Whether wandb would find credentials: environment, netrc or its settings files."""
    settings = _settings_files()
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.get("api_key"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "")).netloc
    hosts = SAAS_HOSTS if host in ("", *SAAS_HOSTS) else (host,)
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
        return any((entries.authenticators(host) or ("", "", ""))[2] for host in hosts)
    return False


def _settings_files() -> dict[str, str]:
    """Wandb's settings, the working folder's over the user's."""
    user = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings"
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([user, Path("wandb/settings")])
    return dict(parser["default"]) if parser.has_section("default") else {}


def _kill_core() -> None:
    """End this process's wandb-core. wandb keeps its process id private, so ask /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            state, parent = fields.split()[:2]
            if name == "wandb-core" and int(parent) == os.getpid() and state != "Z":
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _upload(folder: str) -> str:
    return f"upload with: wandb sync {folder}"

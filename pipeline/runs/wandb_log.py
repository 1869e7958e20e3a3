"""Log rows and images to W&B from a daemon thread, so that W&B cannot delay or end a run.

If the server refuses a run or does not answer, the rows go to a ``wandb/offline-run-*`` folder in
the run folder, and one warning is printed. ``wandb sync`` uploads such a folder.
"""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import netrc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.schema import Config
from pipeline.runs import wandb_names
from pipeline.runs.row_queue import Row, RowQueue
from pipeline.runtime.console import say
from pipeline.runtime.text import masked, masked_tree

STEP_KEY = "train/step"
METRIC_GROUPS = (
    *("loss", "scores", "grad_norm", "weight_norm", "watch", "lr", "adam", "gamma", "ema"),
    *("perf", "progress", "memory", "eval", "samples"),
)
QUEUE_ROWS = 10_000  # one row in 10 s for a day; the queue holds paths of images, not pixels
FLUSH_SECONDS = 1.0  # a SIGTERM to wandb-core loses this much; its default is 15 s
SAAS_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # one service under two names
SETTINGS = Path("wandb/settings")
"""Where wandb looks for settings in the working folder."""
COMPLETE_FILES = " metrics.jsonl and samples/ have everything."


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file to log to W&B as an image."""

    path: Path
    caption: str


@dataclasses.dataclass(frozen=True)
class Alert:
    """A message to send as an alert of W&B."""

    title: str
    text: str


class WandbLog:
    """A W&B run behind a bounded queue; no method raises an error of W&B.

    A daemon thread imports wandb, opens the run and sends the rows. If W&B cannot be reached, or
    its process wandb-core dies (a SIGTERM to the whole job kills it), the thread continues with an
    offline folder of the same run id.
    """

    def __init__(
        self,
        config: Config,
        run_id: str,
        job_type: str = "train",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the thread, unless W&B is disabled; raises ConfigError for names W&B refuses.

        Args:
            config: the whole configuration, which becomes the W&B config.
            run_id: id of the training run. Job types other than ``train`` and ``scores`` log to the
                run ``<run_id>-<job_type>`` in the same group, because two processes that write one
                W&B run overwrite each other's rows.
            job_type: ``train``; ``eval`` or the like for evaluations; or ``scores`` to add rows to
                the run of a training that has ended.
            extra: more entries of the W&B config.
        """
        self._config, self._timeout = config, config.tracking.timeout
        self._identity = (run_id, job_type, dict(extra or {}))
        self._rows = RowQueue(QUEUE_ROWS)
        self._recent: deque[tuple[float, Row]] = deque()
        self._ended, self._failed, self._abandoned = False, False, False
        self._folder = ""
        self._mode = wandb_mode(config)
        if self._mode != "disabled":
            wandb_names.require_names()
            own = wandb_names.of_run(config, run_id, job_type)
            wandb_names.own_environment(own["id"], job_type)
            self._rows.start(self._work, "wandb-rows")

    def log(self, row: Row) -> None:
        """Queue a row, which holds ``train/step``. Drops it if the queue is full; never waits."""
        self._rows.put(row)

    def close(self, failed: bool = False) -> None:
        """Wait up to ``tracking.timeout`` seconds until the queue is empty, then end the thread."""
        if not self._rows.is_open:
            return
        self._failed = failed
        if not self._rows.close(self._timeout, self._abandon):
            hint = f" Rows recorded so far: {_upload_hint(self._folder)}" if self._folder else ""
            say(f"W&B did not take the last rows within {self._timeout:g} s.{COMPLETE_FILES}{hint}")
        if dropped := self._rows.dropped:
            say(f"W&B was too slow: {dropped} rows were not sent to it.{COMPLETE_FILES}")

    def _abandon(self) -> None:
        self._abandoned = True
        _kill_core()  # otherwise wandb's exit hook waits for it without a limit

    def _work(self) -> None:
        """Run one session and, if it fails, a second one offline."""
        mode = self._mode
        for fallback in (True, False):
            try:
                return self._session(mode)
            except Exception as error:  # wandb raises many types, and none of them may end a run
                if self._abandoned:
                    return
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                then = "going on offline." if fallback else f"going on without it.{COMPLETE_FILES}"
                say(f"W&B ({mode}) failed, {then} [{reason}]")
            finally:
                _shut_down()  # otherwise wandb-core holds the run id after a failure
            mode = "offline"

    def _session(self, mode: str) -> None:
        """Open the run and send rows until ``close``; raises the errors of wandb."""
        run_id, job_type, extra = self._identity
        run = open_run(self._config, run_id, mode, job_type, extra)
        self._folder = run.settings.sync_dir
        place = run.url if mode == "online" else f"offline, {_upload_hint(self._folder)}"
        say(f"W&B: {place}")
        for _, row in self._recent:  # a killed wandb-core may not have written these
            _send(run, row)
        while not self._ended:
            row_or_end = self._rows.take()
            if row_or_end is None:
                self._ended = True
                break
            now = time.monotonic()
            while self._recent and self._recent[0][0] < now - 3 * FLUSH_SECONDS:
                self._recent.popleft()
            self._recent.append((now, row_or_end))
            _send(run, row_or_end)
        run.finish(exit_code=int(self._failed))


def _send(run: Any, row: Row) -> None:
    """Log a row, each ``Picture`` as a ``wandb.Image``; send each ``Alert`` instead."""
    import wandb

    for alert in row.values():
        if isinstance(alert, Alert):
            return run.alert(title=alert.title, text=alert.text, level="WARN")  # type: ignore[no-any-return]
    run.log(
        {
            key: wandb.Image(str(v.path), caption=v.caption) if isinstance(v, Picture) else v
            for key, v in row.items()
        }
    )


def _shut_down() -> None:
    """End wandb-core, so that wandb's exit hook does not wait for it without a limit."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()
    _kill_core()


def open_run(
    config: Config, run_id: str, mode: str, job_type: str, extra: Mapping[str, Any]
) -> Any:
    """Open a W&B run for the arguments of ``WandbLog``; blocks for a third of the timeout at most.

    Raises:
        Exception: any error of wandb: not installed, not reachable, refused.
    """
    # Without a network wandb's exit hooks wait for its error reports (12 s with wandb 0.31).
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if mode == "online" and not _has_key():
        # wandb.init would prompt for a key.
        raise LookupError("no API key configured; log in with: wandb login")
    if mode == "online" and _came_with_a_run():
        raise LookupError(
            f"{SETTINGS} of the working folder came with a run and could send your API key to any "
            "server; start the command from another folder, or remove that file"
        )
    tracking = config.tracking
    settings: dict[str, Any] = {
        "mode": mode,
        "silent": True,
        "console": "off",
        "init_timeout": max(1.0, tracking.timeout / 3),
        "finish_timeout": max(1.0, tracking.timeout / 2),
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
        "x_disable_stats": job_type != wandb_names.TRAIN,
        "x_primary": job_type != wandb_names.SCORES,  # the training's files and command line stay
    }
    about: dict[str, Any] = {"job_type": wandb_names.TRAIN}  # the training's configuration stays
    if job_type != wandb_names.SCORES:
        values = {**dataclasses.asdict(config), "train_run_id": run_id, **extra}
        about = {"job_type": job_type, "config": masked_tree(values)}
    known = {k: v for k, v in settings.items() if k in wandb.Settings.model_fields}
    wandb.setup(settings=wandb.Settings(silent=True))  # init() prints a line before its settings
    sys.argv[1:] = map(masked, sys.argv[1:])  # W&B keeps the command line, too
    run = wandb.init(
        **wandb_names.of_run(config, run_id, job_type),
        **about,
        dir=Path(config.run.dir).expanduser(),
        allow_val_change=True,  # a resume may change total_steps, for example
        resume="allow",  # offline too: otherwise `wandb sync` overwrites the first folder's rows
        reinit="create_new",
        settings=wandb.Settings(**known),
    )
    define_metrics(run)
    return run


def define_metrics(run: Any) -> None:
    """Plot all metrics over ``train/step``. A job must define all groups: W&B keeps no others."""
    run.define_metric(STEP_KEY, hidden=True)
    for group in METRIC_GROUPS:
        run.define_metric(f"{group}/*", step_metric=STEP_KEY)


def wandb_mode(config: Config) -> str:
    """Return ``online``, ``offline`` or ``disabled`` without importing wandb.

    ``tracking.wandb=auto`` takes the first of: WANDB_DISABLED; WANDB_MODE; the mode that ``wandb
    offline`` or ``wandb online`` wrote to wandb's settings file; online if an API key is
    configured; offline.
    """
    if config.tracking.wandb != "auto":
        return config.tracking.wandb
    mode = wandb_names.mode_of_environment() or wandb_names.MODES.get(
        _settings_files().get("mode", "")
    )
    return mode or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    """Return whether wandb would find credentials: in environment, netrc or settings files."""
    settings = _settings_files()
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.get("api_key"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "")).netloc
    hosts = SAAS_HOSTS if host in ("", *SAAS_HOSTS) else (host,)
    # RuntimeError: no home folder can be determined.
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
        return any((entries.authenticators(host) or ("", "", ""))[2] for host in hosts)
    return False


def _settings_files() -> dict[str, str]:
    """Read wandb's settings files; the working folder's overrides the user's, unless foreign."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"))
    with contextlib.suppress(RuntimeError):  # no home folder can be determined
        folder = folder.expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([folder / "settings", *([] if _came_with_a_run() else [SETTINGS])])
    return dict(parser["default"]) if parser.has_section("default") else {}


def _came_with_a_run() -> bool:
    """Return whether the working folder is a run's, or of data, and holds settings for wandb."""
    beside = ("run.json", "config.yaml", "index.json")
    return SETTINGS.exists() and any(Path(name).exists() for name in beside)


def _kill_core() -> None:
    """Kill this process's wandb-core. Search /proc for it, because wandb hides its process id."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            state, parent = fields.split()[:2]
            if name == "wandb-core" and int(parent) == os.getpid() and state != "Z":
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _upload_hint(folder: str) -> str:
    """Return the command that uploads an offline folder."""
    return f"upload with: wandb sync {folder}"

"""Scores of images by all ranks together: extractor, protocol and reference, ready to use.

Every method is called on all ranks; rank 0 alone holds features and scores.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipeline.config.schema import Config
from pipeline.data.cache import check_shards
from pipeline.data.shards import Index, read_index
from pipeline.evaluation import candidates
from pipeline.evaluation.extractors import extract, load_extractor
from pipeline.evaluation.metrics import (
    Reference,
    compute_scores,
    make_reference,
    read_reference,
    write_reference,
)
from pipeline.evaluation.protocol import Protocol, make_protocol
from pipeline.models.sampling import Images
from pipeline.runtime import signals
from pipeline.runtime.console import say
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.locks import FileLock
from pipeline.runtime.ranks import on_every_rank, on_rank_zero, run_on_selected_ranks

POLL_SECONDS = 1.0


class Scorer:
    """Extractor, protocol and reference, ready to score images.

    Args:
        config: ``eval`` and ``data`` are used; ``model`` for the image shape.
        accelerator: the processes that share the work.

    Raises:
        UserError: data, weights or reference that do not fit; the cheap checks come first.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = accelerator.is_main_process
        self._agreement = signals.Agreement(accelerator.num_processes)
        self._said = ""
        self.index = self._read_index("data.shards", config.data.shards)
        self._open(self.index)

    def _read_index(self, field: str, location: str) -> Index:
        def read() -> Index:
            index = read_index(location, field=field)
            index.require_shape(self.config.model.image_shape, field)
            return index

        return on_every_rank(self.accelerator, read)

    def _open(self, index: Index) -> None:
        """Set extractor, protocol and reference."""
        self.extractor = load_extractor(self.config.eval, self.accelerator)
        self.protocol: Protocol = make_protocol(self.config.eval, self.extractor, index)
        self.reference: Reference | None = None  # on rank 0, after ``load_reference``

    def describe(self) -> str:
        """What is measured, for people."""
        dim, said = self.extractor.dim, self.protocol.describe()
        if self.protocol.has_fid:
            return said
        return (
            f"{said}\nno Frechet distance: {dim} numbers need at least {2 * dim} images of either "
            "kind; KID decides instead"
        )

    def load_reference(self) -> None:
        """The features of the real images: from ``eval.reference``, the cache, or computed now."""
        side = self.protocol.reference
        if self.config.eval.reference:
            given = Path(self.config.eval.reference)
            on_rank_zero(self.accelerator, lambda: self._read(given))
            return
        cached = Path(self.config.eval.cache_dir).expanduser() / f"{side.id}.safetensors"
        lock = _ReferenceLock(cached.with_suffix(".lock"))
        while (state := on_rank_zero(self.accelerator, lambda: self._look(cached, lock))) != "here":
            if state == "mine":
                self.compute_reference(cached)
                lock.release()
                return
            self.wait_because("another process computes the reference; waiting for it")

    def write_reference(self, path: Path | None) -> None:
        """Compute the reference file unless the cache has it; a copy at ``path`` if given."""
        self.load_reference()

        def copy() -> None:
            if path is not None and self.reference is not None:
                write_reference(path, self.reference)
                print(f"eval.reference={path.resolve()}", flush=True)

        on_rank_zero(self.accelerator, copy)

    def compute_reference(self, path: Path) -> None:
        """Extract the features of the real images and publish them as a file."""
        side = self.protocol.reference
        check = partial(check_shards, self.index, self.config.data.verify)
        run_on_selected_ranks(self.accelerator, self.is_main, check)
        images = candidates.real_images(self.index, self.config.data, side.reference_images)
        features = self._extract(images, side.reference_images, "reference")

        def keep() -> None:
            self.reference = make_reference(side, features[self.extractor.layer])
            write_reference(path, self.reference)
            say(f"reference: {side.reference_images} real images -> {path}")

        on_rank_zero(self.accelerator, keep, lengthy=True)

    def score(self, images: Images, name: str) -> dict[str, float]:
        """Scores of ``eval.num_images`` images by metric key; {} on ranks other than 0."""
        features = self._extract(images, self.protocol.num_images, name)
        scores: dict[str, float] = {}

        def compute() -> None:
            assert self.reference is not None
            scores.update(compute_scores(features, self.extractor, self.reference, self.protocol))

        on_rank_zero(self.accelerator, compute, lengthy=True)
        return scores

    def close(self) -> None:
        """Finish the exchange of stop requests that is under way."""
        self._agreement.close()

    def wait(self, seconds: float) -> None:
        """Sleep; a stop request ends it at once, on all ranks."""
        for _ in range(max(1, round(seconds / POLL_SECONDS))):
            time.sleep(POLL_SECONDS)
            if self._agreement.agree(signals.received() is not None, False)[0]:
                raise signals.Stopped

    def wait_because(self, why: str) -> None:
        """A short ``wait`` for another process; says why once."""
        if self.is_main and why != self._said:
            say(why)
        self._said = why
        self.wait(POLL_SECONDS)

    def _extract(self, images: Images, count: int, name: str) -> dict[str, Tensor]:
        with tqdm(
            total=count,
            desc=name,
            unit="img",
            dynamic_ncols=True,
            leave=False,
            disable=not (self.is_main and sys.stderr.isatty()),
        ) as bar:
            features = extract(
                images,
                count,
                self.extractor,
                self.accelerator,
                self.config.eval.batch_size,
                self._agreement,
                bar.update,
            )
        if features is None:
            raise signals.Stopped
        return features

    def _read(self, path: Path) -> None:
        self.reference = read_reference(path, self.protocol.reference)

    def _look(self, cached: Path, lock: _ReferenceLock) -> str:
        if not cached.is_file() and not lock.acquire():
            return "busy"
        if not cached.is_file():  # looked at again: it may have come with the lock
            return "mine"
        try:
            self._read(cached)
        except EvaluationError as error:
            if not lock.acquire():
                return "busy"
            say(f"{error}\ncomputing it anew")
            return "mine"
        lock.release()
        return "here"


class _ReferenceLock:
    """The right to compute a reference file that is missing; held by one process of any node."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        """Take the lock, or return False if another process has it.

        Raises:
            EvaluationError: ``eval.cache_dir`` cannot be written.
        """
        if self._lock is not None:
            return True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._path)
            if lock.acquire(wait=False):
                self._lock = lock
            else:
                lock.close()
        except OSError as error:
            raise EvaluationError(
                f"eval.cache_dir ({self._path.parent}): cannot be written: {error.strerror}; "
                "choose another with eval.cache_dir=..."
            ) from None
        return self._lock is not None

    def release(self) -> None:
        """Give the lock up; no error without it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

"""Score one set of images on all ranks together.

Every method of ``Scorer`` must be called on all ranks. Only rank 0 has features and scores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from pipeline.config.schema import Config, ModelConfig
from pipeline.data.cache import check_shards
from pipeline.data.shards import Index
from pipeline.evaluation import candidates, memorization
from pipeline.evaluation.catalogue import METRICS
from pipeline.evaluation.extraction import Part, extract_or_stop, of_each
from pipeline.evaluation.extractors import MOST_FEATURES, load_extractor
from pipeline.evaluation.metrics import Classes, compute_scores, over_seeds
from pipeline.evaluation.moments import FeatureSet, npz_id
from pipeline.evaluation.pictures import Pictures
from pipeline.evaluation.protocol import Protocol, make_protocol
from pipeline.evaluation.references import (
    Reference,
    ReferenceLock,
    make_reference,
    read_reference,
    write_reference,
)
from pipeline.models.sampling import Images
from pipeline.runtime import signals
from pipeline.runtime.console import say
from pipeline.runtime.documents import set_file_aside
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.ranks import on_every_rank, on_rank_zero, run_on_selected_ranks

POLL_SECONDS = 1.0
"""Seconds between two looks at stop signals and at the work of other processes."""


class Scorer:
    """Extractor, protocol and reference, which together make a score of images.

    ``RunScores`` applies it to the checkpoints of a run.

    Args:
        config: sections ``eval`` and ``data`` are used, and ``model`` for the shape of the images.
        accelerator: its ranks divide the images.
        real: images to compare with; None = those of ``data.shards``.

    Raises:
        UserError: shards, weights or settings that cannot be used.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, real: Index | Pictures | None = None
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = accelerator.is_main_process
        self._agreement = signals.Agreement(accelerator.num_processes)
        self.picture: NDArray[np.uint8] | None = None
        """Of the last images, by ``memorization.picture``; on rank 0, if the metric is computed."""
        self._reason = ""  # of the last ``wait_for_other_process``
        self.index = real or candidates.open_shards(
            config, accelerator, "data.shards", config.data.shards
        )
        self.others: list[Scorer] = []
        """Of ``eval.more_extractors``: they score the same images in the same pass."""
        self._set_protocol()

    def _set_protocol(self) -> None:
        """Set ``extractor`` and ``protocol``."""
        config, given = self.config.eval, Path(self.config.eval.reference)
        self.held_out: Index | None = None
        if config.held_out and "memorization" in config.metrics:
            found = candidates.open_shards(
                self.config, self.accelerator, "eval.held_out", config.held_out
            )
            self.held_out = candidates.require_held_out(found, self.index, "eval.held_out")
        classes, num_classes = None, self.config.model.num_classes
        if "class_fid" in config.metrics and num_classes:
            classes = candidates.class_labels(self.index, config, num_classes)
        counts = (np.bincount(c, minlength=num_classes).min() for c in classes or ())
        fewest = min(map(int, counts), default=None)
        self.classes = classes
        self.extractor = load_extractor(config, self.accelerator)
        npz = ""
        if given.suffix == ".npz":
            npz = on_every_rank(self.accelerator, lambda: npz_id(given))
        self.protocol: Protocol
        self.protocol, self._left_out = make_protocol(
            config,
            self.extractor,
            self.index,
            num_classes,
            npz,
            self.held_out,
            fewest,
        )
        self.reference: Reference | None = None  # set on rank 0 by ``load_reference``
        for alone in of_each(self.config):
            self.others.append(Scorer(alone, self.accelerator, self.index))

    def describe(self) -> str:
        """Return the protocol as text to print, with a line for each metric that is left out."""
        lines = [self.protocol.describe(), *(f"left out: {line}" for line in self._left_out)]
        return "\n".join(lines + [other.describe() for other in self.others])

    def load_reference(self) -> None:
        """Set the reference: read it from ``eval.reference`` or the cache, or compute it.

        Only one process computes a reference that the cache lacks. Others wait for it.
        """
        for other in self.others:
            other.load_reference()
        protocol = self.protocol.reference
        if self.config.eval.reference:
            given = Path(self.config.eval.reference)
            on_rank_zero(self.accelerator, lambda: self._read_reference(given))
            return
        cached = Path(self.config.eval.cache_dir).expanduser() / f"{protocol.id}.safetensors"
        lock = ReferenceLock(cached.with_suffix(".lock"))
        attempt = partial(self._read_cached_or_lock, cached, lock)
        while (state := on_rank_zero(self.accelerator, attempt)) == "busy":
            self.wait_for_other_process("another process computes the reference; waiting for it")
        if state == "locked":
            self.compute_reference(cached)
            lock.release()

    def write_reference(self, path: Path | None) -> None:
        """Put the reference into the cache, and a copy of it at ``path`` unless that is None."""
        self.load_reference()

        def copy() -> None:
            if path is not None and self.reference is not None:
                write_reference(path, self.reference)
                print(f"eval.reference={path.resolve()}", flush=True)

        on_rank_zero(self.accelerator, copy)

    def compute_reference(self, path: Path) -> None:
        """Compute the reference from the real images and write it to ``path``."""
        protocol = self.protocol.reference
        count = protocol.reference_images
        found = FeatureSet(protocol.layer, protocol.kept_features, protocol.has_statistics)
        self._extract_real(self.index, count, "real images", found)
        held_out = None
        if self.held_out is not None:
            held_out = FeatureSet(protocol.layer, MOST_FEATURES)
            few = min(self.held_out.num_samples, MOST_FEATURES)
            self._extract_real(self.held_out, few, "held-out images", held_out)

        def make_and_write() -> None:
            self.reference = make_reference(protocol, found, self.accelerator.device, held_out)
            write_reference(path, self.reference)
            say(f"reference: {count} real images -> {path}")

        on_rank_zero(self.accelerator, make_and_write, lengthy=True)

    def _extract_real(
        self, index: Index | Pictures, count: int, name: str, found: FeatureSet
    ) -> None:
        """Extract the features of ``count`` real images, of shards after a check of these."""
        if isinstance(index, Index):
            check = partial(check_shards, index, self.config.data.verify)
            run_on_selected_ranks(self.accelerator, self.is_main, check)
        images = candidates.real_images(index, self.config.data, count)
        self._extract(images, count, name, [(self.extractor, found.add)])

    def score_generator(
        self,
        G: nn.Module,
        model: ModelConfig,
        name: str,
        which: Sequence[Scorer] | None = None,
    ) -> list[dict[str, float]]:
        """Score the images that a generator makes of each seed; see ``score`` and ``over_seeds``.

        Args:
            G: as ``candidates.open_generator`` returns it.
            model: its architecture.
            name: for the progress bar.
            which: whose scores; None = of this and all ``others``.

        Raises:
            EvaluationError: ``eval.labels`` is data, and the labels of the shards do not fit G.
        """
        config, classes = self.config.eval, None
        if model.num_classes:
            classes = candidates.classes_of(self.index, config, model.num_classes)
        found = []
        for seed in config.seeds or [config.seed]:
            images = candidates.generated_images(G, model, seed, classes)
            found.append(self.score(images, f"{name}, seed {seed}", self.classes, which))
        return [over_seeds(list(of_one)) for of_one in zip(*found, strict=True)]

    def score(
        self,
        images: Images,
        name: str,
        classes: Classes | None = None,
        which: Sequence[Scorer] | None = None,
    ) -> list[dict[str, float]]:
        """Score the first ``eval.num_images`` images; call ``load_reference`` before.

        Each batch of images is made once and passes through all extractors, each time as if that
        were the only one.

        Args:
            images: the same set on every rank.
            name: of the set, for the progress bar.
            classes: of the generated and the real images, if the images are of a G with classes.
            which: whose scores; None = of this and all ``others``.

        Returns:
            for each extractor: on rank 0 {metric key: score}, on other ranks {}.

        Raises:
            EvaluationError: classes are compared, and the images have none.
            Stopped: a stop signal came.
        """
        if classes is None and "class_fid" in self.config.eval.metrics:
            raise EvaluationError(
                f"eval.metrics (class_fid): the classes of {name} are unknown. Leave it out."
            )
        scorers = [self, *self.others] if which is None else which
        sets = [scorer._new_set() for scorer in scorers]
        parts = [(s.extractor, found.add) for s, found in zip(scorers, sets, strict=True)]
        self._extract(images, self.protocol.num_images, name, parts)
        scores: list[dict[str, float]] = [{} for _ in scorers]

        def compute() -> None:
            for k, scorer in enumerate(scorers):
                scores[k] = scorer._compute_scores(sets[k], images, classes)

        on_rank_zero(self.accelerator, compute, lengthy=True)
        return scores

    def _new_set(self) -> FeatureSet:
        """Return an empty set for the features of generated images."""
        protocol = self.protocol
        caps = [METRICS[name].cap or 0 for name in protocol.metrics]
        logits = self.extractor.logits if "is" in protocol.metrics else None
        return FeatureSet(self.extractor.layer, max(caps), "fid" in protocol.metrics, logits)

    def _compute_scores(
        self, found: FeatureSet, images: Images, classes: Classes | None
    ) -> dict[str, float]:
        """Compute the scores of generated images from their features, on rank 0."""
        assert self.reference is not None
        device, matches = self.accelerator.device, None
        if "memorization" in self.protocol.metrics and found.is_finite:
            matches = memorization.nearest(found.features, self.reference.features, device)
            count = self.protocol.reference.reference_images
            real = candidates.real_images(self.index, self.config.data, count)
            self.picture = memorization.picture(images, real, matches)
        return compute_scores(found, self.reference, self.protocol, device, matches, classes)

    def close(self) -> None:
        """Finish the pending exchange of stop requests."""
        for scorer in (self, *self.others):
            scorer._agreement.close()

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Stopped: a stop signal came; raised on all ranks, within seconds.
        """
        for _ in range(max(1, round(seconds / POLL_SECONDS))):
            time.sleep(POLL_SECONDS)
            if self._agreement.agree(signals.received() is not None, False)[0]:
                raise signals.Stopped

    def wait_for_other_process(self, reason: str) -> None:
        """Wait for ``POLL_SECONDS``; print the reason, unless the last call had the same."""
        if self.is_main and reason != self._reason:
            say(reason)
        self._reason = reason
        self.wait(POLL_SECONDS)

    def _extract(self, images: Images, count: int, name: str, parts: Sequence[Part]) -> None:
        batch_size, agreement = self.config.eval.batch_size, self._agreement
        extract_or_stop(images, count, name, parts, self.accelerator, batch_size, agreement)

    def _read_reference(self, path: Path) -> None:
        self.reference = read_reference(path, self.protocol.reference, self.protocol.dim)

    def _read_cached_or_lock(self, cached: Path, lock: ReferenceLock) -> str:
        """Read the reference of the cache, or get the right to compute it, on rank 0.

        Returns:
            "read"; "locked" if the file is missing or damaged and ``lock`` is held now; or "busy"
            if another process holds it.
        """
        if not cached.exists() and not lock.acquire():
            return "busy"
        if not cached.exists():  # checked again: its last holder may have written the file
            return "locked"
        try:
            self._read_reference(cached)
        except EvaluationError as error:
            if not lock.acquire():
                return "busy"
            say(f"{error}\nset aside as {set_file_aside(cached).name}; computing it anew")
            return "locked"
        lock.release()
        return "read"

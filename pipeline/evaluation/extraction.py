"""Pass images through extractors, on all ranks together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.schema import Config
from pipeline.evaluation.extractors import Extractor
from pipeline.models.sampling import Images
from pipeline.runtime.console import progress
from pipeline.runtime.signals import Agreement, Stopped, received

Part = tuple[Extractor, Callable[[dict[str, Tensor]], None]]
"""An extractor, and what is called on rank 0 with the features of each round."""


def of_each(config: Config) -> list[Config]:
    """Return the configuration of each of ``eval.more_extractors``, as if it were alone.

    It has its default layer, and its weights are in the folder that ``eval.extractor_weights``
    names, or in their usual place.
    """
    given = config.eval.extractor_weights
    alone: dict[str, Any] = {"layer": "", "reference": "", "more_extractors": []}
    alone["extractor_weights"] = given if Path(given).is_dir() else ""
    return [
        dataclasses.replace(config, eval=dataclasses.replace(config.eval, extractor=name, **alone))
        for name in config.eval.more_extractors
    ]


def extract(
    images: Images,
    count: int,
    parts: Sequence[Part],
    accelerator: Accelerator,
    batch_size: int,
    agreement: Agreement,
    advance: Callable[[int], None] = lambda _: None,
) -> bool:
    """Compute the features of images [0, count), in order, on all ranks together.

    Batch k is images [kB, (k+1)B) for any number of ranks W, and rank k mod W computes it. After
    each round of W batches the features are gathered. So the result does not depend on W.

    Args:
        images: the same set on every rank.
        count: number of images.
        parts: extractors of this rank, each with a function that is called on rank 0 with the
            features of each round, {layer: (n, D) float32 on the CPU}, in the order of the images.
        accelerator: of this rank.
        batch_size: B.
        agreement: makes all ranks stop in the same round after a stop signal.
        advance: called after each round with the number of images of the round.

    Returns:
        False if a signal stopped the extraction.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    for start in range(0, count, world * batch_size):
        low = min(start + rank * batch_size, count)
        high = min(low + batch_size, count)
        # A rank without images in the last round computes one again, because all must gather.
        rows = images(low, high) if high > low else images(count - 1, count)
        for extractor, add in parts:
            features = extractor(rows, device)
            if world > 1:
                for layer, values in features.items():
                    padded = F.pad(values, (0, 0, 0, batch_size - len(values)))
                    features[layer] = accelerator.gather(padded)
            if rank == 0:
                # All batches but the last are full, so the padding is at the end.
                add({layer: values[: count - start].cpu() for layer, values in features.items()})
        advance(min(world * batch_size, count - start))
        stop, _ = agreement.agree(received() is not None, False)
        if stop:
            return False
    return True


def extract_or_stop(
    images: Images,
    count: int,
    name: str,
    parts: Sequence[Part],
    accelerator: Accelerator,
    batch_size: int,
    agreement: Agreement,
) -> None:
    """Call ``extract``, with its progress under this name on rank 0.

    Raises:
        Stopped: a stop signal came.
    """
    with contextlib.ExitStack() as shown:
        advance: Callable[[int], None] = lambda _: None  # noqa: E731
        if accelerator.is_main_process:
            advance = shown.enter_context(progress(name, count))
        if not extract(images, count, parts, accelerator, batch_size, agreement, advance):
            raise Stopped

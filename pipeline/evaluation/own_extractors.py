"""Feature extractors of the user's own: ``module:Class``, a subclass of FeatureExtractorBase."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from pipeline.config.values import Unasked
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.tensor_files import tensors_sha256


def require_asked(name: str) -> None:
    """Raise ``EvaluationError`` if only a file that came with a run asks for an extractor."""
    if isinstance(name, Unasked):
        raise EvaluationError(
            f"eval.extractor ({name}): {name.file} names it, but that file came with a run, and "
            "this would execute the module. If you trust the module, add "
            f"eval.extractor={name} to the command line; else use eval.extractor=inception or "
            "efficientnet-lite0."
        )


def import_own(name: str) -> Any:
    """Import and register the class ``module:Class``, if the user has asked for it."""
    require_asked(name)
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(
            f"eval.extractor ({name}): cannot be imported: {error}. Install its package, or put "
            "its folder on PYTHONPATH."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, FeatureExtractorBase)):
        raise EvaluationError(
            f"eval.extractor ({name}): must be a subclass of torch_fidelity.FeatureExtractorBase."
        )
    register(name, cls)
    return cls


def own_id(name: str, network: Any) -> str:
    """Return the sha256 of a user's own extractor: of its weights, and its version or source.

    The source is the file of its module. A declared ``version`` takes its place, so that an edit
    which changes no feature keeps the scores comparable.

    Raises:
        EvaluationError: it has neither weights nor a version, so nothing tells two of them apart.
    """
    cls, state = type(network), network.state_dict()
    stated = getattr(cls, "version", None)
    if stated is None and not state:
        raise EvaluationError(
            f"eval.extractor ({name}): its state dict is empty, so its weights are unknown. Hold "
            'them in parameters or buffers, or declare them: version = "1" in the class, another '
            "text for every change."
        )
    if stated is None:
        file = inspect.getsourcefile(cls)
        stated = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return hashlib.sha256(f"{tensors_sha256(state)} {stated}".encode()).hexdigest()


def register(name: str, cls: type) -> None:
    """Register an extractor for ``torch_fidelity.calculate_metrics``. May be repeated.

    Raises:
        EvaluationError: another class is registered under this name.
    """
    if FEATURE_EXTRACTORS_REGISTRY.setdefault(name, cls) is not cls:
        raise EvaluationError(
            f"eval.extractor ({name}): torch-fidelity has another feature extractor of this name. "
            "Rename yours."
        )

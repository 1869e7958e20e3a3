"""Load the weights and optimizer states of a checkpoint, after a check that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.runs.checkpoint import Checkpoint
from pipeline.runtime.errors import CheckpointError


def require_data(found: Checkpoint, run_id: str, data_identity: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint of this run was trained on its data.

    One of another run is that of a copy or fork, which may train on other data.

    Raises:
        CheckpointError: it is of other data.
    """
    if found.state["run_id"] != run_id:
        return
    for key, value in data_identity.items():
        if (before := found.state["stream"].get(key)) != value:
            raise CheckpointError(
                f"{found.path}: trained on other data: {key} was {before}, is {value}. Point "
                "data.shards at the same set, or start a new run with run.dir=..."
            )


def restore(
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    states: Mapping[str, Any],
) -> None:
    """Load weights and optimizer states by their names, in place.

    Args:
        networks: to load into.
        optimizers: to load into; they keep their own learning rates and betas. A gradient scaler
            is called ``scaler``.
        weights: tensors by network and name.
        states: state dicts by optimizer.

    Raises:
        ValueError: something is missing, or of another shape or type.
    """
    for name, network in networks.items():
        _require_equal_shapes(network.state_dict(), weights.get(name, {}), name)
        network.load_state_dict(weights[name])
    for name, optimizer in optimizers.items():
        found = states.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"the state of the optimizer of {name} is missing")
        if name == "scaler":
            own = optimizer.state_dict()
            if {k: type(v) for k, v in found.items()} != {k: type(v) for k, v in own.items()}:
                raise ValueError(f"the state of the gradient scaler is {found}")
        else:
            _require_moments(found.get("state"), optimizer, name)
            found = {
                "state": found["state"],
                "param_groups": optimizer.state_dict()["param_groups"],
            }
        optimizer.load_state_dict(found)


def _require_equal_shapes(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str
) -> None:
    """Raise ValueError unless two networks have the same tensors, by name, shape and dtype."""
    for key in sorted(own.keys() | found.keys()):
        there, here = found.get(key), own.get(key)
        if there is None or here is None:
            raise ValueError(f"{name} {'lacks' if there is None else 'has an unknown'} {key}")
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ValueError(
                f"{name}: {key} is {there.dtype} {tuple(there.shape)}, must be {here.dtype} "
                f"{tuple(here.shape)}"
            )


def _require_moments(state: Any, optimizer: Any, name: str) -> None:
    """Raise ValueError unless ``state`` has Adam's moments of all parameters, or of none.

    It has none while every update so far was skipped: fp16 gradients that overflowed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(state, dict) or state.keys() not in (set(), set(range(len(parameters)))):
        raise ValueError(f"the optimizer of {name} has the state of other parameters")
    for index, entry in state.items():
        shapes = {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[index].shape)}
        if not isinstance(entry, dict) or entry.keys() != shapes.keys():
            raise ValueError(f"the optimizer of {name} has other moments than Adam's")
        for key, shape in shapes.items():
            if not isinstance(entry[key], Tensor) or entry[key].shape != shape:
                raise ValueError(f"the optimizer of {name}: {key} of parameter {index} is odd")

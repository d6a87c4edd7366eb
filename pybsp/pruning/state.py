"""The pruner's state: what a valid one looks like, and its file.

The file is safetensors: ``factors.<module>`` and ``saliency.<module>`` float32 and
``masks.<module>`` uint8 tensors of the block grids, everything else as JSON in the
header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import BlockPruningConfig

if TYPE_CHECKING:
    from .pruner import BlockPruner

STATE_FORMAT = 1
_TENSORS = ("factors", "masks", "saliency")
_SCALARS = ("format", "config", "total_steps", "step", "at_target", "strengths")


def check_state(state: Mapping[str, Any], pruner: BlockPruner) -> None:
    """``ValueError`` unless ``state`` belongs to this pruner's run."""
    missing = [key for key in (*_SCALARS, *_TENSORS) if key not in state]
    if missing:
        raise ValueError(
            f"the pruner state lacks {missing[0]!r}: it is truncated or not a pruner "
            "state; resume from another checkpoint"
        )
    if state["format"] != STATE_FORMAT:
        raise ValueError(
            f"pruner state format {state['format']!r} is not {STATE_FORMAT}: it was "
            "written by another version of pybsp"
        )
    # An older version may not have known a field yet: then it had its default.
    theirs = {**BlockPruningConfig().to_dict(), **state["config"]}
    ours = pruner.cfg.to_dict()
    # How the retrain phase computes is free: what is saved is the same.
    ours.pop("packed_retraining")
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"the pruner state was written with {key} = {theirs.get(key)!r}, this run "
            f"has {ours[key]!r}; resume with the same BlockPruningConfig"
        )
    if state["total_steps"] != pruner.schedule.total_steps:
        raise ValueError(
            f"the pruner state belongs to a run of {state['total_steps']} steps, this "
            f"one has {pruner.schedule.total_steps}; resume with the same length"
        )
    for kind in _TENSORS:
        _check_tensors(kind, state[kind], pruner)
    if state["at_target"] and not state["masks"]:
        raise ValueError(
            "the pruner state is after the cut but has no masks: truncated"
        )


def _check_tensors(
    kind: str, tensors: Mapping[str, torch.Tensor], pruner: BlockPruner
) -> None:
    names = set(pruner.targets)
    if tensors and set(tensors) != names:
        odd = sorted(set(tensors) ^ names)[0]
        where = "has no" if odd in names else "has an unknown"
        raise ValueError(
            f"the pruner state {where} {kind} entry '{odd}': another model?"
        )
    for name, tensor in tensors.items():
        grid = pruner.targets[name].grid
        if tuple(tensor.shape) != grid:
            raise ValueError(
                f"the pruner state has {kind} of shape {tuple(tensor.shape)} for "
                f"'{name}', whose block grid is {grid}: another model?"
            )


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a pruner state beside ``path``, then rename it into place."""
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous()
        for kind in _TENSORS
        for name, tensor in state[kind].items()
    }
    tensors = {
        key: t.to(torch.uint8) if t.dtype == torch.bool else t
        for key, t in tensors.items()
    }
    metadata = {"pybsp": json.dumps({key: state[key] for key in _SCALARS})}
    beside = path.with_name(path.name + ".tmp")
    save_file(tensors, beside, metadata)
    beside.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; a damaged file is a ``ValueError``."""
    try:
        with safe_open(path, framework="pt") as file:
            state = dict(json.loads((file.metadata() or {})["pybsp"]))
            state.update({kind: {} for kind in _TENSORS})
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, _, name = key.partition(".")
                state[kind][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"'{path}' is missing, truncated or not a pruner state ({error}); resume "
            "from another checkpoint"
        ) from None
    return state

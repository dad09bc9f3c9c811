"""A checkpoint under one list of passes, carried over to another: weights and optimizer moments through the lenses.

    checkpoint/step-N  (old passes)  --inverse lenses-->  the model's own form  --lenses-->  checkpoint/step-N  (new passes)

The old folder is kept beside it as `checkpoint-before-N`. Learning rates and the like go with the weight they belonged to.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ftc.errors import FtcError
from ftc.rewrite.lens import Lens, map_optimizer_state
from ftc.train.checkpoint_files import newest_step
from ftc.train.initial_weights import hosts

MODEL, STATE, GROUPS = "body.", "optimizer.state.body.", "optimizer.param_groups.body."
ByName = dict[str, dict[str, Any]]


def carry_over(folder: Path, old: nn.Module, new: nn.Module) -> int:
    """Rewrite the newest checkpoint under `folder` from the names of program `old` to those of `new`; returns its step.

    Runs in one process, with the whole model and its optimizer state in memory. Raises FtcError where a lens of `old` has
    no inverse, where optimizer state is neither Adam's nor Muon's, or where there is no checkpoint.
    """
    step = newest_step(folder)
    if step is None:
        raise FtcError(f"{folder} holds no finished checkpoint to carry over to other passes")
    entries = _read(folder / f"step-{step}")
    weights, state, groups, rest = _split(entries)
    for lens, backward in _lenses(old, new):
        if backward and not lens.has_inverse:
            raise FtcError(f"the passes of the run so far cannot be taken back: a {lens.kind} lens has no inverse")
        weights = lens.backward(weights) if backward else lens.forward(weights)
        state = map_optimizer_state(lens, state, backward=backward)
        groups = _regrouped(lens, groups, backward)
    _check_complete(weights, groups, new)
    entries = rest | {MODEL + name: value for name, value in weights.items()}
    for prefix, table in ((STATE, state), (GROUPS, groups)):
        entries |= {f"{prefix}{name}.{key}": value for name, values in table.items() for key, value in values.items()}
    _replace(folder, step, entries)
    return step


def _check_complete(weights: dict[str, torch.Tensor], groups: ByName, new: nn.Module) -> None:
    """FtcError when the new passes add parameters: the checkpoint holds neither their values nor their optimizer state."""
    parameters = {name for name, _ in new.named_parameters(remove_duplicate=False)}  # a buffer is no optimizer's
    added = [name for name in weights if groups and name not in groups and name in parameters]
    added += [name for name in new._added if not any(weight.startswith(f"{name}.") for weight in weights)]
    if added:
        raise FtcError(
            f"the passes add {added[0]}, of which the run so far knows nothing; start another run from the model it saved"
        )


def _lenses(old: nn.Module, new: nn.Module) -> Iterator[tuple[Lens, bool]]:
    """The lenses that lead from `old` to the model's own form and on to `new`, with whether each is taken backward."""
    for program, backward in ((old, True), (new, False)):
        for prefix, host in hosts(program):
            lenses = host.code.lenses
            for lens in reversed(lenses) if backward else lenses:
                yield lens.with_prefix(prefix), backward


def _read(path: Path) -> dict[str, Any]:
    """Everything in a distributed checkpoint, whole, on the CPU."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    entries: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in metadata.items()
    }
    dcp.load(entries, checkpoint_id=path, no_dist=True)
    return entries


def _split(entries: dict[str, Any]) -> tuple[dict[str, torch.Tensor], ByName, ByName, dict[str, Any]]:
    """Weights by name, optimizer state and options by parameter, and all else, which stays as it is."""
    weights, state, groups, rest = {}, {}, {}, {}
    names = {key.removeprefix(MODEL) for key in entries if key.startswith(MODEL)}
    for key, value in entries.items():
        table = state if key.startswith(STATE) else groups if key.startswith(GROUPS) else None
        if table is not None:
            name, _, leaf = key.removeprefix(STATE).removeprefix(GROUPS).rpartition(".")
            table.setdefault(name, {})[leaf] = value
        elif key.startswith(MODEL) and key.removeprefix(MODEL) in names:
            weights[key.removeprefix(MODEL)] = value
        else:
            rest[key] = value
    return weights, state, groups, rest


def _regrouped(lens: Lens, groups: ByName, backward: bool) -> ByName:
    """Options of the parameters that a lens makes: those of the parameters it takes, which must agree."""
    for step in reversed(lens.steps()) if backward else lens.steps():
        consumed, produced = (step.targets, step.sources) if backward else (step.sources, step.targets)
        taken = [groups[name] for name in consumed if name in groups]
        if any(other != taken[0] for other in taken):
            raise FtcError(f"{', '.join(consumed)} have different optimizer options and cannot become one parameter")
        groups = {name: values for name, values in groups.items() if name not in consumed}
        groups |= {name: dict(taken[0]) for name in produced if taken}
    return groups


def _replace(folder: Path, step: int, entries: dict[str, Any]) -> None:
    """Put the carried checkpoint in the folder's place, the folder itself beside it."""
    fresh = folder.with_name(f".{folder.name}-carried")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        dcp.save(entries, checkpoint_id=fresh / f"step-{step}", no_dist=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    kept = folder.with_name(f"{folder.name}-before-{step}")
    number = 1
    while kept.exists():
        kept, number = folder.with_name(f"{folder.name}-before-{step}-{number}"), number + 1
    os.replace(folder, kept)
    os.replace(fresh, folder)

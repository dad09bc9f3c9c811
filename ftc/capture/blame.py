"""What tracing cannot hold, named: the module, the line in its source, and a way out."""

import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
    free_unbacked_symbols,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftc.errors import FtcError

_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_LIBRARY = ("torch.", "ftc.", "contextlib", "functools", "typing")


@dataclass(frozen=True)
class Root:
    """The module that is traced, and its dotted name in the model ("" for the model itself)."""

    module: nn.Module
    name: str = ""

    def name_of(self, module: nn.Module) -> str:
        """Dotted name of `module` in the model; empty when it is not a part of it."""
        for path, candidate in self.module.named_modules():
            if candidate is module:
                return ".".join(part for part in (self.name, path) if part)
        return ""


@dataclass(frozen=True)
class Place:
    """A line of the model's own code, and the module that ran it where one did."""

    file: str
    line: int
    function: str
    module: nn.Module | None

    def text(self, root: Root | None) -> str:
        """`layers.0.mlp (MLP) at model.py:12`."""
        if self.module is None:
            return f"{self.function} at {self.file}:{self.line}"
        name = root.name_of(self.module) if root else ""
        kind = type(self.module).__name__
        return f"{f'{name} ({kind})' if name else kind} at {self.file}:{self.line}"


class DataReads(TorchDispatchMode):
    """Remembers where the model takes a value or a shape from the data of a fake tensor: the error comes later, elsewhere."""

    def __init__(self):
        super().__init__()
        self.places: list[Place] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tags = getattr(func, "tags", ())
        if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            if any(_unbacked(leaf) for leaf in tree_leaves(out)):
                self.places.append(here())
        return out


def _unbacked(value: object) -> bool:
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(
        free_unbacked_symbols(value)
    )


def here() -> Place | None:
    """The innermost line of the model's own code that is running now."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return _innermost(frames)


def explained(error: Exception, root: Root | None = None, reads: Iterable[Place | None] = ()) -> FtcError:
    """A readable error for what tracing cannot do, naming the model's own line. `reads`: what `DataReads` remembered."""
    frames, walk = [], error.__traceback__
    while walk is not None:
        frames.append((walk.tb_frame, walk.tb_lineno))
        walk = walk.tb_next
    place = _innermost(reversed(frames))
    if isinstance(error, PendingUnbackedSymbolNotFound):
        return refusal(next(iter(reads), place), root)
    if isinstance(error, _ON_DATA) or "numpy() is not supported for tensor subclasses" in str(error):
        return refusal(place, root)
    message = str(error).strip().splitlines() or [""]
    where = place.text(root) if place else "an unknown place"
    return FtcError(f"the model failed while being captured, in {where}: {type(error).__name__}: {message[0]}")


def refusal(place: Place | None, root: Root | None) -> FtcError:
    """The error for control flow, a value or a shape that the data of a tensor decides."""
    source = linecache.getline(place.file, place.line).strip() if place else ""
    where = place.text(root) if place else "the model, at an unknown place,"
    return FtcError(
        f"{where} takes its control flow or a shape from the values of a tensor, which a graph cannot hold"
        f"{f': `{source}`' if source else ''}. Write it with torch.where, a mask or a fixed number of iterations, decide on the "
        "inputs of the model alone, or choose another implementation of that module where the model offers one"
    )


def _innermost(frames: Iterable[tuple[FrameType, int]]) -> Place | None:
    """The place of the first frame outside the libraries, of frames from the innermost outwards."""
    found: tuple[FrameType, int] | None = None
    for frame, line in frames:
        if found is None and not _is_library(frame.f_globals.get("__name__", "")):
            found = frame, line
        if found is not None:
            first = frame.f_code.co_varnames[:1] if frame.f_code.co_argcount else ()
            owner = frame.f_locals.get(first[0]) if first else None
            if isinstance(owner, nn.Module):
                return Place(found[0].f_code.co_filename, found[1], found[0].f_code.co_name, owner)
    if found is None:
        return None
    return Place(found[0].f_code.co_filename, found[1], found[0].f_code.co_name, None)


def _is_library(name: str) -> bool:
    return name in ("torch", "ftc") or (name.startswith(_LIBRARY) and not name.startswith("ftc.models."))

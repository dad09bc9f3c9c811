"""Where this process stands among the ranks: its rank on each named axis, and the process group to talk through.

A graph names an axis ("tensor", "context") and its degree, never a rank or a group, so that all ranks share one graph and one hash and it can
be saved. Operators look the rank up here when they run: `register` binds an axis for the process, `standing_at` for a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ftc.errors import FtcError


@dataclass(frozen=True)
class Place:
    """A rank on an axis of `degree` ranks. `group` names a process group; None: no ranks to talk to (simulated, or sizes only)."""

    rank: int
    degree: int
    group: str | None = None


_PLACES: dict[str, Place] = {}


def register(axis: str, place: Place) -> None:
    """Bind `axis` for this process. Raises FtcError when it is bound to another group already."""
    known = _PLACES.get(axis)
    if known is not None and known != place:
        raise FtcError(
            f"axis {axis!r} is bound to another process group of {known.degree} ranks; release it first, or give the pass another axis name"
        )
    _PLACES[axis] = place


def release(axis: str) -> None:
    """Forget what `axis` is bound to."""
    _PLACES.pop(axis, None)


@contextlib.contextmanager
def standing_at(places: dict[str, Place]) -> Iterator[None]:
    """Stand at these places, and no others, for a while. With none, operators on fake tensors tell sizes only."""
    before = dict(_PLACES)
    _PLACES.clear()
    _PLACES.update(places)
    try:
        yield
    finally:
        _PLACES.clear()
        _PLACES.update(before)


def place_on(axis: str, degree: int, sizes_only: bool = False) -> Place:
    """Where this process stands on `axis`. With `sizes_only` (fake tensors) an unbound axis has a stand-in.

    Raises FtcError when the axis is not bound, or is bound to a group of another size than the graph's.
    """
    place = _PLACES.get(axis)
    if place is None:
        if sizes_only:
            return Place(0, degree)
        raise FtcError(
            f"this graph runs on {degree} ranks of axis {axis!r}, which is not bound: call ftc.parallel.bind(program, group, axis={axis!r})"
        )
    if place.degree != degree:
        raise FtcError(f"this graph runs on {degree} ranks of axis {axis!r}, but the group it is bound to has {place.degree}")
    return place

"""A grid of a pass's options, as it is written on the command line: `cache=0.25,0.5` for each axis."""

import itertools
import tomllib
from collections.abc import Sequence
from typing import Any

from ftc.errors import FtcError
from ftc.rewrite.registry import _split, make

Options = dict[str, Any]


def pass_of(text: str) -> tuple[str, Options]:
    """The one pass that `text` names and the options that it gives it, `gqa-to-mla{rotation=real}`. Raises FtcError for several."""
    named = _split(text)
    if len(named) != 1:
        raise FtcError(f"--pass {text!r} names {len(named)} passes; a sweep runs one: put others before it with `ftc rewrite`")
    return named[0]


def axes_of(grid: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each axis, in order. Raises FtcError for what cannot be read, an axis without values, and what stands twice."""
    axes: dict[str, list[Any]] = {}
    for text in grid:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name or not values.strip():
            raise FtcError(f"--grid {text!r} is no axis; write option=value,value, as in --grid cache=0.25,0.5")
        if name in axes:
            raise FtcError(f"--grid {name} stands there twice; write all of its values after one")
        found = [_value(part.strip()) for part in values.split(",") if part.strip()]
        for value in found:
            if sum(type(value) is type(other) and value == other for other in found) > 1:
                raise FtcError(f"--grid {text!r}: {value} stands there twice")
        axes[name] = found
    if not axes:
        raise FtcError("a sweep needs an axis; write --grid option=value,value")
    return axes


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def points_of(name: str, fixed: Options, axes: dict[str, list[Any]]) -> list[tuple[Options, str | None]]:
    """Every point of the grid with the reason why the pass cannot be made with its options, or None.

    Raises FtcError where that is so of every point, and for an axis that the pass's own options settle already.
    """
    for option in axes:
        if option in fixed:
            raise FtcError(f"--pass settles {option} = {fixed[option]!r}, and --grid varies it; leave it out of one of them")
    points, errors = [], []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        try:
            make(name, fixed | point)
            points.append((point, None))
        except FtcError as error:
            points.append((point, str(error)))
            errors.append(error)
    if len(errors) == len(points):
        raise errors[0]
    return points

"""Numbers that change over a run: a constant, or points [[fraction of the run, value], ...] joined by straight lines.

Two points at one fraction are a step: [[0, 0.3], [0.67, 0.3], [0.67, 0.1]] is 0.3 for two thirds of the run, then 0.1.
"""

from collections.abc import Sequence

from ftc.errors import FtcError

Scheduled = float | list  # the type of a number that may follow a schedule


def check_schedule(value: object, name: str) -> None:
    """FtcError unless `value` is a number or a list of points whose fractions rise within 0 and 1."""
    if _is_number(value):
        return
    right = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    right = right and all(isinstance(p, Sequence) and len(p) == 2 and all(map(_is_number, p)) for p in value)
    if not right:
        raise FtcError(f"{name} = {value!r} is neither a number nor a list of points [fraction of the run, value]")
    fractions = [point[0] for point in value]
    if fractions != sorted(fractions) or not 0 <= fractions[0] <= fractions[-1] <= 1:
        raise FtcError(f"{name} = {value!r}: the fractions of the run must rise from 0 to 1")


def at(value: Scheduled, progress: float) -> float:
    """The value when the fraction `progress` of the run is done; before the first point its value, after the last the last's."""
    if _is_number(value):
        return float(value)
    before = [point for point in value if point[0] <= progress]
    after = [point for point in value if point[0] > progress]
    if not before or not after:
        return float((before[-1] if before else after[0])[1])
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

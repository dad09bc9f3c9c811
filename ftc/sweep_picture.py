"""A sweep as a page: quality against cache bytes and against latency, in SVG, with the table below; in light and dark."""

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ftc.charts import legend, nice_ticks
from ftc.files import atomic_write
from ftc.report_parts import section, table
from ftc.sweep import Point, text_of, written

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _FOOT = 960, 380, 84, 24, 20, 52
_COLOURS = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")
_SMALLEST = 1e-6  # nats a token: less is nothing, and stands below the logarithmic scale
COLUMNS = ("elements", "bytes", "of the original", "KL, nats a token", "forward, ms", "decode step, ms")


def write_page(path: Path, title: str, about: str, points: Sequence[Point], axes: dict[str, list]) -> None:
    """Write the page to `path`, an .html file, in one step. `points`: the original first."""
    done = [point for point in points[1:] if not point.skipped]
    parts = [f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>"]
    original = points[0]
    panels = [("Quality against cache", "cache bytes a token and layer", lambda p: p.cache_bytes, True)]
    if original.forward_ms is not None:
        panels.append(("Quality against the time of a decode step", "decode step, ms", lambda p: p.decode_ms, False))
        panels.append(("Quality against the time of a forward", "forward, ms", lambda p: p.forward_ms, False))
    for heading, unit, value, joined in panels:
        shown = [point for point in done if value(point) is not None]
        if shown:
            mark = "" if value(original) is None else f" The dashed line is the original: {value(original):,.4g}."
            parts.append(section(heading, f"KL(original || rewritten) on text apart, nats a token, lower is better.{mark}", panel(shown, original, axes, unit, value, joined)))
    rows = rows_of(points, list(axes))
    note = "Elements and bytes of the cache, a token and layer, the mean of all layers."
    parts.append(section("All points", note, table((*axes, *COLUMNS), rows, right=range(len(axes), len(axes) + len(COLUMNS)))))
    notes = [(text_of(p.options), p.skipped or f"no decode step was timed: {p.decode_note}") for p in points if p.skipped or p.decode_note]
    if notes:
        parts.append(section("Skipped", "Points that are not possible, and what could not be measured.", table(("point", "reason"), notes)))
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    atomic_write(path, Template(template).substitute(title=escape(title), body="\n".join(parts)))


def rows_of(points: Sequence[Point], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of the table: the options' values, then COLUMNS."""
    original, rows = points[0], []
    for point in points:
        values = [written(point.options.get(name, "original" if not n and not point.options else "")) for n, name in enumerate(names)]
        if point.skipped:
            rows.append((*values, "", "", "", "skipped", "", ""))
            continue
        share = f"{point.cache_bytes / original.cache_bytes:.1%}"
        times = ["" if t is None else f"{t:.2f}" for t in (point.forward_ms, point.decode_ms)]
        rows.append((*values, f"{point.cache_elements:,.4g}", f"{point.cache_bytes:,.4g}", share, _kl(point.kl), *times))
    return rows


def _kl(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def along_axis(axes: dict[str, list]) -> str | None:
    """The axis with most values that are all numbers: lines go along it."""
    numeric = [name for name, values in axes.items() if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)]
    return max(numeric, key=lambda name: len(axes[name]), default=None)


def series_of(points: Sequence[Point], axes: dict[str, list]) -> dict[str, list[Point]]:
    """Lines: points that differ only in `along_axis`; named by their other options."""
    along = along_axis(axes)
    lines: dict[str, list[Point]] = {}
    for point in points:
        name = ", ".join(f"{k} = {written(v)}" for k, v in point.options.items() if k != along)
        lines.setdefault(name or str(along), []).append(point)
    return lines


def panel(points: Sequence[Point], original: Point, axes: dict[str, list], unit: str, value: Callable[[Point], float | None], joined: bool) -> str:
    """One chart as SVG: KL on a logarithmic scale against `value`, a dot for each point, hover for what it is; lines along an axis where `joined`."""
    level = value(original)
    xs = [value(point) for point in points] + ([level] if level is not None else [])
    ticks = nice_ticks(min(xs), max(xs))
    levels = kl_levels([point.kl for point in points if point.kl > _SMALLEST] or [1.0])
    nothing = levels[0] ** 2 / levels[1] if any(point.kl <= _SMALLEST for point in points) else None
    low, high = math.log10(nothing or levels[0]), math.log10(levels[-1])
    along = along_axis(axes)

    def x(number: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (number - ticks[0]) / ((ticks[-1] - ticks[0]) or 1)

    def y(kl: float) -> float:
        scaled = math.log10(kl) if kl > _SMALLEST else low
        return _HEIGHT - _FOOT - (_HEIGHT - _TOP - _FOOT) * (scaled - low) / (high - low)

    lines = series_of(points, axes)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='KL against {escape(unit)}' "
        "style='width:100%;height:auto;font:13px system-ui,sans-serif'>",
        *_axes(x, y, ticks, [*([] if nothing is None else [0.0]), *levels], unit),
    ]
    if level is not None:
        parts.append(
            f"<line x1='{x(level):.1f}' x2='{x(level):.1f}' y1='{_TOP}' y2='{_HEIGHT - _FOOT}' style='stroke:var(--soft);stroke-dasharray:5 4'/>"
            f"<text x='{x(level) - 6:.1f}' y='{_TOP + 12}' text-anchor='end' style='fill:var(--soft)'>original</text>"
        )
    for number, line in enumerate(lines.values()):
        colour, ordered = _COLOURS[number % len(_COLOURS)], sorted(line, key=value)
        path = "L".join(f"{x(value(p)):.1f} {y(p.kl):.1f}" for p in ordered if p.kl > _SMALLEST)
        if joined and path:
            parts.append(f"<path d='M{path}' style='fill:none;stroke:var({colour});stroke-width:2;opacity:0.6'/>")
        for point in ordered:
            words = escape(f"{text_of(point.options)}: {_kl(point.kl)} nats a token at {value(point):,.4g} ({unit})")
            parts.append(f"<circle cx='{x(value(point)):.1f}' cy='{y(point.kl):.1f}' r='5' style='fill:var({colour})'><title>{words}</title></circle>")
            if along is not None:
                at = f"x='{x(value(point)) + 9:.1f}' y='{y(point.kl) - 7:.1f}'"
                parts.append(f"<text {at} style='fill:var({colour});font-size:12px'>{escape(written(point.options[along]))}</text>")
    names = [(_COLOURS[number % len(_COLOURS)], name) for number, name in enumerate(lines)]
    return (legend(names) if len(lines) > 1 else "") + "".join(parts) + "</svg>"


def kl_levels(values: Sequence[float]) -> list[float]:
    """Levels 1, 2 and 5 times powers of ten that enclose the values; powers of ten alone where those are more than eight."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    steps = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= min(values) * (1 + 1e-9))
    last = max(min(i for i, step in enumerate(steps) if step >= max(values) * (1 - 1e-9)), first + 1)
    if last - first <= 8:
        return steps[first : last + 1]
    return [float(f"1e{power}") for power in range(low, high + 1)]


def _axes(x: Callable, y: Callable, ticks: Sequence[float], levels: Sequence[float], unit: str) -> list[str]:
    parts = []
    for level in levels:
        at = y(level)
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{at:.1f}' y2='{at:.1f}' style='stroke:var(--line)'/>"
            f"<text x='{_LEFT - 10}' y='{at + 4:.1f}' text-anchor='end' style='fill:var(--soft)'>{level:g}</text>"
        )
    for tick in ticks:
        parts.append(f"<text x='{x(tick):.1f}' y='{_HEIGHT - _FOOT + 20}' text-anchor='middle' style='fill:var(--soft)'>{tick:,g}</text>")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - 10}' text-anchor='middle' style='fill:var(--soft)'>{escape(unit)}</text>")
    parts.append(
        f"<text transform='translate(16 {(_HEIGHT - _FOOT + _TOP) / 2}) rotate(-90)' text-anchor='middle' style='fill:var(--soft)'>KL, nats a token</text>"
    )
    return parts

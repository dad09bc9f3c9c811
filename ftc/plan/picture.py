"""What the planner found as one self-contained page: Gantt charts and memory over time of each rank, in SVG, in light and dark.

    F forward    B whole backward    I gradients of inputs    W gradients of weights    F&B a forward of one microbatch with a backward of another
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ftc.charts import legend

KINDS = {"F": ("--c1", "forward"), "B": ("--c2", "whole backward"), "I": ("--c3", "gradients of inputs"), "W": ("--c5", "gradients of weights")}
PAIR = "F&B"
_WIDTH, _LEFT, _TOP, _ROW, _GAP, _FOOT = 1180, 62, 30, 26, 6, 34
_LETTER = 6.2  # width of a digit of 10 px, about
_STYLE = "font: 12px system-ui, sans-serif"
_RANK_COLOURS = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")
_LEGIBLE_ROWS = 16  # ranks of memory that are told apart by lines of their own


@dataclass(frozen=True)
class Bar:
    """One action on one rank. Seconds; `second` is the backward's (kind, stage, microbatch) where a pair runs as one."""

    rank: int
    start: float
    end: float
    kind: str
    stage: int
    microbatch: int
    second: tuple[str, int, int] | None = None

    @property
    def words(self) -> str:
        """What hovering shows."""
        own = f"{self.kind} of microbatch {self.microbatch}, stage {self.stage}"
        other = "" if self.second is None else f" with {self.second[0]} of microbatch {self.second[2]}, stage {self.second[1]}"
        return f"{own}{other}: {seconds_text(self.start)} to {seconds_text(self.end)}"


def seconds_text(value: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size or unit == "µs":
            return f"{value / size:.3g} {unit}"
    raise AssertionError


def bytes_text(value: float) -> str:
    """A size in the binary unit that suits it."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(max(value, 1))) // 10, len(units) - 1)
    return f"{value / 2 ** (10 * power):,.3g} {units[power]}"


def gantt(bars: Sequence[Bar], title: str, until: float | None = None) -> str:
    """A lane for each rank, a rectangle for each action; what is left pale is idle. `until`: the end of the time axis, seconds."""
    ranks = 1 + max(bar.rank for bar in bars)
    last = max(until or 0.0, max(bar.end for bar in bars))
    height = _TOP + ranks * (_ROW + _GAP) + _FOOT
    scale = (_WIDTH - _LEFT - 12) / (last or 1.0)
    parts = [_open(height, title), _text(8, 16, title, weight=600)]
    for rank in range(ranks):
        y = _TOP + rank * (_ROW + _GAP)
        parts.append(f"<rect x='{_LEFT}' y='{y}' width='{last * scale:.1f}' height='{_ROW}' fill='var(--faint)'/>")
        parts.append(_text(_LEFT - 8, y + 17, f"rank {rank}", anchor="end", soft=True))
    parts += [_bar(bar, scale) for bar in bars]
    parts += _time_axis(last, scale, _TOP + ranks * (_ROW + _GAP))
    return "".join(parts) + "</svg>"


def _bar(bar: Bar, scale: float) -> str:
    x, y, wide = _LEFT + bar.start * scale, _TOP + bar.rank * (_ROW + _GAP), max((bar.end - bar.start) * scale - 0.6, 0.4)
    halves = [(bar.kind, bar.microbatch, bar.stage, y, _ROW)]
    if bar.second is not None:
        kind, stage, microbatch = bar.second
        halves = [(bar.kind, bar.microbatch, bar.stage, y, _ROW / 2), (kind, microbatch, stage, y + _ROW / 2, _ROW / 2)]
    parts = [f"<g><title>{escape(bar.words)}</title>"]
    for kind, microbatch, stage, top, high in halves:
        shade = 1.0 if stage < 1 + bar.rank else 0.72  # a rank's later stages are paler
        parts.append(f"<rect x='{x:.1f}' y='{top:.1f}' width='{wide:.1f}' height='{high:.1f}' fill='var({KINDS[kind][0]})' fill-opacity='{shade}'/>")
        if wide >= _LETTER * len(str(microbatch)) + 3:
            size = 10 if high > 14 else 9
            parts.append(f"<text x='{x + wide / 2:.1f}' y='{top + high / 2 + 3.4:.1f}' text-anchor='middle' font-size='{size}' fill='#ffffff'>{microbatch}</text>")
    return "".join(parts) + "</g>"


def memory_lines(series: Sequence[Sequence[tuple[float, float]]], title: str, cap: float | None = None) -> str:
    """Bytes over time as steps: a line for each rank of [(seconds, bytes), ...]; of more than 16, the highest and the lowest peak. `cap`: dashed."""
    order = sorted(range(len(series)), key=lambda rank: -max(b for _, b in series[rank]))
    drawn = list(range(len(series))) if len(series) <= _LEGIBLE_ROWS else sorted({order[0], order[-1]})
    last = max(t for line in series for t, _ in line)
    highest = max([b for line in series for _, b in line] + ([cap] if cap else [])) or 1.0
    high, foot = 260, _TOP + 260
    scale = (_WIDTH - _LEFT - 12) / (last or 1.0)
    y = lambda value: foot - (high - 8) * value / highest  # noqa: E731
    parts = [_open(foot + _FOOT, title), _text(8, 16, title, weight=600)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(highest * share)
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - 12}' y1='{at:.1f}' y2='{at:.1f}' stroke='var(--line)'/>{_text(_LEFT - 6, at + 4, bytes_text(highest * share), 'end', True)}")
    for rank in drawn:
        steps = [f"M{_LEFT} {y(series[rank][0][1]):.1f}"]
        for time, value in series[rank]:
            steps.append(f"H{_LEFT + time * scale:.1f}V{y(value):.1f}")
        peak = max(b for _, b in series[rank])
        colour = _RANK_COLOURS[rank % len(_RANK_COLOURS)]
        parts.append(f"<path d='{''.join(steps)}' fill='none' stroke='var({colour})' stroke-width='1.4'><title>rank {rank}: peak {bytes_text(peak)}</title></path>")
    if cap:
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - 12}' y1='{y(cap):.1f}' y2='{y(cap):.1f}' stroke='var(--bad)' stroke-dasharray='6 4'><title>cap {bytes_text(cap)}</title></line>")
    parts += _time_axis(last, scale, foot)
    names = [(_RANK_COLOURS[rank % len(_RANK_COLOURS)], f"rank {rank}, peak {bytes_text(max(b for _, b in series[rank]))}") for rank in drawn]
    return legend(names) + scroll("".join(parts) + "</svg>")


def kinds_legend(bars: Sequence[Bar]) -> str:
    """The colours of what is drawn."""
    there = {bar.kind for bar in bars} | {bar.second[0] for bar in bars if bar.second is not None}
    entries = [(colour, f"{kind}: {words}") for kind, (colour, words) in KINDS.items() if kind in there]
    return legend([*entries, ("--faint", "idle")])


def ratio_bars(values: Mapping[str, float], best: str, unit: str) -> str:
    """One horizontal bar for each schedule, the best in another colour. Values of any unit, smaller is better."""
    left, row = 24 + 7 * max(len(name) for name in values), 20
    most = max(values.values()) or 1.0
    height = 14 + row * len(values)
    parts = [_open(height, f"schedules, {unit}", 760)]
    for index, (name, value) in enumerate(values.items()):
        y, wide = 6 + index * row, (760 - left - 90) * value / most
        colour = "--good" if name == best else "--c0"
        parts.append(f"{_text(left - 8, y + 12, name, 'end', True)}<rect x='{left}' y='{y}' width='{max(wide, 1):.1f}' height='{row - 6}' fill='var({colour})'/>")
        parts.append(_text(left + wide + 6, y + 12, seconds_text(value) if unit == "seconds" else bytes_text(value), soft=True))
    return scroll("".join(parts) + "</svg>")


def scroll(svg: str) -> str:
    """A picture that is scrolled where the page is narrow."""
    return f"<div class='scroll'>{svg}</div>"


def _time_axis(last: float, scale: float, y: float) -> list[str]:
    parts = []
    for step in range(9):
        time = last * step / 8
        anchor = "start" if step == 0 else "end" if step == 8 else "middle"
        parts.append(_text(_LEFT + time * scale, y + 18, seconds_text(time) if step else "0", anchor, True))
    return parts


def _open(height: float, title: str, width: int = _WIDTH) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height:.0f}' viewBox='0 0 {width} {height:.0f}' role='img' "
        f"style='max-width:100%;height:auto;{_STYLE}' aria-label='{escape(title, quote=True)}'>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", soft: bool = False, weight: int = 400) -> str:
    fill = "var(--soft)" if soft else "var(--text)"
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}' fill='{fill}'>{escape(text)}</text>"

"""Cache bytes against context, both by powers of two, as SVG: a line for each model and form, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ftc.files import atomic_write
from ftc.memory.predict import Memory
from ftc.memory.text import label, rows_of
from ftc.report_parts import section, table
from ftc.tasks.picture import check_picture

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _FOOT = 900, 460, 84, 250, 44, 52
_COLOURS = ("#2f6bd8", "#d9682b", "#2e9b6b", "#8a5cc9", "#b8860b", "#c2417f", "#5c6675", "#0f8a9c")
_DARK = ("#6ea5ff", "#ff9a62", "#59cf9b", "#b992f2", "#e0b04a", "#f08bb8", "#9aa4b2", "#54c7d6")
_LEAST = 128  # tokens where the picture begins
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def write_picture(path: str | Path, memories: Sequence[Memory]) -> None:
    """Write the picture to `path`, an .svg file or an .html page with the tables, in one step."""
    check_picture(path)
    svg = picture(memories)
    if Path(path).suffix.lower() == ".svg":
        atomic_write(path, svg + "\n")
        return
    about = "Bytes of the cache for all sequences of the batch, by tokens of each. Whole blocks."
    parts = ["<header><h1>Memory</h1></header>", section("Cache against context", about, svg)]
    for memory in memories:
        columns, rows = rows_of(memory)
        parts.append(section(memory.model, headline(memory), table(columns, rows, right=range(1, len(columns)))))
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    atomic_write(path, Template(template).substitute(title="Memory", body="\n".join(parts)))


def headline(memory: Memory) -> str:
    """A model's attentions and what is asked of it, in words."""
    plan = memory.plan
    tokens = f"{plan.batch:,} x {plan.context:,} tokens in blocks of {plan.block_size}, prompts {plan.chunk:,} tokens a call"
    return f"{memory.kinds}; {str(memory.dtype).removeprefix('torch.')}; {tokens}"


def curves(memories: Sequence[Memory]) -> dict[str, list[tuple[int, int]]]:
    """(context, bytes) of each line, by its name; forms of one size are one line."""
    lines: dict[str, list[tuple[int, int]]] = {}
    for memory in memories:
        named: dict[int, list[str]] = {}
        for form in memory.forms:
            named.setdefault(memory.bytes_per_token(form), []).append(label(memory, form))
        prefix = f"{memory.model}: " if len(memories) > 1 else ""
        for size, names in named.items():
            plan = memory.plan
            points = [(c, size * plan.batch * -(-c // plan.block_size) * plan.block_size) for c in _contexts(plan.context)]
            lines[prefix + " or ".join(dict.fromkeys(names))] = points
    return lines


def _contexts(last: int) -> list[int]:
    least = min(_LEAST, max(1, last // 4))
    return sorted({*(least * 2**k for k in range(int(math.log2(max(last / least, 1))) + 1)), last})


def picture(memories: Sequence[Memory]) -> str:
    """The picture as SVG."""
    lines = curves(memories)
    points = [point for line in lines.values() for point in line]
    first, last = math.log2(min(c for c, _ in points)), math.log2(max(c for c, _ in points))
    low, high = math.floor(math.log2(min(b for _, b in points))), math.ceil(math.log2(max(b for _, b in points)))

    def x(context: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (math.log2(context) - first) / ((last - first) or 1)

    def y(count: float) -> float:
        return _HEIGHT - _FOOT - (_HEIGHT - _TOP - _FOOT) * (math.log2(count) - low) / ((high - low) or 1)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"style='max-width:100%;height:auto' aria-label='Cache bytes against context'><style>{_style()}</style>",
        "<text class='t' x='12' y='24'>Cache of all sequences against tokens of each</text>",
        *_axes(x, y, (first, last), (low, high)),
    ]
    for number, (name, line) in enumerate(lines.items()):
        path = "L".join(f"{x(c):.1f} {y(b):.1f}" for c, b in line)
        parts.append(f"<path class='l k{number % len(_COLOURS)}' d='M{path}'><title>{escape(name)}: {_bytes(line[-1][1])} at {line[-1][0]:,} tokens</title></path>")
    parts += _labels(lines, y)
    return "".join(parts) + "</svg>"


def _axes(x, y, contexts: tuple[float, float], sizes: tuple[int, int]) -> list[str]:
    parts, right = [], _WIDTH - _RIGHT
    step = max(1, math.ceil((sizes[1] - sizes[0]) / 9))
    for power in range(math.ceil(sizes[0] / step) * step, sizes[1] + 1, step):
        at = y(2.0**power)
        parts.append(f"<line class='g' x1='{_LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}'/><text class='s' x='{_LEFT - 8}' y='{at + 4:.1f}' text-anchor='end'>{_bytes(2**power)}</text>")
    step = max(1, math.ceil((contexts[1] - contexts[0]) / 9))
    for power in range(math.ceil(contexts[0]), math.floor(contexts[1]) + 1, step):
        parts.append(f"<text class='s' x='{x(2.0**power):.1f}' y='{_HEIGHT - _FOOT + 20}' text-anchor='middle'>{2**power:,}</text>")
    parts.append(f"<text class='s' x='{(_LEFT + right) / 2}' y='{_HEIGHT - 10}' text-anchor='middle'>tokens of each sequence</text>")
    return parts


def _labels(lines: dict[str, list[tuple[int, int]]], y) -> list[str]:
    """Names at the ends of the lines, moved apart where they would cover each other."""
    places = sorted((y(line[-1][1]), number, name) for number, (name, line) in enumerate(lines.items()))
    parts, lowest = [], _TOP - 14.0
    for at, number, name in places:
        lowest = max(at, lowest + 16)
        parts.append(f"<text class='k{number % len(_COLOURS)}' x='{_WIDTH - _RIGHT + 8}' y='{lowest + 4:.1f}'>{escape(name)}</text>")
    return parts


def _style() -> str:
    def colours(values: Sequence[str]) -> str:
        return "".join(f"path.k{i}{{stroke:{c}}} text.k{i}{{fill:{c}}} " for i, c in enumerate(values))

    base = "text{font:13px system-ui,sans-serif;fill:#1c2330} .t{font-size:15px;font-weight:600} .s{fill:#5c6675;font-size:12px} "
    base += ".g{stroke:#e3e3de} .l{fill:none;stroke-width:2.2} "
    dark = "text{fill:#e6e9ef} .s{fill:#9aa4b2} .g{stroke:#2d323b} "
    return f"{base}{colours(_COLOURS)}@media (prefers-color-scheme: dark){{{dark}{colours(_DARK)}}}"


def _bytes(count: int) -> str:
    unit = min(int(math.log2(max(count, 1))) // 10, len(_UNITS) - 1)
    return f"{count / 2 ** (10 * unit):,.3g} {_UNITS[unit]}"

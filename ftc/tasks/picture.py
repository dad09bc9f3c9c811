"""A grid of accuracies as a picture: a heat map in SVG, by itself or in an HTML page, in light and dark."""

from html import escape
from pathlib import Path

from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.tasks.grid import Grid

SUFFIXES = (".svg", ".html")
_CELL_W, _CELL_H, _LEFT, _TOP, _FOOT = 72, 34, 76, 56, 64
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c2330; } .soft { fill: #5c6675; font-size: 12px; } .title { font-size: 15px; font-weight: 600; }
.cell { stroke: #ffffff; stroke-width: 2; } .dark { fill: #ffffff; } .light { fill: #1c2330; }
@media (prefers-color-scheme: dark) { text { fill: #e6e9ef; } .soft { fill: #9aa4b2; } .cell { stroke: #14181f; } .light { fill: #1c2330; } }
"""


def check_picture(path: str | Path) -> None:
    """FtcError unless `path` ends in a kind of picture that can be written, and its folder is there."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise FtcError(f"--out {path} is neither an .svg nor an .html file; name one")
    if not path.parent.is_dir():
        raise FtcError(f"--out {path}: there is no folder {path.parent}")


def write_picture(path: str | Path, grid: Grid, model: str) -> None:
    """Write the grid to `path`, an .svg or .html file, in one step."""
    check_picture(path)
    svg = picture(grid, model)
    if Path(path).suffix.lower() == ".html":
        title = escape(f"{grid.task}: {model}")
        svg = (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='color-scheme' content='light dark'><title>{title}</title>"
            f"</head><body style='margin:2rem auto;max-width:60rem'>{svg}</body></html>\n"
        )
    atomic_write(path, svg)


def picture(grid: Grid, model: str) -> str:
    """The grid as SVG: columns by length, rows by depth, each cell with its accuracy."""
    width = max(420, _LEFT + _CELL_W * len(grid.lengths) + 16)
    height = _TOP + _CELL_H * len(grid.depths) + _FOOT
    count = f"{grid.num_prompts} prompt{'s' if grid.num_prompts > 1 else ''} a cell, {grid.accuracy:.1%} found in all"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' role='img' "
        f"style='max-width:100%;height:auto' aria-label='{escape(grid.task)}: accuracy by depth and length'><style>{_STYLE}</style>",
        f"<text class='title' x='12' y='22'>{escape(f'{grid.task}: {model}')}</text>",
        f"<text class='soft' x='12' y='42'>{escape(count)}</text>",
    ]
    for row, (depth, accuracies) in enumerate(zip(grid.depths, grid.accuracies, strict=True)):
        y = _TOP + row * _CELL_H
        parts.append(f"<text class='soft' x='{_LEFT - 8}' y='{y + 22}' text-anchor='end'>{depth:.0%}</text>")
        for column, accuracy in enumerate(accuracies):
            x = _LEFT + column * _CELL_W
            length = grid.lengths[column]
            parts.append(
                f"<g><title>{length:,} tokens, depth {depth:.0%}: {accuracy:.1%}</title>"
                f"<rect class='cell' x='{x}' y='{y}' width='{_CELL_W}' height='{_CELL_H}' rx='4' fill='{colour(accuracy)}'/>"
                f"<text class='{'dark' if accuracy > 0.6 else 'light'}' x='{x + _CELL_W / 2}' y='{y + 22}' text-anchor='middle'>{accuracy:.0%}</text></g>"
            )
    foot = _TOP + _CELL_H * len(grid.depths)
    for column, length in enumerate(grid.lengths):
        parts.append(f"<text class='soft' x='{_LEFT + (column + 0.5) * _CELL_W}' y='{foot + 18}' text-anchor='middle'>{length:,}</text>")
    parts.append(f"<text class='soft' x='{_LEFT}' y='{foot + 42}'>tokens; rows: how deep in the text</text></svg>\n")
    return "".join(parts)


def colour(accuracy: float) -> str:
    """From a pale orange at 0 to a deep blue at 1: distinct in print and to colour-blind eyes."""
    stops = ((0.0, (250, 205, 160)), (0.5, (214, 222, 235)), (1.0, (28, 84, 160)))
    for (low, a), (high, b) in zip(stops, stops[1:], strict=False):
        if accuracy <= high:
            share = (accuracy - low) / (high - low)
            return "#" + "".join(f"{round(p + share * (q - p)):02x}" for p, q in zip(a, b, strict=True))
    raise AssertionError(f"{accuracy} is no accuracy")

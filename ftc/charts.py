"""Charts for the report, as self-contained HTML: lines are SVG, labels are HTML so that they keep their size when narrow."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Points = Sequence[Sequence[float]]
_SMOOTHING_POINTS = 12
_SOURCES = ("--c2", "--c3", "--c4", "--c5", "--c6")  # held-out text, by source
_WHOLE = "--text"


def loss_chart(train: Points, sources: Mapping[str, Points], validation: Points = ()) -> str:
    """Training loss with its running mean, a line for each source of held-out text, and dots for all of it; hover for values."""
    train, sources, validation = _finite(train), _curves(sources), _finite(validation)
    if len(train) < 2:
        return '<p class="about">Too few steps were logged to draw a curve.</p>'
    colours = _colours(sources)
    lines = [("raw", "--c1", train), ("smooth", "--c1", _running_mean(train))]
    lines += [("held", colours[name], points) for name, points in sources.items()]
    names = [("--c1", "training, running mean"), *((colours[name], f"held-out: {name}") for name in sources)]
    if validation:
        names.append((_WHOLE, "all of the held-out text"))
    dots = [(colours[name], point) for name, points in sources.items() for point in points]
    dots += [(_WHOLE, point) for point in validation]
    return legend(names) + _plot("Loss", "nats", lines, dots, [])


def validation_chart(sources: Mapping[str, Points], baselines: Mapping[str, float]) -> str:
    """A line of (step, bits per byte) pairs for each source, and dashed in its colour the baseline that it should get below."""
    sources = {name: points for name, points in _curves(sources).items() if len(points) > 1}
    if not sources:
        return '<p class="about">Measured too seldom to draw a curve.</p>'
    colours, names, levels = _colours(sources), [], []
    for name, colour in colours.items():
        baseline = baselines.get(name)
        below = "" if baseline is None else f" (dashed: a smoothed trigram of the same training text, {baseline:.3f})"
        names.append((colour, f"{name}{below}"))
        levels += [] if baseline is None else [(colour, baseline)]
    lines = [("held", colours[name], points) for name, points in sources.items()]
    dots = [(colours[name], point) for name, points in sources.items() for point in points]
    return legend(names) + _plot("Held-out text", "bits per byte", lines, dots, levels)


def _curves(sources: Mapping[str, Points]) -> dict[str, list[Sequence[float]]]:
    return {name: finite for name, points in sources.items() if (finite := _finite(points))}


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each source; after the last they begin again."""
    return {name: _SOURCES[index % len(_SOURCES)] for index, name in enumerate(names)}


def _finite(points: Points) -> list[Sequence[float]]:
    return [point for point in points if math.isfinite(point[1])]


def _plot(
    label: str,
    unit: str,
    lines: Sequence[tuple[str, str, Points]],
    dots: Sequence[tuple[str, Sequence[float]]],
    levels: Sequence[tuple[str, float]],
) -> str:
    """Lines (CSS class, colour, points), dots and horizontal levels (colour, value); hovering shows the first line's values."""
    points = [*(point for _, _, line in lines for point in line), *(point for _, point in dots)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    heights = [y for _, y in points] + [y for _, y in levels]
    y_ticks = nice_ticks(min(heights), max(heights))
    low, high = y_ticks[0], y_ticks[-1]

    def left(step: float) -> str:
        return f"{100 * (step - first) / ((last - first) or 1):.2f}"

    def top(value: float) -> str:
        return f"{100 - 100 * (value - low) / ((high - low) or 1):.2f}"

    def horizontal(kind: str, colour: str, y: float) -> str:
        return f"<line class='{kind}' style='stroke:var({colour})' x1='0' x2='100' y1='{top(y)}' y2='{top(y)}'/>"

    def path(kind: str, colour: str, line: Points) -> str:
        d = "L".join(f"{left(x)} {top(y)}" for x, y in line)
        return f"<path class='{kind}' style='stroke:var({colour})' d='M{d}'/>"

    hover = escape(json.dumps([[x, round(y, 4)] for x, y in lines[0][2]]))
    parts = [
        f"<div class='plot' role='img' aria-label='{label}, {unit} against the step' data-first='{first:g}' "
        f"data-last='{last:g}' data-unit='{unit}' data-points='{hover}'>",
        "<svg viewBox='0 0 100 100' preserveAspectRatio='none'>",
        *(horizontal("grid", "--line", y) for y in y_ticks),
        *(horizontal("level", colour, y) for colour, y in levels),
        *(path(*line) for line in lines),
        "</svg>",
        *(f"<span class='tick y' style='top:{top(y)}%'>{_short(y)}</span>" for y in y_ticks),
        *(
            f"<span class='tick x' style='left:{left(x)}%'>{_short(x)}</span>"
            for x in nice_ticks(first, last)
            if first <= x <= last
        ),
        "<span class='axis'>step</span>",
        *(
            f"<span class='point' style='left:{left(x)}%;top:{top(y)}%;background:var({colour})' "
            f"title='step {x:g}: {y:.3f} {unit}'></span>"
            for colour, (x, y) in dots
        ),
        "</div>",
    ]
    return "".join(parts)


def bar_chart(series: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], digits: int = 2) -> str:
    """Horizontal bars: `series` maps a name to {row: value}; rows in the order in which they first appear."""
    rows = list(dict.fromkeys(row for values in series.values() for row in values))
    largest = max((value for values in series.values() for value in values.values()), default=0) or 1
    parts = ["<div class='bars'>"]
    for row in rows:
        parts.append(f"<div class='name'>{escape(row)}</div><div>")
        for name, values in series.items():
            if row in values:
                parts.append(
                    f"<div class='row' title='{escape(name)}: {values[row]:.4f}'><div class='bar' "
                    f"style='width:calc({values[row] / largest:.4f} * (100% - 4em));background:var({colours[name]})'></div>"
                    f"<span class='amount'>{values[row]:.{digits}f}</span></div>"
                )
        parts.append("</div>")
    return legend([(colours[name], name) for name in series]) + "".join(parts) + "</div>"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Coloured names; an entry is (CSS variable, text)."""
    items = "".join(f"<li><i style='background:var({colour})'></i>{escape(text)}</li>" for colour, text in entries)
    return f"<ul class='legend'>{items}</ul>"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    size = max(1.0, abs(low), abs(high))
    if high - low < 1e-6 * size:  # a flat line still needs a scale
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """The mean over a window centred on each point, narrower towards both ends, so that the curve does not lag."""
    reach = min(_SMOOTHING_POINTS // 2, max(1, len(points) // 16))
    smooth = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = [y for _, y in points[index - near : index + near + 1]]
        smooth.append((x, sum(window) / len(window)))
    return smooth


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"

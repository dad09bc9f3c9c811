"""Charts for the report, as self-contained HTML: lines are SVG, labels are HTML so that they keep their size when narrow."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[Sequence[float]]
_SMOOTHING_POINTS = 12


def loss_chart(train: Points, validation: Points) -> str:
    """A line of (step, loss) pairs with its running mean, and dots for validation; hovering shows the values."""
    train = [point for point in train if math.isfinite(point[1])]
    validation = [point for point in validation if math.isfinite(point[1])]
    if len(train) < 2:
        return '<p class="about">Too few steps were logged to draw a curve.</p>'
    smooth = _running_mean(train)
    xs = [point[0] for point in (*train, *validation)]
    ys = [point[1] for point in (*train, *validation)]
    first, last = min(xs), max(xs)
    y_ticks = nice_ticks(min(ys), max(ys))
    low, high = y_ticks[0], y_ticks[-1]

    def x_of(step: float) -> float:
        return (step - first) / ((last - first) or 1)

    def y_of(loss: float) -> float:
        return 1 - (loss - low) / ((high - low) or 1)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{1000 * x_of(x):.1f} {1000 * y_of(y):.1f}" for x, y in points)

    parts = [
        f"<div class='plot' role='img' aria-label='Training loss against step' data-first='{first:g}' data-last='{last:g}' "
        f"data-points='{escape(json.dumps([[x, round(y, 4)] for x, y in train]))}'>",
        "<svg viewBox='0 0 1000 1000' preserveAspectRatio='none'>",
        *(
            f"<line class='grid' x1='0' x2='1000' y1='{1000 * y_of(y):.1f}' y2='{1000 * y_of(y):.1f}'/>"
            for y in y_ticks
        ),
        f"<path class='raw' d='{path(train)}'/><path class='smooth' d='{path(smooth)}'/></svg>",
        *(f"<span class='tick y' style='top:{100 * y_of(y):.2f}%'>{_short(y)}</span>" for y in y_ticks),
        *(
            f"<span class='tick x' style='left:{100 * x_of(x):.2f}%'>{_short(x)}</span>"
            for x in nice_ticks(first, last)
            if first <= x <= last
        ),
        "<span class='axis'>step</span>",
        *(
            f"<span class='point' style='left:{100 * x_of(x):.2f}%;top:{100 * y_of(y):.2f}%' "
            f"title='validation at step {x:g}: {y:.3f} nats'></span>"
            for x, y in validation
        ),
        "</div>",
    ]
    names = [("--c1", "training, running mean (nats per token)")] + ([("--c2", "validation")] if validation else [])
    return legend(names) + "".join(parts)


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

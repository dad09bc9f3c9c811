"""What `ftc.moe` measured as one self-contained page: heat maps and bars in SVG, tables, in light and dark.

Legend: L layers, D domains, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from torch import Tensor

from ftc.charts import legend
from ftc.moe.ablation import Harm, own_and_others
from ftc.moe.routing import Routing
from ftc.moe.specialisation import Specialisation, co_activation, load_share, random_co_activation, utilisation
from ftc.report_parts import section, table
from ftc.tasks.picture import colour

_COLOURS = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")
_WIDTH = 980  # of a picture over the whole page; labels and cells are laid out within it
_LETTER = 7.2  # width of a letter of 12 px, about
_STYLE = "font: 12px system-ui, sans-serif"
_TOP = 30  # of the cells of a heat map, below its title
_HOVERED = 1024  # cells at most that have words on hover: 100 bytes each
_EXPERTS_DRAWN = 128  # co-activation of more experts has no readable cells


def number_text(value: float, digits: int = 2) -> str:
    """A number for a cell; a dash where there is none."""
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.{digits}f}"


def ratio_colour(value: float, centre: float, most: float) -> str:
    """For a ratio: pale grey-blue at `centre`, deep blue at `most` and more, orange at centre^2 / most and less, in logarithms; "" for NaN."""
    if math.isnan(value):
        return ""
    span = math.log(max(most / centre, 1 + 1e-9))
    place = math.log(max(value, 1e-9) / centre) / span
    return colour(0.5 + 0.5 * max(-1.0, min(1.0, place)))


def amount_colour(value: float, most: float) -> str:
    """For an amount that may be negative: pale at 0, deep blue at `most`, orange at -`most`; "" for NaN."""
    return "" if math.isnan(value) else colour(0.5 + 0.5 * max(-1.0, min(1.0, value / (most or 1.0))))


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, paint: Callable[[float], str], scale: Sequence[tuple[float, str]],
    title: str, across: str, width: int = _WIDTH, digits: int = 2,
) -> str:  # fmt: skip
    """Cells in SVG, numbers in them where they fit, and on hover where there are no more than 1,024. `paint`: colour of a value, "" for none; `scale`: (value,
    label) from low to high for the bar of colours below; `across`: what the columns are. The cell of a NaN is empty."""
    left = 16 + min(220, round(_LETTER * max(len(name) for name in rows)))
    longest = _LETTER * max(len(name) for name in columns)
    cell = max(5.0, min(max(52.0, longest + 10), (width - left - 8) / len(columns)))
    high = 24.0 if cell >= 30 else min(cell, 14.0) if len(rows) > 24 else 14.0
    bottom = _TOP + high * len(rows)
    total = max(left + cell * len(columns) + 8, left + 190, 24 + _LETTER * len(title))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{total:.0f}' height='{bottom + 66:.0f}' viewBox='0 0 {total:.0f} {bottom + 66:.0f}' role='img' "
        f"style='max-width:100%;height:auto;{_STYLE}' aria-label='{escape(title, quote=True)}'>",
        _text(8, 16, title, weight=600),
    ]
    if len(rows) * len(columns) > _HOVERED:
        parts.append(_merged(values, left, cell, high, paint))
    else:
        words = [[f"{row}, {across} {column}: " for column in columns] for row in rows]
        parts.append(_cells(values, words, left, cell, high, paint, digits))
    for r in range(0, len(rows), max(1, math.ceil(13 / high))):
        parts.append(_text(left - 6, _TOP + (r + 0.5) * high + 4, rows[r], anchor="end", soft=True))
    for c in range(0, len(columns), max(1, math.ceil((longest + 4) / cell))):
        parts.append(_text(left + (c + 0.5) * cell, bottom + 14, columns[c], anchor="middle", soft=True))
    parts.append(_text(left, bottom + 31, across, soft=True))
    return "".join(parts) + _colour_bar(left, bottom + 38, paint, scale) + "</svg>"


def _cells(values: Sequence[Sequence[float]], words: Sequence[Sequence[str]], left: float, cell: float, high: float, paint: Callable[[float], str], digits: int) -> str:
    """One rectangle a cell, with `words` and the value on hover, and the value in it where there is room."""
    parts = []
    for r, row in enumerate(values):
        y = _TOP + r * high
        for c, value in enumerate(row):
            x, fill = left + c * cell, paint(value)
            parts.append(
                f"<g><title>{escape(words[r][c] + number_text(value, 4))}</title><rect x='{x:.1f}' y='{y:.1f}' width='{cell - 1:.1f}' "
                f"height='{high - 1:.1f}' fill='{fill or 'var(--faint)'}'/>"
            )
            if cell >= 6 + _LETTER * (2 + digits):
                ink = "var(--soft)" if not fill else "#ffffff" if _is_dark(fill) else "#1c2330"
                parts.append(f"<text x='{x + (cell - 1) / 2:.1f}' y='{y + 16:.1f}' text-anchor='middle' fill='{ink}'>{number_text(value, digits)}</text>")
            parts.append("</g>")
    return "".join(parts)


def _merged(values: Sequence[Sequence[float]], left: float, cell: float, high: float, paint: Callable[[float], str]) -> str:
    """One path for each colour, of which there are as many as 5 bits of each channel tell apart: 20 bytes a cell where a rectangle takes 100."""
    by_colour: dict[str, list[str]] = {}
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            fill = paint(value)
            coarse = "#" + "".join(f"{int(fill[i : i + 2], 16) & 0xF8 | 4:02x}" for i in (1, 3, 5)) if fill else "var(--faint)"
            by_colour.setdefault(coarse, []).append(f"M{left + c * cell:.1f} {_TOP + r * high:.1f}h{cell - 0.5:.1f}v{high - 0.5:.1f}h-{cell - 0.5:.1f}z")
    return "".join(f"<path fill='{fill}' d='{''.join(places)}'/>" for fill, places in by_colour.items())


def _text(x: float, y: float, text: str, anchor: str = "start", soft: bool = False, weight: int = 400) -> str:
    fill = "var(--soft)" if soft else "var(--text)"
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}' fill='{fill}'>{escape(text)}</text>"


def _is_dark(fill: str) -> bool:
    return sum(int(fill[i : i + 2], 16) for i in (1, 3, 5)) < 450


def _colour_bar(x: float, y: float, paint: Callable[[float], str], scale: Sequence[tuple[float, str]]) -> str:
    """The colours from the first value of the scale over the middle one to the last, with labels."""
    (low, _), (middle, _), (high, _) = scale
    steps, wide = 30, 150.0
    ratio = low > 0
    parts = []
    for i in range(steps):
        share = (i + 0.5) / steps
        a, b, t = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
        value = a * (b / a) ** t if ratio else a + t * (b - a)
        parts.append(f"<rect x='{x + wide * i / steps:.1f}' y='{y}' width='{wide / steps + 0.4:.1f}' height='8' fill='{paint(value)}'/>")
    for place, anchor, (_, label) in zip((0, 0.5, 1), ("start", "middle", "end"), scale, strict=True):
        parts.append(_text(x + wide * place, y + 22, label, anchor=anchor, soft=True))
    return "".join(parts)


def bars(values: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], *, title: str, unit: str, width: int = 460) -> str:
    """Groups of horizontal bars in SVG around a zero line: {group: {bar: value}}; `colours`: CSS variable of each bar's name."""
    numbers = [v for group in values.values() for v in group.values() if math.isfinite(v)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    left, right, row = 16 + min(200, round(_LETTER * max(len(name) for name in values))), 64, 15
    scale = (width - left - right) / ((high - low) or 1)
    zero, parts, y = left - low * scale, [_text(8, 16, f"{title}, {unit}", weight=600)], 30
    for group, found in values.items():
        parts.append(_text(left - 6, y + row * len(found) / 2 + 4, group, anchor="end", soft=True))
        for name, value in found.items():
            size = value * scale if math.isfinite(value) else 0.0
            x = min(zero, zero + size)
            parts.append(
                f"<g><title>{escape(f'{group}, {name}: {number_text(value, 4)} {unit}')}</title><rect x='{x:.1f}' y='{y + 2}' width='{max(abs(size), 1):.1f}' "
                f"height='{row - 4}' fill='var({colours[name]})'/>{_text(max(zero, zero + size) + 5, y + 11.5, number_text(value, 4), soft=True)}</g>"
            )
            y += row
        y += 10
    line = f"<line x1='{zero:.1f}' x2='{zero:.1f}' y1='26' y2='{y - 6}' stroke='var(--soft)'/>"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{y}' viewBox='0 0 {width} {y}' role='img' "
    return f"{head}style='max-width:100%;height:auto;{_STYLE}' aria-label='{escape(title, quote=True)}'>{''.join(parts)}{line}</svg>"


def page(
    model: str, routings: Mapping[str, Routing], found: Specialisation, random: Specialisation, harm: Harm | None = None, saturation: Tensor | None = None
) -> str:
    """The page as HTML. `routings` by domain; `random`: the numbers of the same text through a random router; `saturation` [L]."""
    together = sum(list(routings.values())[1:], next(iter(routings.values())))
    facts = {
        "layers with experts": len(together.layers),
        "experts": together.num_experts,
        "experts a token": f"{float(together.chosen.mean()):.3g}",
        "tokens": ", ".join(f"{name} {int(r.tokens[0]):,}" for name, r in routings.items()),
    }
    items = "".join(f"<li>{escape(name)} <b>{escape(str(value))}</b></li>" for name, value in facts.items())
    body = [f"<header><h1>{escape(f'Experts of {model}')}</h1><ul class='meta'>{items}</ul></header>"]
    body += [loads(together, saturation), domains(found, random)]
    if harm is not None:
        body.append(harms(harm))
    if float(together.chosen.max()) > 1:
        body.append(pairs(together))
    body.append("<footer>Written by ftc. This page loads nothing from anywhere.</footer>")
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"Experts of {model}"), body="\n".join(body))


def loads(routing: Routing, saturation: Tensor | None) -> str:
    """Load of each expert over the mean load, by layer, and the utilisation as a table."""
    about = "How much work each expert gets, all domains together. 1 is an even share of the slots; dead experts had no token at all."
    values = (load_share(routing) * routing.num_experts).tolist()
    names = [str(e) for e in range(routing.num_experts)]
    drawn = heat_map(
        values, routing.layers, names, paint=lambda v: ratio_colour(v, 1.0, 4.0), scale=_ratios(1.0, 4.0), title="Load of an expert over the mean load of its layer",
        across="expert",
    )  # fmt: skip
    head = ["layer", "MaxVio", "entropy", "dead", "confidence", "unfilled slots"] + ["agrees with earlier"] * (saturation is not None)
    rows = []
    for layer, (name, row) in enumerate(utilisation(routing).items()):
        cells = [name, *(number_text(row[key], 3) for key in ("max_violation", "entropy")), ", ".join(map(str, row["dead"])) or "none"]
        cells += [number_text(row["confidence"], 3), f"{row['unfilled']:.1%}"] + ([] if saturation is None else [f"{float(saturation[layer]):.1%}"])
        rows.append(cells)
    note = (
        "<p class='about'>MaxVio: largest load over the mean, less 1. Entropy: of the load shares, over log E; 1 is even. Confidence: mean over tokens of the "
        "router's largest probability.</p>"
    )
    return section("Load", about, _scroll(drawn) + table(head, rows, right=(1, 2, 4, 5, 6)) + note)


def domains(found: Specialisation, random: Specialisation) -> str:
    """Shares of the domains over chance: a summary by layer, then every expert of every layer."""
    most = max(2.0, float(found.most_over_chance.max()))
    about = (
        "How much more often a domain's tokens choose an expert than k/E of the time. 1 is chance; an oracle that divides the experts among the domains "
        f"gives {number_text(float(found.oracle.max()))}. A random router run on the same tokens shows what sampling alone gives."
    )
    paint = lambda v: ratio_colour(v, 1.0, most)  # noqa: E731
    summary = heat_map(
        found.most_over_chance.tolist(), found.layers, found.domains, paint=paint, scale=_ratios(1.0, most), title="Each domain's most-used expert, times chance",
        across="domain",
    )  # fmt: skip
    head = ("layer", "information, nats", "random router", "oracle", "most over chance", "random router", "oracle")
    rows = [
        (name, f"{float(found.information[i]):.4f}", f"{float(random.information[i]):.4f}", f"{math.log(float(found.oracle[i])):.4f}",
         f"{float(found.most_over_chance[i].max()):.2f}", f"{float(random.most_over_chance[i].max()):.2f}", f"{float(found.oracle[i]):.2f}")
        for i, name in enumerate(found.layers)
    ]  # fmt: skip
    names = [str(e) for e in range(found.share.shape[-1])]
    half = _WIDTH if len(names) > 16 else 480
    maps = [
        heat_map(found.over_chance[i].tolist(), found.domains, names, paint=paint, scale=_ratios(1.0, most), title=f"{name}: share over chance", across="expert", width=half)
        for i, name in enumerate(found.layers)
    ]
    note = "<p class='about'>Information: what the choice of an expert says about the domain, and the other way round; domains weigh alike.</p>"
    return section("Domains", about, _scroll(summary) + table(head, rows, right=range(1, 7)) + note + _grid(maps))


def harms(harm: Harm) -> str:
    """What the loss of a domain's own experts does to every domain."""
    about = (
        "Increase of the cross-entropy when a domain's own experts are knocked out: their slots go to nothing, the token's other weights grow to the same sum. "
        "A domain's own expert is the one that it uses most beyond the mean of the others. Specialised experts harm their own domain alone."
    )
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(harm.domains)}

    def groups(values: Tensor) -> dict[str, dict[str, float]]:
        return {f"without {name}'s": dict(zip(harm.domains, row, strict=True)) for name, row in zip(harm.domains, values.tolist(), strict=True)}

    drawn = [
        bars(groups(harm.every), colours, title="Own experts of all layers at once", unit="nats"),
        bars(groups(harm.one.mean(0)), colours, title="One layer at a time, mean of the layers", unit="nats"),
        bars({"random": dict(zip(harm.domains, harm.random.tolist(), strict=True))}, colours, title="A random router in all layers", unit="nats"),
    ]
    own = own_and_others(harm.one)[0]
    most = float(own.abs().max())
    by_layer = heat_map(
        own.tolist(), harm.layers, harm.domains, paint=lambda v: amount_colour(v, most), scale=[(-most, f"{-most:.2g}"), (0.0, "0"), (most, f"{most:.2g}")],
        title="Harm to a domain without its own expert of one layer, nats", across="domain", digits=3,
    )  # fmt: skip
    return section("Harm without own experts", about, legend([(c, name) for name, c in colours.items()]) + _grid(drawn) + _scroll(by_layer))


def pairs(routing: Routing) -> str:
    """Which experts are chosen together, by layer."""
    even = random_co_activation(float(routing.chosen.max()), routing.num_experts)
    about = (
        "How often a token chooses both experts of a pair, over what two independent choices would give. Even draws of different experts give "
        f"{number_text(even)}: the middle of the colours."
    )
    if routing.num_experts > _EXPERTS_DRAWN:
        rows = [(n, "none" if (p := u["strongest_pair"]) is None else f"{p['experts'][0]} and {p['experts'][1]}", number_text(p["over_independence"]) if p else "–")
                for n, u in utilisation(routing).items()]  # fmt: skip
        return section("Co-activation", about, table(("layer", "strongest pair", "over independence"), rows, right=(2,)))
    names, half = [str(e) for e in range(routing.num_experts)], 480 if routing.num_experts <= 64 else _WIDTH
    maps = [
        heat_map(values.tolist(), names, names, paint=lambda v: ratio_colour(v, even, 4 * even), scale=_ratios(even, 4 * even), title=f"{name}: pairs over independence",
                 across="expert", width=half)
        for name, values in zip(routing.layers, co_activation(routing), strict=True)
    ]  # fmt: skip
    return section("Co-activation", about, _grid(maps))


def _ratios(centre: float, most: float) -> list[tuple[float, str]]:
    return [(value, f"{value:.2g}") for value in (centre * centre / most, centre, most)]


def _scroll(svg: str) -> str:
    return f"<div class='scroll'>{svg}</div>"


def _grid(pictures: Sequence[str]) -> str:
    cells: Any = "".join(f"<div class='scroll'>{svg}</div>" for svg in pictures)
    return f"<div style='display:flex;flex-wrap:wrap;gap:18px 28px;margin-top:16px'>{cells}</div>"

"""The pieces that the report's sections are made of: sections, tables, and looking into what stages stored."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Stages = Sequence[Mapping[str, Any]]


class Raw(str):
    """A table cell that is HTML already."""


def section(title: str, about: str, content: str) -> str:
    lead = f"<p class='about'>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, value: Any) -> str:
        style = " class='num'" if index in right else ""
        return f"<{tag}{style}>{value if isinstance(value, Raw) else escape(str(value))}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(cell("td", index, value) for index, value in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def each(stages: Stages, key: str) -> list[Any]:
    return [stage["report"][key] for stage in stages if key in stage["report"]]


def titled(title: str, stage: Mapping[str, Any], stages: Stages, key: str) -> str:
    return title if len(each(stages, key)) == 1 else f"{title}: {stage['name']}"


def number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

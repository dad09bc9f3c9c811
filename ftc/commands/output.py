"""What the commands print: tables for people, one JSON document for scripts, errors as one paragraph."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any


@cache
def console(stderr: bool = False):
    """rich's console; `stderr` for everything that is not the command's result."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line about progress, on stderr."""
    console(stderr=True).print(text)


@contextlib.contextmanager
def working(shown: bool = True) -> Iterator[Callable[[str], None]]:
    """A function that says what is being done now, beside a spinner on stderr that goes when it is done.

    Silent where nobody looks on (stderr is no terminal), and with `shown` false.
    """
    screen = console(stderr=True)
    if not shown or not screen.is_terminal:
        yield lambda text: None
        return
    with screen.status("") as status:
        from rich.markup import escape

        yield lambda text: status.update(escape(text))


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON lacks (nan, infinities) becomes null."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with mappings, sequences and numbers only, and null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, right: Sequence[int] = ()
) -> None:
    """Print a table; `right` are the indices of right-aligned (number) columns. Cells are plain text, never markup."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    console().print(drawn)


def error_text(value: Any) -> str:
    """A measured error as text: `bitwise` zero is 0, unknown is a dash."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def count_text(number: float) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def bytes_text(count: int) -> str:
    """Bytes as MiB, or as GiB from one on."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def seconds_text(seconds: float) -> str:
    """61.2 as 1 min 01 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"

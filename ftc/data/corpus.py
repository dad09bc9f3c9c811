"""The data a run trains on: a path, or `stdlib`, the Python standard library's own source and docstrings.

`stdlib` is real text that every machine with Python has, so the quickstart needs no download.
"""

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ftc.data.sources import Document, read_documents, split_documents
from ftc.errors import FtcError

STDLIB = "stdlib"
# Left out: what is not part of every installation (tests, idle, installed packages), what newer versions dropped, and two
# that would swamp the rest: encodings/ (tables of code points) and pydoc_data/ (one generated file of 750 KB).
_SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__ test tests idle_test idlelib lib2to3 distutils turtledemo ensurepip encodings pydoc_data "
        "site-packages dist-packages"
    ).split()
)


def documents(data: str | Path) -> Iterator[Document]:
    """The documents of `data`: a file, a folder, or the name `stdlib`."""
    return stdlib_documents() if str(data) == STDLIB else read_documents(data)


def load_split(
    data: str | Path, validation: str | Path | None = None, fraction: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """Train and validation documents: `validation` as its own source, or held out of `data` by whole file.

    Raises FtcError when no training text is left.
    """
    if validation:
        train, held_out = list(documents(data)), list(documents(validation))
    else:
        train, held_out = split_documents(documents(data), fraction)
    if not train:
        raise FtcError(f"{data} leaves no training text beside the validation files; lower the validation fraction")
    return train, held_out


def stdlib_documents(root: str | Path | None = None) -> Iterator[Document]:
    """The standard library's .py files, named by their path below it, in sorted order."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    found = False
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        folders = file.relative_to(root).parts[:-1]
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            continue
        try:
            with tokenize.open(file) as source:  # honours a file's coding line
                text = source.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # some distributions ship a few template files that are not Python
        if text.strip():
            found = True
            yield Document(text, file.relative_to(root).as_posix())
    if not found:
        raise FtcError(f"the Python at {root} ships without its source; give `data` a file or folder of text instead")

"""The data a run trains on: files, a Hugging Face dataset, or `stdlib`, the Python standard library's own source.

`stdlib` is real text that every machine with Python has, so the quickstart needs no download.
"""

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ftc.data.huggingface import PREFIX, HuggingFaceDataset
from ftc.data.sources import Document, Files, Place, Record, good_documents, local_files
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


class Corpus(Protocol):
    """Records in an order that can be read again from any place in it."""

    title: str

    def read(self, start: Place = None) -> Iterator[tuple[Record, Place]]:
        """Every record in the corpus's own order from `start` (None: the first), and the place after each."""

    def shuffled(self, seed: int, epoch: int, start: Place = None) -> Iterator[tuple[Record, Place]]:
        """The same records in an order of the files that (seed, epoch) decides; places hold for these two only."""

    def identity(self) -> str:
        """A text that changes when the corpus is seen to have changed, without reading it."""


def open_corpus(
    path: str | Path, *, subset: str = "", split: str = "train", column: str = "", streaming: bool = False
) -> Corpus:
    """The corpus at `path`: a file, a folder, `stdlib`, or `hf:` with the name or folder of a dataset.

    `subset`, `split` and `streaming` are for datasets, `column` for all records. Raises FtcError when it cannot be opened.
    """
    if str(path) == STDLIB:
        return stdlib_files()
    if str(path).startswith(PREFIX):
        return HuggingFaceDataset(str(path), subset, split, column, streaming)
    return local_files(path, column)


def documents(data: str | Path) -> Iterator[Document]:
    """The documents of `data`, which `open_corpus` opens. Raises FtcError for a bad record, or when there is no text."""
    corpus = open_corpus(data)
    return good_documents((record for record, _ in corpus.read()), corpus.title)


def stdlib_files(root: str | Path | None = None) -> Files:
    """The standard library's .py files, named by their path below it, in sorted order."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        folders = file.relative_to(root).parts[:-1]
        if not any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            files.append((file, file.relative_to(root).as_posix()))
    if not files:
        raise FtcError(f"the Python at {root} ships without its source; give `data` a file or folder of text instead")
    return Files(files, _read_source, STDLIB)


def _read_source(file: Path, name: str, start: Place) -> Iterator[tuple[Record, Place]]:
    """One file of Python, by its own coding line; nothing where it cannot be read (some installations ship templates)."""
    if start:
        return
    try:
        with tokenize.open(file) as source:
            text = source.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    if text.strip():
        yield Document(text, name), 1

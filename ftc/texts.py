"""Texts to measure a model on, grouped into named sources."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ftc.errors import FtcError


def texts_of(data: Sequence[str | Path], max_bytes: int | None = None) -> dict[str, list[str]]:
    """The texts of each entry of `data` (a file, a folder or `stdlib`), named by the file's or folder's own name.

    `max_bytes` keeps about that much from the beginning of each source. Raises FtcError for what cannot be read.
    """
    from ftc.data.corpus import documents

    check_data(data)
    sources: dict[str, list[str]] = {}
    for entry in data:
        name = Path(entry).name or str(entry)
        if name in sources:
            name = str(entry)
        sources[name] = first_bytes((document.text for document in documents(entry)), max_bytes)
    return sources


def first_tokens(data: Iterable[str | Path], tokenizer: Any, count: int, opening: int | None = None) -> list[int]:
    """Token ids of the documents of `data`, one after the other, each behind the id `opening` where given, until there are `count` or the text ends."""
    from ftc.data.corpus import documents
    from ftc.data.tokens import text_ids

    ids: list[int] = []
    for document in (document for entry in data for document in documents(entry)):
        ids += ([] if opening is None else [opening]) + text_ids(tokenizer, document.text)
        if len(ids) >= count:
            break
    return ids


def check_data(data: Iterable[str | Path]) -> None:
    """Raise FtcError for the first entry that is neither `stdlib` nor something on disk."""
    for entry in data:
        if str(entry) != "stdlib" and not Path(entry).exists():
            raise FtcError(
                f"there is no data at {entry}; name a txt, md, py, jsonl or parquet file, a folder of them, or stdlib"
            )


def first_bytes(texts: Iterable[str], max_bytes: int | None) -> list[str]:
    """Texts up to a total of `max_bytes` of UTF-8, the last one cut at a character; all of them for None."""
    if max_bytes is None:
        return list(texts)
    kept, left = [], max_bytes
    for text in texts:
        data = text.encode()
        kept.append(data[:left].decode(errors="ignore"))
        left -= len(data)
        if left <= 0:
            break
    return [text for text in kept if text]


def by_folder(documents: Iterable[Any]) -> dict[str, list[int]]:
    """Indices of the documents by the first folder of their names; those in no folder under "(top)"."""
    groups: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        folder, slash, _ = document.name.partition("/")
        groups.setdefault(folder if slash else "(top)", []).append(index)
    return groups

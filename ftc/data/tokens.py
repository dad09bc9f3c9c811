"""Texts as token ids, kept in a folder so that a run can resume from it; what stands before and after each text."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftc.files import atomic_folder

PART_CHARACTERS = 1 << 16  # of a long text that are tokenized at once


def start_id(tokenizer: Any) -> int | None:
    """The id that stands before a text: beginning-of-text, else end-of-text, else None."""
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The text's own ids, without the start token that some tokenizers prepend themselves."""
    ids = list(tokenizer.encode(text)) if text else []
    start = start_id(tokenizer)
    return ids[1:] if ids and start is not None and ids[0] == start else ids


def text_parts(text: str, size: int = PART_CHARACTERS) -> Iterator[str]:
    """Parts of at most `size` characters, cut before white space, after a letter where there is such a place.

    There a byte-level tokenizer cuts too, so that the parts have the ids of the whole.
    """
    start = 0
    while len(text) - start > size:
        middle, end = start + size // 2, start + size
        for before in (r"(?<=\w)[\n ]", r"(?<=\S)\s"):
            cuts = [found.start() for found in re.finditer(before, text[middle:end])]
            if cuts:
                end = middle + cuts[-1]
                break
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass(frozen=True)
class Framing:
    """The ids before and after each text, and those after the last text of all."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    last: tuple[int, ...] = ()
    end: int | None = None  # end-of-text, which a model learns to predict

    @classmethod
    def of_stream(cls, tokenizer: Any) -> "Framing":
        """Texts one after the other: end-of-text between two, then beginning-of-text if that is another token."""
        start, end = start_id(tokenizer), tokenizer.eos_id
        both = end is not None and start != end
        return cls(
            before=() if start is None else (start,),
            after=(end,) if both else (),
            last=() if end is None or both else (end,),
            end=end,
        )

    @classmethod
    def of_documents(cls, tokenizer: Any) -> "Framing":
        """Each text for itself: its beginning and its end."""
        start, end = start_id(tokenizer), tokenizer.eos_id
        return cls(() if start is None else (start,), () if end is None else (end,), (), end)


@dataclass(frozen=True)
class TokenizedText:
    """Documents as ids: `ids` int32 [number of tokens], `lengths` int64 [documents], and the text's size in UTF-8 bytes."""

    ids: np.ndarray
    lengths: np.ndarray
    num_bytes: int

    def documents(self) -> list[np.ndarray]:
        """The ids of each document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    def stream(self, tokenizer: Any) -> np.ndarray:
        """All documents in one int32 array, framed by `Framing.of_stream`."""
        framing = Framing.of_stream(tokenizer)
        parts: list[Any] = []
        for document in self.documents():
            parts += [framing.before, document, framing.after]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in [*parts, framing.last]])


EMPTY = TokenizedText(np.empty(0, np.int32), np.empty(0, np.int64), 0)


def tokenize(tokenizer: Any, texts: Sequence[str], title: str, quiet: bool = True) -> TokenizedText:
    """The ids of `texts`, under a progress bar."""
    from rich.console import Console
    from rich.progress import track

    rows = track(texts, f"tokenize {title}", disable=quiet, console=Console(stderr=True), transient=True)
    parts = [np.asarray(text_ids(tokenizer, text), dtype=np.int32) for text in rows]
    return TokenizedText(
        ids=np.concatenate(parts) if parts else EMPTY.ids,
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        num_bytes=sum(len(text.encode()) for text in texts),
    )


def join(parts: Sequence[TokenizedText]) -> TokenizedText:
    """All documents of `parts`, in order."""
    if len(parts) == 1:
        return parts[0]
    ids, lengths = ([getattr(part, name) for part in parts] for name in ("ids", "lengths"))
    size = sum(part.num_bytes for part in parts)
    return TokenizedText(np.concatenate(ids), np.concatenate(lengths), size) if parts else EMPTY


def store(folder: Path, fingerprint: str, parts: dict[str, TokenizedText]) -> None:
    """Write named tokenized texts to `folder` in one step; each name is a path below it."""
    with atomic_folder(folder, "tokens") as new:
        for name, part in parts.items():
            (new / name).mkdir(parents=True)
            np.save(new / name / "ids.npy", part.ids)
            np.save(new / name / "lengths.npy", part.lengths)
        sizes = {name: part.num_bytes for name, part in parts.items()}
        (new / "key.json").write_text(json.dumps({"fingerprint": fingerprint, "bytes": sizes}) + "\n")


def load(folder: Path, fingerprint: str | None = None) -> dict[str, TokenizedText] | None:
    """What `store` wrote, ids memory-mapped; None when there is nothing or, given a fingerprint, it is of another input."""
    try:
        key = json.loads((folder / "key.json").read_text())
        if fingerprint not in (None, key["fingerprint"]):
            return None
        return {
            name: TokenizedText(_mapped(folder / name / "ids.npy"), np.load(folder / name / "lengths.npy"), size)
            for name, size in key["bytes"].items()
        }
    except (OSError, ValueError, KeyError):
        return None


def _mapped(path: Path) -> np.ndarray:
    """The array in the file, its memory shared by all processes that read it."""
    ids = np.load(path, mmap_mode="r")
    return ids if len(ids) else np.asarray(ids)

"""Texts as one stream of token ids with end-of-text between documents, kept in a folder so that a run can resume from it."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftc.data.corpus import load_split
from ftc.data.sources import Document
from ftc.errors import FtcError
from ftc.files import atomic_write


def start_id(tokenizer: Any) -> int | None:
    """The id that stands before a text: beginning-of-text, else end-of-text, else None."""
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The text's own ids, without the start token that some tokenizers prepend themselves."""
    ids = list(tokenizer.encode(text)) if text else []
    start = start_id(tokenizer)
    return ids[1:] if ids and start is not None and ids[0] == start else ids


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
        """All documents in one int32 array: end-of-text before the first and after each, then beginning-of-text if another."""
        closing = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        opening = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
        parts: list[Any] = [] if opening else [closing]
        for document in self.documents():
            parts += [opening, document, closing]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


@dataclass(frozen=True)
class Prepared:
    """A run's tokenizer and tokenized data; validation is empty when nothing was held out."""

    tokenizer: Any
    tokenizer_folder: Path
    train: TokenizedText
    validation: TokenizedText


def prepare(
    folder: str | Path,
    *,
    data: str = "stdlib",
    validation_data: str = "",
    validation_fraction: float = 0.1,
    tokenizer: str = "",
    vocab_size: int = 4096,
    quiet: bool = True,
) -> Prepared:
    """Read `data`, take or train a tokenizer, and tokenize; what `folder` already holds of the same input is used again.

    Writes `folder`/tokenizer and `folder`/tokens. Raises FtcError for unreadable or empty data.
    """
    from ftc.data.bpe import train_bpe
    from ftc.data.tokenizer import load_tokenizer

    folder = Path(folder)
    train, validation = load_split(data, validation_data, validation_fraction)
    tokenizer_folder = folder / "tokenizer"
    digest = hashlib.sha256()
    for part in (train, validation):
        digest.update(f"{len(part)}\n".encode())
        for document in part:
            digest.update(hashlib.sha256(document.text.encode()).digest())
    if tokenizer:
        digest.update(_copy_tokenizer(Path(tokenizer), tokenizer_folder))
    else:
        digest.update(f"bpe {vocab_size}".encode())
    fingerprint = digest.hexdigest()
    stored = _load(folder / "tokens", fingerprint) if (tokenizer_folder).is_dir() else None
    if stored is None and not tokenizer:
        train_bpe((document.text for document in train), vocab_size, tokenizer_folder, quiet=quiet)
    loaded = load_tokenizer(tokenizer_folder if not tokenizer else _tokenizer_path(tokenizer_folder))
    if stored is None:
        stored = [_tokenize(loaded, part, name, quiet) for part, name in ((train, "train"), (validation, "validation"))]
        _store(folder / "tokens", fingerprint, stored)
    return Prepared(loaded, tokenizer_folder, *stored)


def _tokenizer_path(folder: Path) -> Path:
    return folder / "tokenizer.bin" if (folder / "tokenizer.bin").is_file() else folder


def _copy_tokenizer(source: Path, folder: Path) -> bytes:
    """Copy a tokenizer's files into `folder`; returns the digest of its main file."""
    files = [source] if source.is_file() else [source / "tokenizer.json", source / "tokenizer.bin"]
    main = next((file for file in files if file.is_file()), None)
    if main is None:
        raise FtcError(
            f"there is no tokenizer at {source}; name a tokenizer.json, a tokenizer.bin or a folder with one"
        )
    content = main.read_bytes()
    atomic_write(folder / ("tokenizer.bin" if main.suffix == ".bin" else "tokenizer.json"), content)
    settings = main.with_name("tokenizer_config.json")
    if settings.is_file():
        atomic_write(folder / settings.name, settings.read_bytes())
    return hashlib.sha256(content).digest()


def _tokenize(tokenizer: Any, documents: Sequence[Document], name: str, quiet: bool) -> TokenizedText:
    from rich.console import Console
    from rich.progress import track

    rows = track(documents, f"tokenize {name}", disable=quiet, console=Console(stderr=True), transient=True)
    parts = [np.asarray(text_ids(tokenizer, document.text), dtype=np.int32) for document in rows]
    return TokenizedText(
        ids=np.concatenate(parts) if parts else np.empty(0, np.int32),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        num_bytes=sum(len(document.text.encode()) for document in documents),
    )


def _store(folder: Path, fingerprint: str, parts: Sequence[TokenizedText]) -> None:
    (folder / "key.json").unlink(missing_ok=True)
    for part, name in zip(parts, ("train", "validation"), strict=True):
        buffer = io.BytesIO()
        np.savez(buffer, ids=part.ids, lengths=part.lengths, num_bytes=part.num_bytes)
        atomic_write(folder / f"{name}.npz", buffer.getvalue())
    atomic_write(folder / "key.json", json.dumps({"fingerprint": fingerprint}) + "\n")


def _load(folder: Path, fingerprint: str) -> list[TokenizedText] | None:
    """The stored parts, or None when the folder holds none or those of another input."""
    try:
        if json.loads((folder / "key.json").read_text())["fingerprint"] != fingerprint:
            return None
        parts = []
        for name in ("train", "validation"):
            with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
                parts.append(TokenizedText(stored["ids"], stored["lengths"], int(stored["num_bytes"])))
        return parts
    except (OSError, ValueError, KeyError):
        return None

"""Documents from local files: txt, md, py (a file is a document), jsonl and parquet (a record is a document)."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftc.errors import FtcError

PLAIN = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".parquet")
SUFFIXES = PLAIN + RECORDS


@dataclass(frozen=True)
class Document:
    """One text and the name it is held out by: its file, or the record's own `source` (a book inside a jsonl file)."""

    text: str
    name: str


def read_documents(path: str | Path) -> Iterator[Document]:
    """Every document under `path`, a file or a folder (searched recursively), in the order of the file names.

    Raises FtcError for a missing path, an unknown suffix, an empty source, bytes that are not UTF-8, and a broken record
    (named as file:line).
    """
    path = Path(path)
    if not path.exists():
        raise FtcError(f"there is no data at {path}; name a file or a folder with {', '.join(SUFFIXES)} files")
    found = False
    for file in data_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for document in _read_file(file, name):
            if document.text:
                found = True
                yield document
    if not found:
        raise FtcError(f"{path} holds no text; give a source with at least one non-empty document")


def read_texts(path: str | Path) -> list[str]:
    """The texts of `read_documents(path)` as a list."""
    return [document.text for document in read_documents(path)]


def data_files(path: Path) -> list[Path]:
    """The files that `read_documents(path)` reads; hidden files and folders are left out."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise FtcError(f"{path} has the suffix {path.suffix!r}; readable are {', '.join(SUFFIXES)}")
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise FtcError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return files


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the file `name` belongs to validation: a hash of the name alone, so adding files moves no other one."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_documents(documents: Iterable[Document], fraction: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, split by whole name (file, book), never inside one.

    With at least two names both parts get one; with a single name validation is empty.
    """
    if not 0.0 <= fraction < 1.0:
        raise FtcError(f"the validation fraction is {fraction}; choose one in [0, 1), such as 0.1")
    documents = list(documents)
    names = sorted({document.name for document in documents}, key=lambda name: hashlib.sha256(name.encode()).digest())
    if fraction == 0 or len(names) < 2:
        return documents, []
    held_out = {name for name in names if is_held_out(name, fraction)} or {names[0]}
    if len(held_out) == len(names):
        held_out.discard(names[-1])
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def _read_file(file: Path, name: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _read_jsonl(file, name)
    elif file.suffix == ".parquet":
        yield from _read_parquet(file, name)
    else:
        data = file.read_bytes()
        try:
            yield Document(data.decode("utf-8"), name)
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise FtcError(
                f"{file}:{line}: byte {data[error.start]:#04x} is not UTF-8; convert the file first"
            ) from error


def _read_jsonl(file: Path, name: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise FtcError(
                    f"{file}:{number}: byte {line[error.start]:#04x} is not UTF-8; convert the file first"
                ) from error
            except json.JSONDecodeError as error:
                raise FtcError(f"{file}:{number}: not a JSON record ({error.msg}); mend or remove the line") from error
            yield _from_record(record, name, f"{file}:{number}")


def _read_parquet(file: Path, name: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FtcError(f"reading {file} needs pyarrow: pip install 'ftc[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [column for column in ("text", "messages", "source") if column in table.schema_arrow.names]
        if not {"text", "messages"} & set(wanted):
            raise FtcError(f"{file} has the columns {table.schema_arrow.names}, but none named text or messages")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                yield _from_record(record, name, f"{file}: row {row}")
    except pyarrow.ArrowException as error:
        raise FtcError(f"{file} is not a readable parquet file ({error}); download or write it again") from error


def _from_record(record: Any, name: str, place: str) -> Document:
    if not isinstance(record, dict):
        raise FtcError(f"{place}: the record is a {type(record).__name__}, not an object with text or messages")
    source = record.get("source")
    if isinstance(source, str) and source:
        name = f"{name}#{source}"
    if isinstance(record.get("text"), str):
        return Document(record["text"], name)
    if isinstance(record.get("messages"), list):
        return Document(_join_messages(record["messages"], place), name)
    raise FtcError(f"{place}: the record has the keys {sorted(record)}, but no string `text` and no list `messages`")


def _join_messages(messages: list[Any], place: str) -> str:
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise FtcError(f"{place}: a message needs `role` and `content`, found {message!r:.80}")
        turns.append(f"{message['role']}: {message['content']}")
    return "\n".join(turns)

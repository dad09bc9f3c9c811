"""Documents from local files: txt, md, py (a file is a document), jsonl and parquet (a record is a document).

Reading can begin anywhere: beside each record stands the place where the next one begins. What cannot be read is a record
too, a `BadRecord`, so that a caller decides whether it stops the work or is left out and counted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftc.errors import FtcError

PLAIN = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".parquet")
SUFFIXES = PLAIN + RECORDS
MAX_LINE_BYTES = 16 << 20  # longer lines and records are bad; longer text files are read in parts that end with a line
_TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB; split it, or leave it out"


@dataclass(frozen=True)
class Document:
    """One text and the name it is held out by: its file, or the record's own `source` (a book inside a jsonl file)."""

    text: str
    name: str


@dataclass(frozen=True)
class BadRecord:
    """What stands where a document should: the message names the place, what is wrong, and the remedy."""

    message: str


Record = Document | BadRecord
Place = Any  # JSON-ready: where in a file a reader stands
Reader = Callable[[Path, str, Place], Iterator[tuple[Record, Place]]]  # file, name, where to begin (None: at the start)


class Files:
    """Files as one corpus: each with the name of its documents, and a reader."""

    def __init__(self, files: list[tuple[Path, str]], reader: Reader, title: str):
        self.files, self.reader, self.title = files, reader, title

    def read(self, start: Place = None, order: list[int] | None = None) -> Iterator[tuple[Record, Place]]:
        """Records and the place after each: [number of the file in `order`, place in the file]."""
        first, inside = start or (0, None)
        order = range(len(self.files)) if order is None else order
        for number in range(first, len(order)):
            for record, place in self.reader(*self.files[order[number]], inside):
                yield record, (number, place)
            inside = None

    def shuffled(self, seed: int, epoch: int, start: Place = None) -> Iterator[tuple[Record, Place]]:
        """`read` with the files in an order that (seed, epoch) decides."""
        return self.read(start, np.random.default_rng([seed, epoch]).permutation(len(self.files)).tolist())

    def identity(self) -> str:
        """Changes when a file is added, removed, renamed or changes its size."""
        return json.dumps([[name, file.stat().st_size] for file, name in self.files])


def local_files(path: str | Path, column: str = "") -> Files:
    """The corpus of a file or folder; `column`: the key of a record's text, `text` or `messages` by default."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FtcError(f"there is no data at {path}; name a file or a folder with {', '.join(SUFFIXES)} files")
    names = [(file, file.relative_to(path).as_posix() if path.is_dir() else file.name) for file in data_files(path)]
    return Files(names, lambda file, name, start: _read_file(file, name, start, column), str(path))


def read_documents(path: str | Path) -> Iterator[Document]:
    """Every document under `path`, a file or a folder (searched recursively), in the order of the file names.

    Raises FtcError for a missing path, an unknown suffix, an empty source, bytes that are not UTF-8, a line or record
    longer than 16 MiB, and a broken record (named as file:line).
    """
    return good_documents((record for record, _ in local_files(path).read()), str(path))


def good_documents(records: Iterable[Record], title: str, skipped: list[str] | None = None) -> Iterator[Document]:
    """The documents that hold text. A bad record raises FtcError, or goes into `skipped` where that list is given.

    Raises FtcError when nothing is left.
    """
    found = False
    for record in records:
        if isinstance(record, BadRecord):
            if skipped is None:
                raise FtcError(record.message)
            skipped.append(record.message)
        elif record.text:
            found = True
            yield record
    if not found:
        more = f" ({len(skipped)} bad records were left out, the first: {skipped[0]})" if skipped else ""
        raise FtcError(f"{title} holds no text; give a source with at least one non-empty document{more}")


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


def _read_file(file: Path, name: str, start: Place, column: str) -> Iterator[tuple[Record, Place]]:
    if file.suffix == ".jsonl":
        return _read_jsonl(file, name, start, column)
    if file.suffix == ".parquet":
        return _read_parquet(file, name, start, column)
    return _read_plain(file, name, start)


def _read_plain(file: Path, name: str, start: Place) -> Iterator[tuple[Record, Place]]:
    """The file, in parts of at most MAX_LINE_BYTES that end with a line. Places: (bytes, lines) read so far."""
    offset, line = start or (0, 0)
    with file.open("rb") as source:
        source.seek(offset)
        while data := source.read(MAX_LINE_BYTES):
            if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
                rest = source.read(1)
                source.seek(-len(rest), 1)
                cut = data.rfind(b"\n") + 1
                if rest and not cut:
                    _skip_line(source)
                    offset, line = source.tell(), line + 1
                    yield BadRecord(f"{file}:{line}: the line is {_TOO_LONG}"), (offset, line)
                    continue
                data = data[: cut or None] if rest else data
                source.seek(offset + len(data))
            record = _decoded(data, name, file, line)
            offset, line = offset + len(data), line + data.count(b"\n")
            yield record, (offset, line)


def _decoded(data: bytes, name: str, file: Path, line: int) -> Record:
    try:
        return Document(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n") + 1
        return BadRecord(f"{file}:{line}: byte {data[error.start]:#04x} is not UTF-8; convert the file first")


def _skip_line(source: Any) -> None:
    while (part := source.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _read_jsonl(file: Path, name: str, start: Place, column: str) -> Iterator[tuple[Record, Place]]:
    """One record a line. Places: (bytes, lines) read so far."""
    offset, number = start or (0, 0)
    with file.open("rb") as lines:
        lines.seek(offset)
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(lines)
                offset = lines.tell()
                yield BadRecord(f"{file}:{number}: the line is {_TOO_LONG}"), (offset, number)
                continue
            offset += len(line)
            if line.strip():
                yield _parsed(line, name, f"{file}:{number}", column), (offset, number)


def _parsed(line: bytes, name: str, place: str, column: str) -> Record:
    try:
        return from_record(json.loads(line.decode("utf-8")), name, place, column)
    except UnicodeDecodeError as error:
        return BadRecord(f"{place}: byte {line[error.start]:#04x} is not UTF-8; convert the file first")
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        return BadRecord(f"{place}: not a JSON record ({reason}); mend or remove the line")


def _read_parquet(file: Path, name: str, start: Place, column: str) -> Iterator[tuple[Record, Place]]:
    """One record a row, row group by row group. Places: rows read so far."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FtcError(f"reading {file} needs pyarrow: pip install 'ftc[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        texts = (column,) if column else ("text", "messages")
        wanted = [key for key in (*texts, "source") if key in table.schema_arrow.names]
        if not set(texts) & set(wanted):
            raise FtcError(f"{file} has the columns {table.schema_arrow.names}, but none named {' or '.join(texts)}")
        done, row = start or 0, 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size <= done:
                row += size
                continue
            for batch in table.iter_batches(batch_size=1024, columns=wanted, row_groups=[group]):
                for index in range(batch.num_rows):
                    row += 1
                    if row > done:
                        yield _from_row(batch, index, name, f"{file}: row {row}", column), row
    except pyarrow.ArrowException as error:
        raise FtcError(f"{file} is not a readable parquet file ({error}); download or write it again") from error


def _from_row(batch: Any, index: int, name: str, place: str, column: str) -> Record:
    try:
        record = {key: values[index].as_py() for key, values in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return BadRecord(f"{place}: byte {error.object[error.start]:#04x} is not UTF-8; convert the file first")
    return from_record(record, name, place, column)


def from_record(record: Any, name: str, place: str, column: str = "") -> Record:
    """The document that a record (an object of JSON, a row of a table) describes, or what is wrong with it."""
    if not isinstance(record, dict):
        return BadRecord(f"{place}: the record is a {type(record).__name__}, not an object with text or messages")
    source = record.get("source")
    if isinstance(source, str) and source:
        name = f"{name}#{source}"
    for key in (column,) if column else ("text", "messages"):
        value = record.get(key)
        if isinstance(value, list):
            value = _join_messages(value, place)
        if isinstance(value, BadRecord):
            return value
        if isinstance(value, str):
            return _checked(value, name, place)
    wanted = f"no text or messages in {column!r}" if column else "no string `text` and no list `messages`"
    return BadRecord(f"{place}: the record has the keys {sorted(map(str, record))}, but {wanted}")


def _checked(text: str, name: str, place: str) -> Record:
    """JSON may hold halves of surrogate pairs, which no encoding can write."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return BadRecord(f"{place}: character {text[error.start]!a} is half of a pair; mend or remove the record")
    return Document(text, name) if size <= MAX_LINE_BYTES else BadRecord(f"{place}: the text is {_TOO_LONG}")


def _join_messages(messages: list[Any], place: str) -> str | BadRecord:
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return BadRecord(f"{place}: a message needs `role` and `content`, found {message!r:.80}")
        turns.append(f"{message['role']}: {message['content']}")
    return "\n".join(turns)

"""What a source of training text is: one table of `[[ftc.sources]]`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftc.data.corpus import STDLIB, Corpus, open_corpus
from ftc.data.huggingface import PREFIX
from ftc.errors import FtcError


@dataclass(frozen=True)
class Source:
    """Where text comes from, and how much of it the model is given. Raises FtcError for values that cannot work."""

    path: str
    """A file, a folder, `stdlib`, or `hf:` with the name or folder of a Hugging Face dataset."""
    name: str = ""
    """In reports, results and the run's folder; by default the last part of the path."""
    weight: float = 1.0
    """Its share of the tokens is its weight over the sum of all weights."""
    validation: str = ""
    """A path of its own to validate on; empty: held out of `path` by whole file, or nothing where it is streamed."""
    validation_split: str = ""
    """Of a Hugging Face dataset: the split to validate on; `validation` by default where that names a dataset."""
    subset: str = ""
    """Of a Hugging Face dataset: its configuration."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    column: str = ""
    """The key of a record's text; empty: `text`, or `messages`."""
    streaming: bool = False
    """Read and tokenize while training, for text that is too large to hold."""
    bad_records: Literal["error", "skip"] = "error"
    """What undecodable, broken and enormous records do; those that are left out are counted in the log and the result."""
    max_epochs: int = 0
    """An error where the text would be read more often; 0: as often as the run needs."""

    def __post_init__(self):
        if not self.path:
            raise FtcError("a source has no path; name a file, a folder, stdlib or hf:NAME")
        if not self.name:
            object.__setattr__(self, "name", _default_name(self.path))
        where = f"the source {self.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise FtcError(f"{where}: a name holds letters, digits, '.', '_' and '-'; set another name")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise FtcError(f"{where} has the weight {self.weight}; it must be above zero")
        if self.max_epochs < 0:
            raise FtcError(f"{where} has max_epochs {self.max_epochs}; it must be 0 (no limit) or more")
        for key in ("subset", "split", "validation_split"):
            path = self.validation or self.path if key == "validation_split" else self.path
            if getattr(self, key) != type(self).__dataclass_fields__[key].default and not path.startswith(PREFIX):
                raise FtcError(f"{where} has a {key}, but {path} is no Hugging Face dataset; write '{PREFIX}{path}' for one")

    def corpus(self) -> Corpus:
        """The text to train on, with the validation text of a local source still in it."""
        options = {"subset": self.subset, "split": self.split, "column": self.column}
        return open_corpus(self.path, **options, streaming=self.streaming)

    def validation_corpus(self) -> Corpus | None:
        """The source's own validation text; None where it is held out of `corpus`, or there is none."""
        path = self.validation or (self.path if self.validation_split else "")
        if not path:
            return None
        subset = self.subset if path == self.path else ""
        return open_corpus(path, subset=subset, split=self.validation_split or "validation", column=self.column)


def _default_name(path: str) -> str:
    last = Path(path.removeprefix(PREFIX).rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip(".") or "text"


def check_names(sources: Sequence[Source]) -> None:
    """Raise FtcError where two sources have one name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise FtcError(f"two sources are named {name!r}; give each a name of its own")


def check_sources(sources: Sequence[Source]) -> None:
    """Raise FtcError where two sources have one name, or one names something that is not on disk."""
    check_names(sources)
    for source in sources:
        for path in filter(None, (source.path, source.validation)):
            if path != STDLIB and not path.startswith(PREFIX) and not Path(path).expanduser().exists():
                raise FtcError(f"the source {source.name!r}: there is no data at {path}")


def shares(sources: Sequence[Source]) -> list[float]:
    """Each source's share of the tokens."""
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]

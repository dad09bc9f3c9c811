"""Documents from a Hugging Face dataset: `hf:NAME` from the hub, or `hf:path` of a folder on disk.

A folder may be one that `save_to_disk` wrote, or files that `datasets.load_dataset` reads. With `streaming` nothing is
downloaded or converted as a whole: records arrive one by one, and reading can begin at any of them again.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftc.data.sources import Place, Record, from_record
from ftc.errors import FtcError

PREFIX = "hf:"
_CHUNK = 256  # rows read at once; records between two states of a stream (reading again begins at one, and skips)


class HuggingFaceDataset:
    """One split of a dataset as a corpus. Raises FtcError when it cannot be opened or has no such column."""

    def __init__(self, path: str, subset: str = "", split: str = "train", column: str = "", streaming: bool = False):
        self.path, self.subset, self.split, self.column = path.removeprefix(PREFIX), subset, split, column
        self.title = PREFIX + self.path
        self._dataset = _open(self.path, subset, split, streaming)
        names = self._dataset.column_names
        if names is not None:
            wanted = [name for name in ((column,) if column else ("text", "messages")) if name in names]
            if not wanted:
                looked_for = repr(column) if column else "text or messages"
                raise FtcError(f"{self.title} has the columns {', '.join(names)}, but none named {looked_for}; set column")
            self._dataset = self._dataset.select_columns([*wanted, *({"source"} & set(names) - set(wanted))])

    def read(self, start: Place = None) -> Iterator[tuple[Record, Place]]:
        """Records in the dataset's own order, and the place after each."""
        return self._stream(start) if hasattr(self._dataset, "load_state_dict") else self._rows(start)

    def shuffled(self, seed: int, epoch: int, start: Place = None) -> Iterator[tuple[Record, Place]]:
        """The same: `datasets` cannot resume a stream with shuffled shards exactly."""
        return self.read(start)

    def identity(self) -> str:
        """The dataset's name and split, and its number of rows where that is known."""
        rows = len(self._dataset) if hasattr(self._dataset, "__len__") else None
        return json.dumps([self.path, self.subset, self.split, rows])

    def _rows(self, start: Place) -> Iterator[tuple[Record, Place]]:
        """Places: the number of rows read."""
        for first in range(start or 0, len(self._dataset), _CHUNK):
            columns = self._dataset[first : first + _CHUNK]
            for number, values in enumerate(zip(*columns.values(), strict=True), first + 1):
                yield self._record(dict(zip(columns, values, strict=True)), number), number

    def _stream(self, start: Place) -> Iterator[tuple[Record, Place]]:
        """Places: (a state of the dataset, records read since that state, records read in all)."""
        dataset = copy.deepcopy(self._dataset)
        state, since, number = start or (dataset.state_dict(), 0, 0)
        dataset.load_state_dict(copy.deepcopy(state))
        skipped, number = since, number - since
        since = 0
        for record in dataset:
            number, since = number + 1, since + 1
            if since > skipped:
                yield self._record(record, number), (state, since, number)
            if since == _CHUNK:
                state, since, skipped = copy.deepcopy(dataset.state_dict()), 0, 0

    def _record(self, record: Any, number: int) -> Record:
        return from_record(record, self.title, f"{self.title}: record {number}", self.column)


def _open(path: str, subset: str, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FtcError(f"reading {PREFIX}{path} needs the package datasets: pip install 'ftc[data]'") from error
    folder = Path(path).expanduser()
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    try:
        if not saved:
            place = str(folder) if folder.exists() else path
            return datasets.load_dataset(place, name=subset or None, split=split, streaming=streaming)
        dataset = datasets.load_from_disk(str(folder))  # memory-mapped, so it needs no streaming
        return dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
    except KeyError as error:
        raise FtcError(f"{PREFIX}{path} has no split {split!r}; its splits are {', '.join(dataset)}") from error
    except Exception as error:  # datasets raises many kinds: no network, no such name, split or subset, a broken file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FtcError(f"{PREFIX}{path}, split {split!r}, cannot be opened ({reason[0]})") from error

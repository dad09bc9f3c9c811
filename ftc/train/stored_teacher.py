"""A teacher's likeliest tokens for each place of a token stream, on disk: computed once, read by any number of students.

    index.json              number of tokens, k, temperature, sha256 of the stream, files
    teacher-00000.safetensors   "ids" int32 [n, k], "logprobs" float32 [n, k] for n places; likeliest first

At place i stands what the teacher expects after the tokens 0 .. i of the stream (of those, as many as its context holds).
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.files import atomic_folder, atomic_write

INDEX = "index.json"
KIND = "teacher"
PLACES_PER_FILE = 1 << 18


@torch.no_grad()
def store_teacher(
    model: nn.Module,
    stream: np.ndarray,
    folder: str | Path,
    *,
    k: int = 16,
    temperature: float = 1.0,
    context: int = 256,
    batch: int = 8,
) -> None:
    """Write the `k` likeliest tokens of `model` after every place of `stream` (ids [N]) to `folder`, in one step.

    Each place is seen with at least `context / 2` tokens before it, where the stream has them. Raises FtcError for settings
    that do not fit.
    """
    if k < 1 or context < 2 or batch < 1 or temperature <= 0 or len(stream) == 0:
        raise FtcError(f"k {k}, context {context}, batch {batch}, temperature {temperature}, {len(stream)} tokens: none fits")
    training = model.training
    model.eval()
    rows = _rows(model, np.asarray(stream), k, temperature, context, batch)
    try:
        with atomic_folder(folder, KIND) as place:
            files, held = [], _Buffer(place)
            for ids_nK, logprobs_nK in rows:
                files += held.add(ids_nK, logprobs_nK)
            files += held.flush()
            about = {"num_tokens": len(stream), "k": k, "temperature": temperature, "files": files, "stream": _sha(stream)}
            atomic_write(place / INDEX, json.dumps(about) + "\n")
    finally:
        model.train(training)


def _rows(model, stream: np.ndarray, k: int, temperature: float, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, logprobs) [n, k] of consecutive places: windows that overlap by half, the later half of each counts."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    half, length = context // 2, len(stream)
    starts = list(range(0, max(1, length - half), half))  # of windows; all but the first skip their first half
    for first in range(0, len(starts), batch):
        chosen = starts[first : first + batch]
        windows_BT = torch.zeros(len(chosen), min(2 * half, length), dtype=torch.long)
        for row, start in enumerate(chosen):
            ids = torch.from_numpy(stream[start : start + 2 * half].astype(np.int64))
            windows_BT[row, : len(ids)] = ids
        scores_BTV = logits_of(model(input_ids=windows_BT.to(device))).float() / temperature
        if k > scores_BTV.shape[-1]:
            raise FtcError(f"k = {k} is more than the teacher's vocabulary of {scores_BTV.shape[-1]}")
        logprobs_BTK, ids_BTK = torch.log_softmax(scores_BTV, -1).topk(k, -1)
        for row, start in enumerate(chosen):
            part = slice(half if start else 0, min(2 * half, length - start))
            yield ids_BTK[row, part].int().cpu(), logprobs_BTK[row, part].cpu()


class _Buffer:
    """Collects rows and writes a file whenever it holds PLACES_PER_FILE of them."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.count = folder, 0, 0
        self.rows: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, logprobs: Tensor) -> list[dict]:
        self.rows.append((ids, logprobs))
        self.count += len(ids)
        files = []
        while self.count >= PLACES_PER_FILE:
            files += self.flush(PLACES_PER_FILE)
        return files

    def flush(self, places: int | None = None) -> list[dict]:
        from safetensors.torch import save_file

        if not self.rows:
            return []
        ids, logprobs = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        places = len(ids) if places is None else places
        name = f"teacher-{self.number:05d}.safetensors"
        save_file({"ids": ids[:places].contiguous(), "logprobs": logprobs[:places].contiguous()}, self.folder / name)
        self.number, self.rows, self.count = self.number + 1, [(ids[places:], logprobs[places:])], len(ids) - places
        self.rows = self.rows if self.count else []
        return [{"file": name, "places": min(places, len(ids))}]


class StoredTeacher:
    """Reads what `store_teacher` wrote, a window at a time."""

    def __init__(self, folder: str | Path, stream: np.ndarray | None = None):
        """`stream`, where given, must be the one the teacher was stored for. Raises FtcError when it is not, or nothing is there."""
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / INDEX).read_text())
            self.num_tokens, self.k, self.temperature = about["num_tokens"], about["k"], about["temperature"]
            self.files = [row["file"] for row in about["files"]]
            self.starts = np.cumsum([0] + [row["places"] for row in about["files"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FtcError(f"{folder} holds no stored teacher ({error}); write one with ftc.train.stored_teacher.store_teacher") from error
        if stream is not None and about["stream"] != _sha(stream):
            raise FtcError(
                f"the teacher in {folder} was stored for another stream of {self.num_tokens} tokens; this run has {len(stream)}: "
                "use the same data and tokenizer, or store it again"
            )

    def lookup(self, places_BT: Tensor) -> dict[str, Tensor]:
        """{"teacher_ids" int32 [B, T, K], "teacher_logprobs" float32 [B, T, K]} for places [B, T] that go on by one in a row."""
        rows = [self._row(int(row[0]), len(row)) for row in places_BT]
        ids, logprobs = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return {"teacher_ids": ids.to(places_BT.device), "teacher_logprobs": logprobs.to(places_BT.device)}

    def _row(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        parts = []
        number = int(np.searchsorted(self.starts, start, "right")) - 1
        while length > 0:
            offset, end = start - int(self.starts[number]), int(self.starts[number + 1] - self.starts[number])
            taken = min(length, end - offset)
            opened = _opened(str(self.folder / self.files[number]))
            parts.append(tuple(opened.get_slice(name)[offset : offset + taken] for name in ("ids", "logprobs")))
            start, length, number = start + taken, length - taken, number + 1
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))


@lru_cache(maxsize=64)
def _opened(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")


def _sha(stream: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(stream, dtype=np.int64).tobytes()).hexdigest()

"""Calibration text for passes that look at what a model computes: batches of token ids, and the metric of what a pass lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftc.errors import FtcError
from ftc.files import atomic_write

Batches = list[dict[str, Tensor]]
_LARGE_BYTES = 256 << 20
_KEEP_SECONDS = 20.0
_TOKENS = 256  # whose distributions are compared at a time
_ROWS = 8  # sequences of one length in a batch, where they are given one by one
HELD_OUT = 4  # every fourth sequence is not calibrated on, but measured on


def as_batches(calibration: Any, tokenizer: Any = None, what: str = "the pass") -> Batches:
    """Batches {"input_ids": int64 [B, T], ...} from an int64 tensor [N, T], a list of batches, a list of lists of ids, or texts with their tokenizer.

    Raises FtcError where there is nothing, or nothing of two tokens or more.
    """
    if calibration is None:
        raise FtcError(f"{what} looks at what the model computes on text; give it some: calibration=... (on the command line --calibration text.jsonl)")
    if isinstance(calibration, Tensor):
        calibration = list(calibration)
    if isinstance(calibration, (str, bytes, dict)) or not isinstance(calibration, Sequence):
        raise FtcError(f"calibration is a {type(calibration).__name__}; give a list of batches, of token ids or of texts")
    if not len(calibration):
        raise FtcError("the calibration text is empty; give at least a few hundred tokens")
    if all(isinstance(item, dict) for item in calibration):
        batches = [dict(item) for item in calibration]
    else:
        batches = _grouped([_ids(item, tokenizer) for item in calibration])
    if not any(batch["input_ids"].shape[1] > 1 for batch in batches):
        raise FtcError("the calibration text has no sequence of two tokens or more")
    return [batch for batch in batches if batch["input_ids"].shape[1] > 1]


def _ids(item: Any, tokenizer: Any) -> Tensor:
    if isinstance(item, str):
        if tokenizer is None:
            raise FtcError("the calibration holds texts, and there is no tokenizer to read them with: give tokenizer=..., or token ids")
        from ftc.data.tokens import text_ids

        item = text_ids(tokenizer, item)
    ids = torch.as_tensor(item, dtype=torch.long)
    if ids.dim() != 1:
        raise FtcError(f"a calibration sequence has shape {list(ids.shape)}; give token ids [T]")
    return ids


def _grouped(sequences: Sequence[Tensor]) -> Batches:
    by_length: dict[int, list[Tensor]] = {}
    for ids in sequences:
        by_length.setdefault(len(ids), []).append(ids)
    return [
        {"input_ids": torch.stack(rows[start : start + _ROWS])} for rows in by_length.values() if len(rows[0]) for start in range(0, len(rows), _ROWS)
    ]


def pieces(program: nn.Module, batches: Batches) -> Batches:
    """The batches, one sequence at a time where the model is so large that the activations of several would count."""
    if sum(p.numel() * p.element_size() for p in program.parameters()) < _LARGE_BYTES:
        return batches
    return [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(batch["input_ids"].shape[0])]


_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Within it calibration keeps what it has so far in `folder`, to go on from after an interruption."""
    token = _folder.set(Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


@dataclass
class Kept:
    """Sums over calibration text on disk, as of some number of batches; of one model, text and seed."""

    path: Path | None
    about: str
    written: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, program: nn.Module, regions: Collection[str], batches: Batches, seed: int) -> Kept:
        digest = hashlib.sha256(repr((seed, sorted(regions))).encode())
        for name, parameter in program.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {float(parameter.detach().flatten()[:4096].double().sum())}".encode())
        for batch in batches:
            digest.update(batch["input_ids"].cpu().numpy().tobytes())
        folder = _folder.get()
        return cls(None if folder is None else folder / f"statistics-{min(regions)}.pt", digest.hexdigest())

    def read(self) -> dict:
        """{"done": batches, "layers": ...}; nothing done where nothing fits."""
        nothing = {"done": 0, "layers": {}}
        if self.path is None or not self.path.is_file():
            return nothing
        try:
            stored = torch.load(self.path, weights_only=True)
        except Exception:  # written by another version, or cut off
            return nothing
        return stored if stored.get("about") == self.about else nothing

    def write(self, done: int, layers: dict) -> None:
        """Keep the sums, at most every `_KEEP_SECONDS`."""
        if self.path is None or time.monotonic() - self.written < _KEEP_SECONDS:
            return
        buffer = io.BytesIO()
        torch.save({"about": self.about, "done": done, "layers": layers}, buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, buffer.getvalue())
        self.written = time.monotonic()


def num_tokens(batches: Batches) -> int:
    """Tokens in all batches."""
    return sum(batch["input_ids"].numel() for batch in batches)


def held_out(batches: Batches) -> tuple[Batches, Batches]:
    """The sequences to calibrate on, and every fourth one to measure on (the second half of a single sequence)."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(batch["input_ids"].shape[0])]
    if len(rows) == 1:
        ids = rows[0]["input_ids"]
        half = max(ids.shape[1] // 2, 1)
        return [{"input_ids": ids[:, :half]}], [{"input_ids": ids[:, half:]}]
    kept = [row for n, row in enumerate(rows) if n % HELD_OUT != HELD_OUT - 1]
    apart = rows[HELD_OUT - 1 :: HELD_OUT] or [kept.pop()]
    return _joined(kept), _joined(apart)


def _joined(rows: Batches) -> Batches:
    """Rows of equal shapes put together again, at most `_ROWS` in a batch."""
    batches: list[list[dict]] = []
    for row in rows:
        shapes = {k: v.shape for k, v in row.items()}
        if batches and len(batches[-1]) < _ROWS and {k: v.shape for k, v in batches[-1][0].items()} == shapes:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [{k: torch.cat([row[k] for row in rows]) for k in rows[0]} for rows in batches]


@torch.no_grad()
def kl_divergence(original: nn.Module, converted: nn.Module, batches: Batches) -> float:
    """KL(original || converted) in nats, the mean over all tokens of the batches. Both in eval mode; modes are restored."""
    from ftc.evaluate import logits_of

    modes = [(model, model.training) for model in (original, converted)]
    total = count = 0
    try:
        for model, _ in modes:
            model.eval()
        for batch in pieces(original, batches):
            rows = zip(*(logits_of(model(**batch)).flatten(0, -2).split(_TOKENS) for model, _ in modes), strict=True)
            for ours, theirs in (tuple(torch.log_softmax(each.double(), -1) for each in pair) for pair in rows):
                total += float((ours.exp() * (ours - theirs)).sum())
            count += batch["input_ids"].numel()
    finally:
        for model, training in modes:
            model.train(training)
    return total / count

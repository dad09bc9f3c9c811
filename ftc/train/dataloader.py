"""Packed windows of a token stream in an order that the seed alone decides, resumable at any batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader

from ftc.errors import FtcError

# Shapes: B windows of a batch, T tokens of a window.


class PackedDataLoader(BaseDataLoader):
    """Endless batches ({"input": int64 [B, T]}, labels int64 [B, T]) of windows over one stream of ids.

    Labels are the inputs shifted by one. Each epoch draws an offset and a permutation of the windows from (seed, epoch),
    so a resumed loader (`load_state_dict`) continues with exactly the batches that were left. Rank r of n takes every
    n-th batch. A window may span documents; their border is the end-of-text token. `with_labels` puts the labels into the
    inputs too, for models that compute their own loss; `with_places` puts in where in the stream each token stands. Raises FtcError for a stream that cannot fill one batch.
    """

    def __init__(
        self,
        stream: np.ndarray,
        batch: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        with_labels=False,
        with_places=False,
    ):
        self.stream, self.batch, self.seq_len, self.seed = stream, batch, seq_len, seed
        self.rank, self.world_size, self.with_labels = rank, world_size, with_labels
        self.with_places = with_places
        self.epoch, self.position = 0, 0  # position: batches of this epoch already given, over all ranks
        needed = (batch * world_size + 1) * seq_len + 1
        if len(stream) < needed:
            raise FtcError(
                f"the training text has {len(stream)} tokens, but one step of {batch} x {seq_len} on {world_size} "
                f"process(es) needs {needed}; give more text, or lower training.local_batch_size or training.seq_len"
            )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            starts = self._epoch_starts()
            per_step = self.batch * self.world_size
            while (self.position + 1) * per_step <= len(starts):
                first = self.position * per_step + self.rank * self.batch
                rows = starts[first : first + self.batch, None] + np.arange(self.seq_len + 1)
                self.position += 1
                window_BT = torch.from_numpy(self.stream[rows].astype(np.int64))
                inputs = {"input": window_BT[:, :-1].contiguous()}
                labels_BT = window_BT[:, 1:].contiguous()
                if self.with_labels:
                    inputs["labels"] = labels_BT
                if self.with_places:
                    inputs["places"] = torch.from_numpy(rows[:, :-1].astype(np.int64))
                yield inputs, labels_BT
            self.epoch, self.position = self.epoch + 1, 0

    def _epoch_starts(self) -> np.ndarray:
        """The first token of each window of this epoch, in order of use."""
        generator = np.random.default_rng([self.seed, self.epoch])
        offset = int(generator.integers(self.seq_len))
        num_windows = (len(self.stream) - 1 - offset) // self.seq_len
        return generator.permutation(num_windows) * self.seq_len + offset

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.epoch, self.position = int(state_dict["epoch"]), int(state_dict["position"])

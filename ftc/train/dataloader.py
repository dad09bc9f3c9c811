"""Batches of a mixture's windows for torchtitan, resumable on any number of processes."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader

from ftc.data.lanes import LANES, LaneState, Sample, lanes_of, samples
from ftc.data.mixture import Mixture
from ftc.data.prefetch import Prefetch

# Shapes: B windows of a batch, T tokens of a window.
_AHEAD = 4  # batches that are made ready while earlier ones are trained on, where reading and tokenizing takes time


class PackedDataLoader(BaseDataLoader):
    """Endless batches ({"input": int64 [B, T]}, labels int64 [B, T]) of a mixture.

    A step of n processes takes the next B n samples of the one sequence that `ftc.data.lanes` defines; process r of n has
    those with a number i = r mod n. Inputs also hold "position_ids" int64 [B, T] where documents are kept apart, with
    `with_labels` the labels, for models that compute their own loss, and with `with_places` "places" int64 [B, T]: where in
    the stream of all held sources (`Prepared.train.stream`) each token stands.

    The state is the number of samples that all processes have taken, and what is behind it in each lane of this process. A
    checkpoint of all processes holds every lane, so that it can be loaded by any number of them.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        with_labels: bool = False,
        with_places: bool = False,
    ):
        self.mixture, self.batch, self.rank, self.world_size = mixture, batch, rank, world_size
        self.with_labels, self.with_places = with_labels, with_places
        self.num_samples = 0
        self._lanes = lanes_of(rank, world_size)
        self._states: dict[int, LaneState] = {}
        self._ahead: Prefetch | None = None

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self.close()
        mixture = self.mixture
        source = samples(
            mixture.windows, mixture.shares, mixture.seq_len, self.rank, self.world_size, self.num_samples, self._states
        )
        steps = self._steps(source, self.num_samples)
        if mixture.streams:
            steps = self._ahead = Prefetch(steps, _AHEAD)
        for self.num_samples, states, batch in steps:
            self._states = self._states | states
            yield batch

    def _steps(self, source: Iterator[Sample], num_samples: int) -> Iterator[tuple[int, dict[int, LaneState], Any]]:
        """Of each step: the samples that are taken after it, the lanes' states then, and its batch. Whole steps, so that a thread
        that runs ahead hands over to the training loop once a step."""
        while True:
            taken = list(islice(source, self._samples_of_a_step(num_samples)))
            num_samples += self.batch * self.world_size
            states = {sample.lane: sample.state for sample in taken}
            yield num_samples, states, self._batch([sample for sample in taken if sample.window is not None])

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def tokens(self) -> list[int]:
        """Tokens that each source has given in the lanes that are this process's, so that all processes sum to all."""
        own = [state for lane, state in self._states.items() if lane % self.world_size == self.rank]
        return [sum(state.tokens[source] for state in own) for source in range(len(self.mixture.names))]

    def state_dict(self) -> dict[str, Any]:
        lanes = {f"lane_{lane}": json.dumps(_as_json(self._states.get(lane))) for lane in self._lanes}
        return {"samples": self.num_samples} | lanes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self.close()
        self.num_samples = int(state_dict["samples"])
        stored = {lane: json.loads(state_dict[f"lane_{lane}"]) for lane in self._lanes}
        self._states = {lane: LaneState(*map(tuple, state)) for lane, state in stored.items() if state is not None}

    def _samples_of_a_step(self, first: int) -> int:
        """How many samples of the step that begins with sample `first` lie in this process's lanes."""
        step = LANES // len(self._lanes)
        last = first + self.batch * self.world_size
        lane = self._lanes[0]
        return (last - lane + step - 1) // step - (first - lane + step - 1) // step

    def _batch(self, taken: list[Sample]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        windows = [sample.window for sample in taken]
        inputs = {"input": _stack([window.inputs for window in windows])}
        if windows[0].positions is not None:
            inputs["position_ids"] = _stack([window.positions for window in windows])
        labels_BT = _stack([window.labels for window in windows])
        if self.with_labels:
            inputs["labels"] = labels_BT
        if self.with_places:
            first_B1 = torch.tensor([[window.place] for window in windows])
            inputs["places"] = first_B1 + torch.arange(self.mixture.seq_len)
        return inputs, labels_BT


def _as_json(state: LaneState | None) -> list[Any] | None:
    return None if state is None else [state.tokens, state.places]


def _stack(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))

"""Bits per byte on held-out text while a model trains: a few times, on a small fixed sample of each source.

Every measurement runs batches of the training's own shape through the training's own call, without gradients, so that nothing is
captured anew; a model with dropout is measured with it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from ftc.data.ngram import Trigram
from ftc.data.prepare import Prepared
from ftc.data.tokens import TokenizedText, start_id
from ftc.evaluate import IGNORED
from ftc.train.documents_apart import packed_inputs

# Of the tokens that this rank trains on, one measurement runs this share, forward only, which costs a third of a training step:
# ten measurements take about 1% of the training time. At least one batch a source.
SAMPLE_SHARE = 0.003
# Shapes: B windows in a batch, T tokens of a window.


@dataclass(frozen=True)
class Sample:
    """Windows of one source's held-out text: the last half of each is scored, so that it has half a window before it."""

    batches: list[tuple[torch.Tensor, torch.Tensor]]  # tokens and labels, int64 [B, T]; labels that do not count are -100
    scored: list[tuple[np.ndarray, int]]  # ids of each window without padding, and how many of the last count
    num_bytes: int  # of the scored tokens, in UTF-8


def measured_steps(steps: int, points: int) -> frozenset[int]:
    """The steps after which the sample is measured: early, then `points` times at equal distances, the last step included."""
    if points < 1:
        return frozenset()
    return frozenset({max(1, steps // 50)} | {max(1, round(steps * k / points)) for k in range(1, points + 1)})


def choose_sample(text: TokenizedText, tokenizer: Any, num_tokens: int, batch: int, length: int) -> Sample | None:
    """Windows of `length` tokens spread evenly over `text`, about `num_tokens` in all, rounded up to whole batches.

    The start of a document is scored from its first token. None where there is no text. Deterministic.
    """
    start = start_id(tokenizer)
    opening = np.array([] if start is None else [start], dtype=np.int64)
    windows = []
    for document in text.documents():
        ids = np.concatenate([opening, document.astype(np.int64)])
        for first in range(0, len(ids) - 1, length):
            window = ids[first : first + length + 1]
            num_scored = len(window) - 1 - (length // 2 if first else 0)
            if num_scored > 0:
                windows.append((window, num_scored))
    if not windows:
        return None
    wanted = batch * max(1, math.ceil(num_tokens / length / batch))
    count = min(wanted, len(windows))
    chosen = [windows[(2 * k + 1) * len(windows) // (2 * count)] for k in range(count)]
    num_bytes = sum(len(tokenizer.decode(ids[-scored:].tolist()).encode()) for ids, scored in chosen)
    parts = [chosen[first : first + batch] for first in range(0, count, batch)]
    return Sample([_as_batch(part, batch, length) for part in parts], chosen, num_bytes) if num_bytes else None


def _as_batch(windows: list[tuple[np.ndarray, int]], batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BT = torch.zeros(batch, length, dtype=torch.int64)
    labels_BT = torch.full((batch, length), IGNORED)
    for row, (ids, num_scored) in enumerate(windows):
        size = len(ids) - 1
        tokens_BT[row, :size] = torch.from_numpy(ids[:-1])
        labels_BT[row, size - num_scored : size] = torch.from_numpy(ids[-num_scored:])
    return tokens_BT, labels_BT


def held_out(prepared: Prepared) -> dict[str, TokenizedText]:
    """The held-out text of each source, by the source's name."""
    return {each.source.name: each.validation for each in prepared.sources}


class ValidationCurve:
    """Measures a run's model on the samples of all sources when the time has come. All ranks measure the same."""

    def __init__(self, texts: Mapping[str, TokenizedText], tokenizer: Any, job_config: Any):
        training, section = job_config.training, job_config.ftc
        self.steps = measured_steps(training.steps, section.validation_points if section.validate else 0)
        num_tokens = SAMPLE_SHARE * training.steps * training.local_batch_size * training.seq_len / max(1, len(texts))
        shape = training.local_batch_size, training.seq_len
        chosen = {name: choose_sample(text, tokenizer, int(num_tokens), *shape) for name, text in texts.items() if self.steps}
        self.samples = {name: sample for name, sample in chosen.items() if sample is not None}

    def after_step(self, trainer: Any) -> None:
        """Measure and log, if it is time to."""
        if self.samples and trainer.step in self.steps:
            started = time.perf_counter()
            measured = self.measure(trainer)
            trainer.metrics_processor.log_held_out(trainer.step, measured, time.perf_counter() - started)

    @torch.no_grad()
    def measure(self, trainer: Any) -> dict[str, dict[str, float]]:
        """{source: {"bits_per_byte", "nats_per_token"}}; the trainer's model, gradients and random numbers stay as they are."""
        from ftc.train.adapter import objective_of

        model, objective = trainer.model_parts[0], objective_of(trainer.job_config)
        names = model.apart_names
        measured = {}
        with torch.random.fork_rng(), trainer.maybe_enable_amp:
            for name, sample in self.samples.items():
                nats = 0.0
                for tokens_BT, labels_BT in sample.batches:
                    tokens_BT, labels_BT = tokens_BT.to(trainer.device), labels_BT.to(trainer.device)
                    if trainer.context is not None:
                        nats += float(trainer.context.next_token_nats(objective, model.body, tokens_BT, labels_BT))
                        continue
                    places_BT = torch.arange(tokens_BT.shape[1], device=trainer.device).expand_as(tokens_BT)
                    if trainer.pipelined_forward is not None:
                        nats += float(trainer.pipelined_forward.next_token_nats(tokens_BT, labels_BT, places_BT if names else None))
                        continue
                    apart = packed_inputs(places_BT, names)
                    nats += float(objective.next_token_nats(model.body, tokens_BT, labels_BT, apart if names else {}))
                tokens = sum(count for _, count in sample.scored)
                measured[name] = {"bits_per_byte": nats / math.log(2) / sample.num_bytes, "nats_per_token": nats / tokens}
        for module in (module for part in trainer.model_parts for module in part.modules()):  # no backward pass follows that would
            if isinstance(module, FSDPModule):
                module.reshard()
        return measured

    def baselines(self, trigram: Trigram | None) -> dict[str, dict[str, float]]:
        """{source: {"trigram_bits_per_byte", "bytes"}} of the samples: the line that the curve has to get below."""
        found = {name: {"bytes": sample.num_bytes} for name, sample in self.samples.items()}
        for name, sample in self.samples.items() if trigram is not None else ():
            before = trigram.nats([ids[:-scored] for ids, scored in sample.scored])
            nats = trigram.nats([ids for ids, _ in sample.scored]) - before
            found[name]["trigram_bits_per_byte"] = nats / math.log(2) / sample.num_bytes
        return found

"""When do modules for further tokens pay as a draft? Acceptance on text, costs of verifying and drafting, and the speed-up.

Teacher-forced: at every place i of a text, module k (given the text's own tokens up to i + k) names a token; it is accepted when it
is the model's own likeliest token there, given the text up to i + k. A chain of n drafts gives on average

    a_n = sum over k <= n of P(modules 1 .. k are all accepted)        further tokens a run,
    speed-up = (1 + a_n) / (v_n + d_n)

v_n and d_n are measured on this machine: the time of a run that checks n drafts, and of n drafts, over that of a plain step. Steps
are those of `ftc generate`, which has no key-value cache: each is a run over the whole text.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftc.data.tokens import start_id, text_ids
from ftc.draft import Drafter
from ftc.errors import FtcError
from ftc.evaluate import IGNORED, _batches, _Window, _windows, logits_of

# Shapes: B windows of a batch, T tokens of a window, V vocabulary.


def acceptance(
    program: nn.Module, tokenizer: Any, sources: Mapping[str, Sequence[str]], *, context: int = 256, batch: int = 16
) -> dict[str, dict[str, Any]]:
    """{source: {"places", "acceptance": [of depth 1, ...], "chain": [all up to depth k], "accuracy", "next_token_accuracy"}}.

    `accuracy` counts the text's own token in place of the model's choice. Windows are those of `ftc.evaluate`; every place
    counts once for each depth that fits before the end of its text. Raises FtcError for a source too short for any.
    """
    depth = Drafter(program).depth
    start = start_id(tokenizer)
    results = {}
    training = program.training
    program.eval()
    try:
        for name, texts in sources.items():
            counts = _Counts(depth)
            documents = [[*([] if start is None else [start]), *text_ids(tokenizer, text)] for text in texts]
            windows = [w for ids in documents for w in _windows(ids, context, max(1, context // 2)) if len(w.ids) > depth + 1]
            if not windows:
                raise FtcError(f"the source {name!r} holds no text of more than {depth + 1} tokens")
            for part in _batches(windows, batch):
                counts.add(program, part)
            results[name] = counts.summary()
    finally:
        program.train(training)
    return results


class _Counts:
    """Sums over places, for each depth."""

    def __init__(self, depth: int):
        self.depth = depth
        self.places, self.accepted, self.right = ([0] * (depth + 1) for _ in range(3))
        self.chain = [0] * (depth + 1)
        self.chains = 0

    @torch.no_grad()
    def add(self, program: nn.Module, windows: list[_Window]) -> None:
        device = next(program.parameters()).device
        length = max(len(w.ids) for w in windows) - 1
        inputs_BT = torch.zeros(len(windows), length, dtype=torch.long)
        targets_BT = torch.full((len(windows), length), IGNORED)
        for row, window in enumerate(windows):
            ids = torch.tensor(window.ids)
            inputs_BT[row, : len(ids) - 1] = ids[:-1]
            targets_BT[row, len(ids) - 1 - window.num_scored : len(ids) - 1] = ids[-window.num_scored :]
        output, extras = program.with_extras(input_ids=inputs_BT.to(device))
        own_BT = logits_of(output).argmax(-1).cpu()
        counted_BT = targets_BT != IGNORED
        drafts = [own_BT] + [extras[f"mtp_logits_{k}"].argmax(-1).cpu() for k in range(1, self.depth + 1)]
        agreed = torch.ones(own_BT[:, self.depth :].shape, dtype=torch.bool)
        whole = counted_BT[:, self.depth :]  # places whose whole chain of drafts lies within the counted end
        for k, draft_BT in enumerate(drafts):
            said, own, target, counted = draft_BT[:, : length - k], own_BT[:, k:], targets_BT[:, k:], counted_BT[:, k:]
            self.places[k] += int(counted.sum())
            self.accepted[k] += int((said.eq(own) & counted).sum())
            self.right[k] += int((said.eq(target) & counted).sum())
            agreed &= said.eq(own)[:, : length - self.depth]
            self.chain[k] += int((agreed & whole).sum())
        self.chains += int(whole.sum())

    def summary(self) -> dict[str, Any]:
        def share(parts: list[int], wholes: list[int]) -> list[float]:
            return [part / max(whole, 1) for part, whole in zip(parts[1:], wholes[1:], strict=True)]

        return {
            "places": self.places[1],
            "acceptance": share(self.accepted, self.places),
            "chain": [part / max(self.chains, 1) for part in self.chain[1:]],
            "accuracy": share(self.right, self.places),
            "next_token_accuracy": self.right[0] / max(self.places[0], 1),
        }


def costs(program: nn.Module, *, context: int = 256, rounds: int = 7, seed: int = 0) -> dict[str, Any]:
    """{"step_s": a plain step at `context` tokens, "verify": [v_1, ...], "draft": [d_1, ...]}, medians over alternating rounds."""
    drafter = Drafter(program)
    vocabulary = drafter.look([0, 0]).logits.shape[-1]
    ids = torch.randint(vocabulary, (context + drafter.depth,), generator=torch.Generator().manual_seed(seed)).tolist()
    depths = range(1, drafter.depth + 1)
    training = program.training
    program.eval()
    try:
        look = drafter.look(ids[:context])
        plain: list[float] = []
        verify, draft = ([[] for _ in depths] for _ in range(2))
        for number in range(rounds + 1):  # the first round warms up
            step = _seconds(lambda: _plain_step(program, ids[:context]))
            plain.append(step)
            for n in depths:
                verify[n - 1].append(_seconds(lambda n=n: drafter.look(ids[: context + n])) / step)
                draft[n - 1].append(_seconds(lambda n=n: drafter.propose(look, ids[: context + 1], n)) / step)
            if number == 0:
                plain, verify, draft = [], [[] for _ in depths], [[] for _ in depths]
    finally:
        program.train(training)
    medians = [[statistics.median(times) for times in column] for column in (verify, draft)]
    return {"step_s": statistics.median(plain), "verify": medians[0], "draft": medians[1], "context": context, "rounds": rounds}


def speed_up(measured: Mapping[str, Any], cost: Mapping[str, Any]) -> list[float]:
    """(1 + a_n) / (v_n + d_n) for chains of n = 1, 2, ... drafts."""
    found, further = [], 0.0
    for chain, verify, draft in zip(measured["chain"], cost["verify"], cost["draft"], strict=True):
        further += chain
        found.append((1 + further) / (verify + draft))
    return found


@torch.no_grad()
def _plain_step(program: nn.Module, ids: list[int]) -> Tensor:
    device = next(program.parameters()).device
    return logits_of(program(input_ids=torch.tensor([ids], device=device)))[0, -1]


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start

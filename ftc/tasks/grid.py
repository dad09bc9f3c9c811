"""Depth by length: how often a model finds what a prompt hides, greedily, as a grid of accuracies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftc.errors import FtcError
from ftc.evaluate import logits_of, progress_bar
from ftc.rewrite.rope_model import longest_text
from ftc.tasks.prompts import Prompt

Maker = Callable[[int, float, int], Prompt]  # length, depth, seed


@dataclass(frozen=True)
class Grid:
    """`found[d][l]` prompts of `num_prompts` whose answer the model gives in full, at depth d and length l."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    found: tuple[tuple[int, ...], ...]
    num_prompts: int

    @property
    def accuracies(self) -> list[list[float]]:
        """Rows by depth, columns by length; 0 to 1."""
        return [[count / self.num_prompts for count in row] for row in self.found]

    @property
    def accuracy(self) -> float:
        """Over all prompts."""
        return sum(map(sum, self.found)) / (self.num_prompts * len(self.lengths) * len(self.depths))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "task": self.task,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "prompts_per_cell": self.num_prompts,
            "accuracies": self.accuracies,
            "accuracy": self.accuracy,
        }


def measure_grid(
    model: nn.Module,
    make: Maker,
    *,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    batch: int = 1,
    progress: bool = True,
) -> Grid:
    """Accuracy at every depth and length over prompts `make(length, depth, seed)`, one for each seed.

    A prompt counts where each token of its answer is the likeliest one after what stands before it, which is what greedy
    decoding would write. `batch` prompts of one length run at a time. The model's mode is restored. Raises FtcError for lengths
    beyond the model's positions, and for empty or repeated lengths, depths or seeds.
    """
    for name, values in (("lengths", lengths), ("depths", depths), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise FtcError(f"{name} {list(values)}: give at least one, and none twice")
    check_length(model, max(lengths))
    prompts = {(d, n): [make(n, d, seed) for seed in seeds] for n in lengths for d in depths}
    found: dict[tuple[float, int], int] = dict.fromkeys(prompts, 0)
    training = model.training
    model.eval()
    try:
        with progress_bar(progress, "prompts") as bar:
            task_id = bar.add_task(task, total=len(prompts) * len(seeds))
            for length in lengths:
                todo = [(d, prompt) for d in depths for prompt in prompts[d, length]]
                for part in _parts(todo, batch):
                    for (depth, _), right in zip(part, answered(model, [prompt for _, prompt in part]), strict=True):
                        found[depth, length] += right
                    bar.advance(task_id, len(part))
    finally:
        model.train(training)
    return Grid(task, tuple(lengths), tuple(depths), tuple(tuple(found[d, n] for n in lengths) for d in depths), len(seeds))


def check_length(model: nn.Module, length: int) -> None:
    """FtcError where a text of `length` tokens is longer than the model's configuration allows."""
    longest = longest_text(model)
    if longest is not None and length > longest:
        raise FtcError(
            f"{length} tokens are more than the {longest} positions of the model; the pass rope-scale lifts that: "
            f"ftc rewrite MODEL --passes 'rope-scale{{type=yarn,factor={-(-length // longest)}}}' --out DIR"
        )


@torch.no_grad()
def answered(model: nn.Module, prompts: Sequence[Prompt]) -> list[bool]:
    """Whether the model, in its present mode, continues each prompt with its answer. Prompts of one length."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids_BT = torch.tensor([prompt.ids for prompt in prompts], device=device)
    longest = max(prompt.num_answer for prompt in prompts)
    logits_BTV = logits_of(model(input_ids=ids_BT[:, :-1]))
    if int(ids_BT.max()) >= logits_BTV.shape[-1]:
        raise FtcError(f"the tokenizer gave id {int(ids_BT.max())}, but the model's vocabulary has {logits_BTV.shape[-1]}")
    same_BT = logits_BTV[:, -longest:].argmax(-1) == ids_BT[:, -longest:]
    return [bool(same_T[-prompt.num_answer :].all()) for same_T, prompt in zip(same_BT, prompts, strict=True)]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

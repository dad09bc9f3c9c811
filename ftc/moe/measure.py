"""Everything about the experts of a program on text by domain: routing, specialisation, saturation and harm, beside a random router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftc.errors import FtcError
from ftc.evaluate import progress_bar
from ftc.moe.ablation import Harm, ablate, num_runs, random_choice
from ftc.moe.routing import Mixtures, Routing, collect, saturation
from ftc.moe.specialisation import Specialisation, specialisation, utilisation
from ftc.open_model import vocab_size


@dataclass(frozen=True, eq=False)
class Measured:
    """`routings` by domain; `random`: the specialisation that the same text has through a random router; `saturation` [L], None without an earlier
    checkpoint; `harm`: None where no expert was knocked out."""

    routings: dict[str, Routing]
    found: Specialisation
    random: Specialisation
    harm: Harm | None
    saturation: Tensor | None

    @property
    def together(self) -> Routing:
        """The routing of all domains."""
        first, *rest = self.routings.values()
        return sum(rest, first)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "layers": list(self.found.layers),
            "experts": self.together.num_experts,
            "tokens": {name: int(r.tokens[0]) for name, r in self.routings.items()},
            "utilisation": {"all": utilisation(self.together), "domains": {name: utilisation(r) for name, r in self.routings.items()}},
            "specialisation": self.found.as_dict(),
            "random_router": self.random.as_dict(),
            "saturation": None if self.saturation is None else dict(zip(self.found.layers, self.saturation.tolist(), strict=True)),
            "harm": None if self.harm is None else self.harm.as_dict(),
        }


def measure(
    mixtures: Mixtures,
    texts: Mapping[str, Sequence[Tensor]],
    *,
    earlier: Mixtures | None = None,
    ablation_tokens: int = 4096,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Measure on batches of token ids [B, T] int64 by domain.

    `ablation_tokens`: experts are knocked out on the first whole windows of each domain, of at most so many tokens (one window at least); 0: none is.
    `seed` draws the random router's choices. The program is left as it is. FtcError for ids beyond the vocabulary, and as `saturation`.
    """
    _check_ids(mixtures, texts)
    routings, random, settled, harm = {}, {}, None, None
    with progress_bar(progress, "runs") as bar:
        task = bar.add_task("route", total=2 * len(texts) + (earlier is not None))
        drawn = random_choice(mixtures.num_experts, seed)  # one for all domains: the same draws for each would have no sampling noise
        for name, batches in texts.items():
            examples = [{"input_ids": ids} for ids in batches]
            routings[name] = collect(mixtures, examples)
            bar.advance(task)
            random[name] = collect(mixtures, examples, drawn)
            bar.advance(task)
        if earlier is not None:
            settled = saturation(mixtures, earlier, ({"input_ids": ids} for batches in texts.values() for ids in batches))
            bar.advance(task)
        found = specialisation(routings)
        if ablation_tokens:
            short = {name: first_windows(batches, ablation_tokens) for name, batches in texts.items()}
            task = bar.add_task("knock out experts", total=num_runs(found.own))
            harm = ablate(mixtures, short, found.own, seed=seed, done=lambda: bar.advance(task))
    return Measured(routings, found, specialisation(random), harm, settled)


def first_windows(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first whole windows of batches [B, T], of at most so many tokens together; one window at least."""
    kept, left = [], max(1, tokens // batches[0].shape[1])
    for ids in batches:
        kept.append(ids[:left])
        left -= len(kept[-1])
        if left <= 0:
            break
    return kept


def _check_ids(mixtures: Mixtures, texts: Mapping[str, Sequence[Tensor]]) -> None:
    size = vocab_size(mixtures.program)
    for name, batches in texts.items():
        largest = max(int(ids.max()) for ids in batches)
        if largest >= size:
            raise FtcError(f"the tokenizer gave id {largest} for {name}, but the model's vocabulary has {size}; use the tokenizer that it was trained with")

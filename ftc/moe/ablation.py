"""What an expert is worth to a domain: the text's cross-entropy without it.

    knocked out:   its slots go to nothing, and a token's other weights grow by  sum of all / sum of those left,  so that they sum up as before

A token that had no other expert (K = 1) gets nothing from the mixture: what shared experts and the residual stream give is all. Nothing is trained
again. The harm is the increase of the mean cross-entropy of the next token, nats.

Legend: L layers, D domains, N tokens, K experts a token, E experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftc.evaluate import logits_of
from ftc.moe.routing import Choice, Listener, Mixtures


def knocked_out(indices: Tensor, weights: Tensor, expert: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """(indices, weights) [N, K] without one expert: E and 0 in its slots, the token's other weights rescaled. Other tokens' are the same numbers."""
    out_NK, live_NK = indices == expert, indices != num_experts
    total_N1 = torch.where(live_NK, weights, 0).sum(-1, keepdim=True)
    left_NK = torch.where(live_NK & ~out_NK, weights, 0)
    left_N1 = left_NK.sum(-1, keepdim=True)
    scaled_NK = left_NK * torch.where(left_N1 != 0, total_N1 / torch.where(left_N1 != 0, left_N1, 1), 0)
    return torch.where(out_NK, num_experts, indices), torch.where(out_NK.any(-1, keepdim=True), scaled_NK, weights)


def without(experts: Mapping[int, int], num_experts: int) -> Listener:
    """Knocks out expert `experts[layer]` in each layer that is named."""

    def listener(choice: Choice):
        expert = experts.get(choice.layer)
        return None if expert is None else knocked_out(choice.indices, choice.weights, expert, num_experts)

    return listener


def random_choice(num_experts: int, seed: int = 0) -> Listener:
    """A router that knows nothing: each token goes to different experts drawn evenly, as many as it had, with the weights that it had."""
    generators: dict[torch.device, torch.Generator] = {}

    def listener(choice: Choice):
        indices, device = choice.indices, choice.indices.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        drawn_NK = torch.rand(len(indices), num_experts, generator=generators[device], device=device).topk(indices.shape[1], -1).indices
        return torch.where(indices == num_experts, num_experts, drawn_NK), choice.weights

    return listener


def cross_entropy(mixtures: Mixtures, batches: Iterable[Tensor], listener: Listener | None = None) -> float:
    """Mean nats of the next token over batches of ids [B, T] int64, each window for itself."""
    nats, tokens = 0.0, 0
    for ids_BT in batches:
        logits_BTV = logits_of(mixtures.run({"input_ids": ids_BT}, listener))[:, :-1]
        wanted = ids_BT[:, 1:].to(logits_BTV.device)
        losses = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), wanted.flatten(), reduction="none")
        nats, tokens = nats + float(losses.double().sum()), tokens + losses.numel()
    return nats / tokens


@dataclass(frozen=True, eq=False)
class Harm:
    """Cross-entropy in nats a token. base [D]; one [L, D, D]: its increase in domain j without the own expert of domain i in that layer; every
    [D, D]: without those of domain i in all layers at once; random [D]: increase with a random router in all layers. All float64."""

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    base: Tensor
    one: Tensor
    every: Tensor
    random: Tensor

    def ratio(self, harm: Tensor) -> Tensor:
        """[..., D] of harm [..., D, D]: that of the own domain over the mean of the others; NaN with one domain and where the others lose nothing."""
        own, others = own_and_others(harm)
        return torch.where(others > 0, own / others, torch.nan)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "cross_entropy": dict(zip(self.domains, self.base.tolist(), strict=True)),
            "random_router": dict(zip(self.domains, self.random.tolist(), strict=True)),
            "layers": {name: self._table(harm) for name, harm in zip(self.layers, self.one, strict=True)},
            "all_layers": self._table(self.every),
        }

    def _table(self, harm: Tensor) -> dict[str, Any]:
        ratios = self.ratio(harm).tolist()
        return {
            name: {"harm": dict(zip(self.domains, row, strict=True)), "own_over_others": ratio}
            for name, row, ratio in zip(self.domains, harm.tolist(), ratios, strict=True)
        }


def own_and_others(harm: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] each, of harm [..., D, D]: the diagonal, and the mean of the rest of a row, NaN with one domain."""
    own = harm.diagonal(dim1=-2, dim2=-1)
    others = harm.shape[-1] - 1
    return own, (harm.sum(-1) - own) / others if others else torch.full_like(own, torch.nan)


def ablate(
    mixtures: Mixtures, texts: Mapping[str, Sequence[Tensor]], own: Tensor, *, seed: int = 0, done: Callable[[], None] = lambda: None
) -> Harm:
    """Knock out the own experts, int64 [L, D], one at a time, then all of a domain's, and measure on every domain's batches of ids [B, T].

    Runs the texts once for each different expert of a layer, and D + 2 times; `done` is called after each (`num_runs` says how often).
    """
    domains, experts = tuple(texts), mixtures.num_experts

    def measure(listener_of: Callable[[], Listener | None]) -> Tensor:
        found = torch.tensor([cross_entropy(mixtures, texts[name], listener_of()) for name in domains], dtype=torch.float64)
        done()
        return found

    base = measure(lambda: None)
    one = torch.zeros(len(mixtures.layers), len(domains), len(domains), dtype=torch.float64)
    for layer, row in enumerate(own.tolist()):
        for expert in dict.fromkeys(row):
            harm = measure(lambda layer=layer, expert=expert: without({layer: expert}, experts)) - base
            one[layer, [i for i, other in enumerate(row) if other == expert]] = harm
    every = [measure(lambda column=column: without(dict(enumerate(column)), experts)) - base for column in own.T.tolist()]
    random = measure(lambda: random_choice(experts, seed)) - base
    return Harm(domains, mixtures.layers, base, one, torch.stack(every), random)


def num_runs(own: Tensor) -> int:
    """How often `ablate` runs all texts for own experts [L, D]."""
    return sum(len(set(row)) for row in own.tolist()) + own.shape[1] + 2

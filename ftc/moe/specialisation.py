"""What experts specialise in: numbers of a routing (`ftc.moe.routing`), of one text or of several domains.

    share of expert e in domain d       t[d, e] = tokens of d that chose e / tokens of d                    (Muennighoff et al. 2024, arXiv:2409.02060,
    over chance                         t[d, e] / (k / E)        1: as a router that knows nothing           section 4.1: domain specialisation)
    own expert of d                     the e with the largest  t[d, e] - mean of t[d', e] over the other domains
    information, nats                   I = sum_de p(d) p(e|d) log(p(e|d) / p(e)),   p(e|d) = t[d, e] / sum_e t[d, e],  p(d) = 1/D
    co-activation over independence     P(a and b) / (P(a) P(b)),  P over tokens
    utilisation                         load share p(e) of the slots; MaxVio = max load / mean load - 1 (Wang et al. 2024, arXiv:2408.15664); entropy of
                                        p over log E; dead experts: without a token

Two routers stand beside: a random one (even draws of k different experts: over chance 1, information 0, co-activation (k - 1) E / (k (E - 1)), and what
sampling adds to these when it is run), and an oracle that knows the domain and divides the experts evenly: over chance f = min(E / k, D), information log f.

k is the mean number of experts a token: K where no token is dropped. Legend: L layers, D domains, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftc.moe.routing import Routing


def load_share(routing: Routing) -> Tensor:
    """float64 [L, E]: the part of all slots that each expert has; 0 in a layer without slots."""
    counts = routing.counts.double()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def max_violation(routing: Routing) -> Tensor:
    """float64 [L]: the largest load over the mean load, less 1; 0 is perfect balance, E - 1 one expert for all."""
    return load_share(routing).amax(-1) * routing.num_experts - 1


def load_entropy(routing: Routing) -> Tensor:
    """float64 [L]: entropy of the load shares over log E; 1 is perfect balance. 1 for a single expert."""
    share = load_share(routing)
    return -torch.xlogy(share, share).sum(-1) / math.log(routing.num_experts) if routing.num_experts > 1 else torch.ones(len(share), dtype=torch.float64)


def dead_experts(routing: Routing) -> list[list[int]]:
    """For each layer the experts without a token."""
    return [(row == 0).nonzero().flatten().tolist() for row in routing.counts]


def co_activation(routing: Routing) -> Tensor:
    """float64 [L, E, E]: pairs over independence; NaN on the diagonal and for experts without a token."""
    single = routing.counts.double()
    expected = single[:, :, None] * single[:, None, :] / routing.tokens[:, None, None].clamp(min=1)
    lift = torch.where(expected > 0, routing.pairs / expected, torch.nan)
    return lift.masked_fill(torch.eye(routing.num_experts, dtype=torch.bool), torch.nan)


def random_co_activation(chosen: float, num_experts: int) -> float:
    """What even draws of `chosen` different experts have over independence; NaN where a token has one expert or there is one."""
    return (chosen - 1) / chosen * num_experts / (num_experts - 1) if num_experts > 1 and chosen > 1 else math.nan


def strongest_pair(routing: Routing, layer: int, least: float = 5.0) -> tuple[int, int, float] | None:
    """(a, b, over independence) of the pair that goes together most, among those that independence would let meet `least` times; None without any."""
    single = routing.counts[layer].double()
    expected = single[:, None] * single[None, :] / max(1, int(routing.tokens[layer]))
    lift = torch.where(expected >= least, co_activation(routing)[layer], torch.nan).triu(1).nan_to_num(0.0)
    place = int(lift.argmax())
    a, b = divmod(place, routing.num_experts)
    return (a, b, float(lift[a, b])) if lift[a, b] > 0 else None


def utilisation(routing: Routing) -> dict[str, dict[str, Any]]:
    """JSON-ready, by layer: load_share, max_violation, entropy, dead, confidence, chosen (experts a token), unfilled (share of slots that no expert took)
    and co-activation with its random value and strongest pair."""
    share, violation, entropy, dead, lift = (f(routing) for f in (load_share, max_violation, load_entropy, dead_experts, co_activation))
    slots = routing.counts.sum(1) + routing.unfilled
    found = {}
    for layer, name in enumerate(routing.layers):
        chosen, pair = float(routing.chosen[layer]), strongest_pair(routing, layer)
        found[name] = {
            "load_share": share[layer].tolist(),
            "max_violation": float(violation[layer]),
            "entropy": float(entropy[layer]),
            "dead": dead[layer],
            "confidence": float(routing.confidence[layer]),
            "chosen": chosen,
            "unfilled": int(routing.unfilled[layer]) / max(1, int(slots[layer])),
            "co_activation": lift[layer].tolist(),
            "co_activation_random": random_co_activation(chosen, routing.num_experts),
            "strongest_pair": None if pair is None else {"experts": list(pair[:2]), "over_independence": pair[2]},
        }
    return found


@dataclass(frozen=True, eq=False)
class Specialisation:
    """By domain. share [L, D, E]: t of the module's docstring; over_chance [L, D, E]; most [L, D] int64: the most-used expert; own [L, D] int64;
    information [L], nats; oracle [L]: the oracle's over chance, whose information is its logarithm. float64 but for the indices."""

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    share: Tensor
    over_chance: Tensor
    most: Tensor
    own: Tensor
    information: Tensor
    oracle: Tensor

    @property
    def most_over_chance(self) -> Tensor:
        """float64 [L, D]: the most-used expert's."""
        return self.over_chance.gather(-1, self.most[..., None])[..., 0]

    @property
    def own_lead(self) -> Tensor:
        """float64 [L, D]: the own expert's share over its mean share in the other domains; NaN with one domain, infinite where the others never use it."""
        shares = self.share.transpose(0, 1)  # [D, L, E]
        found = torch.full_like(self.information[:, None].expand(-1, len(self.domains)), torch.nan).clone()
        for domain in range(len(self.domains) if len(self.domains) > 1 else 0):
            others = (shares.sum(0) - shares[domain]) / (len(self.domains) - 1)
            place = self.own[:, domain, None]
            found[:, domain] = (shares[domain].gather(-1, place) / others.gather(-1, place))[:, 0]
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, by layer: information, the oracle's values, and by domain share, over_chance, most_used and own expert."""
        most, lead = self.most_over_chance, self.own_lead
        found = {}
        for layer, name in enumerate(self.layers):
            domains = {
                domain: {
                    "share": self.share[layer, d].tolist(),
                    "over_chance": self.over_chance[layer, d].tolist(),
                    "most_used": {"expert": int(self.most[layer, d]), "over_chance": float(most[layer, d])},
                    "own": {
                        "expert": int(self.own[layer, d]),
                        "over_chance": float(self.over_chance[layer, d, self.own[layer, d]]),
                        "over_other_domains": float(lead[layer, d]),
                    },
                }
                for d, domain in enumerate(self.domains)
            }
            oracle = float(self.oracle[layer])
            found[name] = {
                "information": float(self.information[layer]),
                "oracle": {"over_chance": oracle, "information": math.log(oracle) if oracle > 0 else math.nan},
                "domains": domains,
            }
        return found


def specialisation(routings: Mapping[str, Routing]) -> Specialisation:
    """The numbers of one program's routings, by domain. ValueError for none, and for routings of different programs."""
    if not routings:
        raise ValueError("there is no domain; give the routing of at least one")
    first, *rest = routings.values()
    for other in rest:
        if other.layers != first.layers or other.num_experts != first.num_experts:
            raise ValueError(f"routings of different programs cannot be compared: layers {first.layers} and {other.layers}")
    share_LDE = torch.stack([r.counts.double() / r.tokens[:, None].clamp(min=1) for r in routings.values()], 1)
    chosen_LD1 = share_LDE.sum(-1, keepdim=True)
    slots_LDE = share_LDE / chosen_LD1.clamp(min=1e-300)
    num_domains, experts = share_LDE.shape[1:]
    others_LDE = (share_LDE.sum(1, keepdim=True) - share_LDE) / max(1, num_domains - 1)
    oracle_L = (experts / chosen_LD1[..., 0].mean(1).clamp(min=1e-300)).clamp(max=num_domains)
    return Specialisation(
        tuple(routings), first.layers, share_LDE, slots_LDE * experts, share_LDE.argmax(-1), (share_LDE - others_LDE).argmax(-1),
        mutual_information(slots_LDE), oracle_L,
    )  # fmt: skip


def mutual_information(slots: Tensor) -> Tensor:
    """Nats [L], of shares [L, D, E] that sum to 1 over the experts of each domain; domains weigh alike, whatever their number of tokens."""
    mean = slots.mean(1, keepdim=True)
    terms = torch.xlogy(slots, slots / torch.where(mean > 0, mean, 1))
    return terms.sum(-1).mean(1)

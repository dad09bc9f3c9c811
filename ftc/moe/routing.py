"""Which experts the tokens of a program go to: every mixture of experts listened to, and where asked changed, while the program runs.

A copy of each graph with a mixture in it also calls a listener before the mixture, with what the router gives; the program's own graphs stay as they
are. Counts are summed as batches come by: no token is kept.

    load of expert e             slots that go to e
    pairs a, b                   tokens that chose both
    confidence                   mean over tokens of the largest p;  p = softmax(logits), or sigmoid(logits) over its sum
    saturation                   sum_n |chosen_n and chosen_n of the earlier| / sum_n |chosen_n|    (Muennighoff et al. 2024, arXiv:2409.02060, section 4.1)

Legend: L layers, N tokens of a batch, K experts a token, E experts, S slots (N K without those that no expert took).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ftc.capture.captured import compile_graph
from ftc.capture.program import Captured, Program, as_arguments
from ftc.capture.variants import Variant
from ftc.errors import FtcError
from ftc.parallel.weights import hosts
from ftc.rewrite.outcome import Declined
from ftc.rewrite.router_site import find_router, is_mixture


@dataclass(frozen=True, eq=False)
class Choice:
    """What a router gives for one batch: `layer`, its number in `Mixtures.layers`; indices [N, K] int64, E for none; weights [N, K], floating;
    p [N, E] float32 or better, which sums to 1 over the experts: None where the router's logits were not found in the graph.

    An expert of weight 0 is none: models that drop tokens beyond an expert's capacity often set the weight alone."""

    layer: int
    indices: Tensor
    weights: Tensor
    probabilities: Tensor | None


# Hears each choice, and may give other (indices, weights) of the same shape for the mixture to take.
Listener = Callable[[Choice], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, eq=False)
class Routing:
    """Sums over tokens. `layers`: names; counts [L, E] int64: slots of each expert; pairs [L, E, E] int64: tokens that chose both, on the diagonal those
    that chose the one; tokens [L] int64; unfilled [L] int64: slots that no expert took (dropped tokens); confidence [L] float64, NaN where the router's
    logits were not found."""

    layers: tuple[str, ...]
    counts: Tensor
    pairs: Tensor
    tokens: Tensor
    unfilled: Tensor
    confidence: Tensor

    @property
    def num_experts(self) -> int:
        return self.counts.shape[1]

    @property
    def chosen(self) -> Tensor:
        """float64 [L]: experts a token, on average: K where nothing is dropped."""
        return self.counts.sum(1).double() / self.tokens.clamp(min=1)

    def __add__(self, other: Routing) -> Routing:
        """The routing of both texts. ValueError where they are not of one program."""
        if self.layers != other.layers or self.counts.shape != other.counts.shape:
            raise ValueError(f"routings of different programs do not add up: layers {self.layers} and {other.layers}")
        tokens = self.tokens + other.tokens
        confidence = (self.confidence * self.tokens + other.confidence * other.tokens) / tokens.clamp(min=1)
        return Routing(
            self.layers, self.counts + other.counts, self.pairs + other.pairs, tokens, self.unfilled + other.unfilled, confidence
        )


class Mixtures:
    """The mixtures of experts of a program, in the order of its regions. Changes nothing of the program.

    `layers`: the region's name each, with a number behind it for the second of a region; outside of regions the name of the module that holds the
    experts. FtcError where there is none (`raise-moe` makes them), where layers have different numbers of experts, and for a divided program.
    """

    def __init__(self, program: Program):
        if program.axes:
            raise FtcError(f"the program is divided over ranks ({', '.join(program.axes)}); look at the experts of the whole one")
        self.program = program
        self._functions: dict[tuple[str, int], tuple] = {}
        self._listener: Listener | None = None
        self._places: dict[tuple[str, int], int] = {}
        names, sizes = [], []
        for _, host in hosts(program):
            for number, node in enumerate(_mixtures_of(host)):
                self._places[host.ftc_name, number] = len(names)
                name = str(node.args[4].target).rpartition(".")[0] if host is program else host.ftc_name
                names.append(name if name not in names else f"{name} ({number + 1})")
                sizes.append(int(node.args[4].meta["val"].shape[0]))
        if not names:
            raise FtcError(
                "there are no experts in the form of ftc.moe; the pass raise-moe brings those of a model to it, and `ftc explain MODEL --pass raise-moe` "
                "says where one parts from what is understood"
            )
        if len(set(sizes)) > 1:
            raise FtcError(f"layers have different numbers of experts, {sizes}; all must have as many to be laid beside each other")
        self.layers, self.num_experts = tuple(names), sizes[0]

    @torch.no_grad()
    def run(self, example: Any, listener: Listener | None) -> Any:
        """The program's result for an example (`ftc.capture`), in eval mode, on its device. Not reentrant."""
        args, kwargs = as_arguments(example)
        device = next((p.device for p in self.program.parameters()), torch.device("cpu"))
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        with self._listening(listener):
            return self._call(self.program, (), self.program.bind(args, kwargs))

    @contextlib.contextmanager
    def _listening(self, listener: Listener | None) -> Iterator[None]:
        program, regions = self.program, [r for r in self.program.regions if (r.ftc_name, 0) in self._places]
        training, before = program.training, [region.around for region in regions]
        self._listener = listener
        try:
            program.eval()
            for region in regions:
                region.around = lambda _, args, kwargs, region=region: self._call(region, args, kwargs)
            yield
        finally:
            self._listener = None
            for region, around in zip(regions, before, strict=True):
                region.around = around
            program.train(training)

    def _call(self, host: Captured, args: tuple, kwargs: dict) -> Any:
        """Run a host's variant; the one that hears, where there is a mixture in it."""
        variant, tensors = host.code.find(host, args, kwargs)
        place = host.ftc_name, id(variant)
        if place not in self._functions:
            self._functions[place] = (*self._hearing(host, variant), variant)
        function, attributes, _ = self._functions[place]
        return variant.structured(function(host, *variant.attribute_values(attributes, host.fetch, tensors), *tensors))

    def _hearing(self, host: Captured, variant: Variant) -> tuple[Callable, list[str]]:
        """A function of the variant's graph that tells the listener of each mixture, and the attributes it takes."""
        from ftc.rewrite.pipeline import copy_graph

        graph = copy_graph(variant.captured.graph)
        for number, node in enumerate([node for node in graph.nodes if is_mixture(node)]):
            try:
                router = find_router(node)
                logits, gate = router.logits, router.gate
            except Declined:  # experts that choose tokens, noise: there is no probability of an expert for one token
                logits, gate = None, ""
            with graph.inserting_before(node):
                layer = self._places[host.ftc_name, number]
                heard = graph.call_function(self._hear, (layer, node.args[1], node.args[2], logits, gate))
                indices, weights = (graph.call_function(operator.getitem, (heard, i)) for i in (0, 1))
            node.args = (node.args[0], indices, weights, *node.args[3:])
        function, attributes, _ = compile_graph(graph, variant.captured.constants, f"{variant.name}_heard")
        return function, attributes

    def _hear(self, layer: int, indices: Tensor, weights: Tensor, logits: Tensor | None, gate: str) -> tuple[Tensor, Tensor]:
        if self._listener is None:
            return indices, weights
        taken = torch.where(weights == 0, self.num_experts, indices)
        changed = self._listener(Choice(layer, taken, weights, None if logits is None else _probabilities(logits, gate)))
        return (indices, weights) if changed is None else changed


def _mixtures_of(host: Captured) -> list[fx.Node]:
    """The mixtures in the variant of a host that has most of them."""
    found = [[node for node in variant.captured.graph.nodes if is_mixture(node)] for variant in host.code.all_variants()]
    return max(found, key=len, default=[])


def _probabilities(logits: Tensor, gate: str) -> Tensor:
    logits = logits.detach().flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if gate == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def membership(indices: Tensor, num_experts: int) -> Tensor:
    """float32 [N, E], 1 where the token chose the expert, of indices [N, K] with E for none."""
    chosen = torch.zeros(len(indices), num_experts + 1, device=indices.device)
    return chosen.scatter_(1, indices, 1.0)[:, :num_experts]


class _Counts:
    """Sums over batches, for each layer."""

    def __init__(self, mixtures: Mixtures):
        layers, experts = len(mixtures.layers), mixtures.num_experts
        self.counts, self.pairs = torch.zeros(layers, experts, dtype=torch.int64), torch.zeros(layers, experts, experts, dtype=torch.int64)
        self.tokens, self.unfilled = torch.zeros(layers, dtype=torch.int64), torch.zeros(layers, dtype=torch.int64)
        self.confidence = torch.zeros(layers, dtype=torch.float64)

    def add(self, choice: Choice, indices: Tensor) -> None:
        chosen_NE = membership(indices, self.counts.shape[1])
        pairs_EE = (chosen_NE.T @ chosen_NE).round().to(torch.int64).cpu()  # float32 holds every count of a batch below 2^24 tokens
        self.pairs[choice.layer] += pairs_EE
        self.counts[choice.layer] += pairs_EE.diagonal()
        self.tokens[choice.layer] += len(indices)
        self.unfilled[choice.layer] += indices.numel() - int(pairs_EE.diagonal().sum())
        largest = float("nan") if choice.probabilities is None else float(choice.probabilities.amax(-1).double().sum())
        self.confidence[choice.layer] += largest

    def routing(self, layers: tuple[str, ...]) -> Routing:
        return Routing(layers, self.counts, self.pairs, self.tokens, self.unfilled, self.confidence / self.tokens.clamp(min=1))


def collect(program: Program | Mixtures, batches: Iterable[Any], listener: Listener | None = None) -> Routing:
    """Run the batches (examples as for `ftc.capture`: token ids [B, T], or a dict of inputs) and sum up how they were routed.

    `listener`: changes each choice; what it gives is counted, and the program goes on with it. Every token of a batch counts, padding too, so give
    batches without. ValueError where there is no batch; FtcError as for `Mixtures`.
    """
    mixtures = program if isinstance(program, Mixtures) else Mixtures(program)
    counts = _Counts(mixtures)

    def count(choice: Choice):
        changed = None if listener is None else listener(choice)
        counts.add(choice, choice.indices if changed is None else changed[0])
        return changed

    for batch in batches:
        mixtures.run(batch, count)
    if not int(counts.tokens.sum()):
        raise ValueError("there is no batch to collect the routing of; give at least one of one token")
    return counts.routing(mixtures.layers)


def saturation(program: Program | Mixtures, earlier: Program | Mixtures, batches: Iterable[Any]) -> Tensor:
    """float64 [L]: the share of a program's choices that an earlier checkpoint of it makes too, for the same tokens (each behind its own layers).

    1 where the router has settled; independent random routers give K/E. FtcError where layers or numbers of experts are not the same.
    """
    mixtures, others = (p if isinstance(p, Mixtures) else Mixtures(p) for p in (program, earlier))
    if mixtures.layers != others.layers or mixtures.num_experts != others.num_experts:
        raise FtcError(
            f"the earlier checkpoint has {len(others.layers)} layers of {others.num_experts} experts, this one {len(mixtures.layers)} of "
            f"{mixtures.num_experts}; name an earlier checkpoint of the same model"
        )
    shared, chosen = torch.zeros(len(mixtures.layers), dtype=torch.float64), torch.zeros(len(mixtures.layers), dtype=torch.float64)
    for batch in batches:
        now: dict[int, Tensor] = {}
        mixtures.run(batch, lambda choice, now=now: now.update({choice.layer: membership(choice.indices, mixtures.num_experts)}))

        def compare(choice: Choice, now: Mapping[int, Tensor] = now) -> None:
            before = membership(choice.indices, mixtures.num_experts).to(now[choice.layer].device)
            shared[choice.layer] += float((now[choice.layer] * before).sum())
            chosen[choice.layer] += float(now[choice.layer].sum())

        others.run(batch, compare)
    return shared / chosen.clamp(min=1)


def windows(ids: list[int], context: int, batch: int) -> list[Tensor]:
    """Token ids as batches [B, T] int64 of whole windows of `context` tokens, at most `batch` a time; one shorter window where there are fewer tokens.

    What is left at the end is left out, so that no batch has padding. ValueError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens are too few; give at least two")
    length = min(context, len(ids))
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    return list(whole.split(batch))

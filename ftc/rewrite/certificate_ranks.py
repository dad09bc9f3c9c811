"""Certificates of graphs that run on ranks: all of them in one process, held against the graph before, rank by rank.

`before` may run on ranks itself (stacking products after tensor parallelism): each of its seats gets inputs and weights of its own, which proves more
than equal ones would. An axis that only `after` has is the pass's own. What its ranks see follows from the lenses (a rank gets its pieces of divided
weights) and from the layout (a rank gets its tokens of divided inputs):

    outputs      the whole on every rank, or tokens that are put in order again
    gradients    of divided weights: the pieces put together; of divided inputs: the tokens in order; of all else: the whole on every rank, or,
                 where the layout says `partial`, the sum over the ranks
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ftc.dialect.sequence import in_order, num_chunks, own_part
from ftc.errors import FtcError
from ftc.rewrite import lockstep, probe
from ftc.rewrite.alignment import Alignment
from ftc.rewrite.lens import Lens
from ftc.rewrite.lockstep import Seat, axes_of, seats_of
from ftc.rewrite.shard import on_ranks, placements
from ftc.rewrite.spill import gradients


@dataclass(frozen=True)
class Layout:
    """How a pass divides a graph's inputs and outputs over the ranks of a new axis: the dim of the sequence in each, or None.

    With `own_batches` nothing is divided: each rank has whole inputs of its own."""

    axis: str
    degree: int
    balanced: bool
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    partial: bool = True  # gradients of what all ranks hold alike are one rank's share
    own_batches: bool = False

    @classmethod
    def of_own_batches(cls, graph: fx.Graph, axis: str, degree: int) -> Layout:
        """That of a pass for ranks of data."""
        count = sum(node.op == "placeholder" for node in graph.nodes)
        outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        return cls(axis, degree, False, (None,) * count, (None,) * len(outputs), own_batches=True)

    def as_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self) | {"inputs": list(self.inputs), "outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, data: dict | None) -> Layout | None:
        """What `as_dict` wrote."""
        return data and cls(**data | {"inputs": tuple(data["inputs"]), "outputs": tuple(data["outputs"])})

    def own(self, values: Sequence[Tensor], dims: Sequence[int | None], rank: int) -> list[Tensor]:
        """A rank's part of each tensor."""
        cut = (self.degree, self.balanced)
        return [v if dim is None else own_part(v, dim, rank, *cut) for v, dim in zip(values, dims, strict=True)]


def on_any_ranks(before: fx.Graph, after: fx.Graph) -> bool:
    """Whether either graph works on ranks."""
    return bool(axes_of(before) or axes_of(after))


def fitting_sizes(pair: Alignment, layout: Layout | None, sizes: list[int]) -> list[int]:
    """Sizes rounded up so that every sequence can be divided."""
    axes = axes_of(pair.before) | axes_of(pair.after)
    if (layout is None or layout.own_batches) and not any(_divides_tokens(node) for graph in (pair.before, pair.after) for node in graph.nodes):
        return sizes
    unit = num_chunks(max(axes.values()), True)
    return [-(-size // unit) * unit for size in sizes]


def _divides_tokens(node: fx.Node) -> bool:
    return lockstep.axis_of(node) is not None and "sequence" in str(node.target)


def errors_on_ranks(
    pair: Alignment,
    lenses: Sequence[Lens],
    layout: Layout | None,
    sizes: dict,
    seed: int,
    dtype: torch.dtype | None,
    wide: bool = False,
) -> tuple[list, list]:
    """Per seat of the graph before: (outputs, gradients) of it, and of the one after on each rank of the new axis, in the same form.

    `dtype` float64 lifts. With `wide` only the first is measured, lifted, on the values of the own dtype.
    """
    if layout is not None and layout.own_batches:
        from ftc.rewrite.certificate_batches import errors_with_own_batches

        return errors_with_own_batches(pair, lenses, layout.axis, layout.degree, sizes, seed, dtype, wide)
    before = pair.before
    common = axes_of(before)
    new = {axis: degree for axis, degree in axes_of(pair.after).items() if axis not in common}
    assert len(new) <= 1, f"a pass adds one axis, not {new}"
    lifted = dtype is not None or wide
    inputs, parameters = {}, {}
    for number, seat in enumerate(seats_of(common)):
        given = _spread_ids(before, probe.random_inputs(before, sizes, seed + 1009 * number, dtype), seed)
        inputs[seat] = [_wide(x) if wide else x for x in given]
        drawn = probe.random_parameters(before, seed + 1009 * number, dtype=dtype)
        parameters[seat] = {name: _wide(x) if wide else x for name, x in drawn.items()}
    weights = _functional(before, inputs, parameters, common, pair.kept_before, seed, lifted)
    reference = _measure(before, common, inputs, parameters, weights, pair.kept_before, lifted)
    if wide:
        return [reference[seat] for seat in seats_of(common)], []
    found = _after(pair, common, new, lenses, layout, inputs, parameters, weights, lifted)
    return [reference[seat] for seat in seats_of(common)], [found[seat] for seat in seats_of(common)]


def _spread_ids(graph: fx.Graph, inputs: list[Tensor], seed: int) -> list[Tensor]:
    """The inputs, with ids drawn from the whole vocabulary where they are looked up in one, and some labels that a loss ignores."""
    found = []
    for node, value in zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True):
        limits = {} if value.is_floating_point() or value.dtype == torch.bool else _limits(node)
        if limits:
            generator = torch.Generator().manual_seed(seed * 31 + len(found))
            value = torch.randint(0, min(limits.values()), value.shape, generator=generator).to(value.dtype)
            if "embedding" not in limits and value.numel() > 2:
                value.view(-1)[1] = -100
        found.append(value)
    return found


def _limits(node: fx.Node) -> dict[str, int]:
    """How many ids the operators know that look this integer input up, by operator."""
    found, queue, seen = {}, [node], {node}
    while queue:
        current = queue.pop()
        for user in current.users:
            name, value = str(getattr(user.target, "name", lambda: "")()), user.meta.get("val")
            if "embedding" in name and user.args[1] is current:
                found["embedding"] = int(user.args[0].meta["val"].shape[0])
            elif "cross_entropy" in name or "chunk_logsumexp" in name:
                head = user.args[0] if "cross_entropy_loss" in name else user.args[1]
                found["loss"] = int(head.meta["val"].shape[1 if "cross_entropy_loss" in name else 0])
            elif "rank_offset" in name:
                return {"embedding": user.args[1] * user.args[3]}
            elif isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool and user not in seen:
                seen.add(user)
                queue.append(user)
    return found


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _functional(graph, inputs, parameters, axes, keep, seed, lifted) -> dict[Seat, list[Tensor | None]]:
    """Random weights of each floating output, for a scalar to differentiate."""
    with torch.no_grad():
        outputs = lockstep.run(graph, axes, inputs, parameters, lifted)
    weights = {}
    for number, (seat, values) in enumerate(outputs.items()):
        generator = torch.Generator().manual_seed(seed * 77 + number)
        made = [torch.randn(values[i].shape, generator=generator, dtype=torch.float64) for i in keep]
        weights[seat] = [w.to(values[i].dtype) if values[i].is_floating_point() else None for w, i in zip(made, keep, strict=True)]
    return weights


def _measure(graph, axes, inputs, parameters, weights, keep, lifted) -> dict[Seat, tuple[list[Tensor], Any]]:
    """Outputs, and the gradients of every seat's own copy of the weighted sum, by name."""
    leaves: dict[str, Tensor] = {}
    given, own = {}, {}
    for seat in inputs:
        own[seat] = {}
        for name, value in parameters[seat].items():
            trained = value.is_floating_point() and not name.startswith("_constant_")
            own[seat][name] = leaves[f"{seat}:{name}"] = value.detach().clone().requires_grad_() if trained else value
            if not trained:
                del leaves[f"{seat}:{name}"]
        given[seat] = list(inputs[seat])
        for number, value in enumerate(given[seat]):
            if value.is_floating_point():
                given[seat][number] = leaves[f"{seat}:input:{number}"] = value.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = lockstep.run(graph, axes, given, own, lifted)
        total = None
        for seat, values in outputs.items():
            for i, weight in zip(keep, weights[seat], strict=True):
                if weight is not None and values[i].requires_grad:
                    term = (values[i] * weight).sum().double()
                    total = term if total is None else total + term
        found = {n: torch.zeros_like(t) for n, t in leaves.items()} if total is None else gradients(total, leaves)
    return {
        seat: ([outputs[seat][i].detach() for i in keep], {n.partition(":")[2]: found[n] for n in leaves if n.startswith(f"{seat}:")})
        for seat in inputs
    }


def _after(pair, common, new, lenses, layout, inputs, parameters, weights, lifted) -> dict[Seat, list[tuple[list[Tensor], dict]]]:
    """For each seat of the graph before, what each rank of the new axis shows: outputs and gradients in the form of before."""
    if None in pair.inputs:
        raise FtcError("a pass that adds regions cannot be proved on a program that is divided over ranks; apply it before")
    degree = next(iter(new.values()), 1)
    axes = common | new
    given, own, asked = {}, {}, {}
    output_dims = [None if layout is None else layout.outputs[i] for i in pair.kept_before]
    pieces = {seat: on_ranks(lenses, degree, parameters[seat]) for seat in inputs}
    for seat, rank in itertools.product(inputs, range(degree)):
        place = (*seat, rank) if new else seat
        own[place] = pieces[seat][rank]
        cut, asked[place] = inputs[seat], weights[seat]
        if layout is not None:
            cut = layout.own(inputs[seat], layout.inputs, rank)
            asked[place] = [w if w is None else layout.own([w], [d], rank)[0] for w, d in zip(weights[seat], output_dims, strict=True)]
        given[place] = [cut[place_before] for place_before in pair.inputs]
    measured = _measure(pair.after, axes, given, own, asked, pair.kept_after, lifted)
    renamed = {f"input:{number}": f"input:{place}" for number, place in enumerate(pair.inputs)}
    measured = {seat: (outs, {renamed.get(name, name): g for name, g in grads.items()}) for seat, (outs, grads) in measured.items()}
    placed = placements(lenses)
    found = {}
    for seat in inputs:
        ranks = [measured[(*seat, r) if new else seat] for r in range(degree)]
        found[seat] = [_as_before(r, ranks, layout, output_dims, placed, lenses) for r in range(degree)]
    return found


def _as_before(rank: int, ranks: list, layout: Layout | None, output_dims: list, placed: dict, lenses: Sequence[Lens]) -> tuple[list[Tensor], dict]:
    """A rank's outputs and gradients; what is divided, or one rank's share, is put together from all ranks."""
    outputs, grads = ranks[rank]
    outputs = [
        out if dim is None else in_order([r[0][i] for r in ranks], dim, layout.balanced)
        for i, (out, dim) in enumerate(zip(outputs, output_dims, strict=True))
    ]
    joined = {}
    for name, value in grads.items():
        every = [r[1][name] for r in ranks]
        kind, _, number = name.partition(":")
        dim = layout.inputs[int(number)] if layout is not None and kind == "input" and number else None
        if dim is not None:
            joined[name] = in_order(every, dim, layout.balanced)
        elif name in placed:
            joined[name] = placed[name].whole(every)
        else:
            joined[name] = sum(every[1:], every[0]) if layout is not None and layout.partial else value
    with torch.no_grad():
        for lens in reversed(lenses):
            joined = lens.backward(joined)
    return outputs, joined

"""Certificates of passes whose ranks have batches of their own (expert parallelism): each rank against the graph before on that rank's batch.

    outputs      of rank r: those of the graph before on r's inputs
    gradients    of inputs and of what ranks hold alike: rank r's own, those of the graph before on r's inputs
                 of divided weights: the pieces put together are the *sum* of the gradients before, over the batches of all ranks

That is what data parallelism asks of a rank: what it adds up over ranks afterwards is the first kind, and the second has been added up already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.rewrite import certificate_ranks as alike
from ftc.rewrite import probe
from ftc.rewrite.alignment import Alignment
from ftc.rewrite.lens import Lens
from ftc.rewrite.lockstep import Seat, axes_of, seats_of
from ftc.rewrite.shard import on_ranks, placements

Measured = tuple[list[Tensor], Any]  # outputs, and gradients by name


def errors_with_own_batches(
    pair: Alignment, lenses: Sequence[Lens], axis: str, degree: int, sizes: dict, seed: int, dtype: torch.dtype | None, wide: bool = False
) -> tuple[list[Measured], list[list[Measured]]]:
    """Per seat of the graph before and rank of `axis`: what the graph before gives on that rank's batch, and what the rank gives.

    Arguments and results as of `certificate_ranks.errors_on_ranks`."""
    if None in pair.inputs:
        raise FtcError("a pass that adds regions cannot be proved on a program that is divided over ranks; apply it before")
    common, lifted, ranks = axes_of(pair.before), dtype is not None or wide, range(degree)
    seats, parameters = seats_of(common), {}
    for number, seat in enumerate(seats):
        drawn = probe.random_parameters(pair.before, seed + 1009 * number, dtype=dtype)
        parameters[seat] = {name: _wide(x) if wide else x for name, x in drawn.items()}
    inputs, weights, expected = {}, {}, {}
    for rank in ranks:
        own = seed + 104_729 * rank
        inputs[rank] = {seat: _inputs(pair, sizes, own + 1009 * n, dtype, wide) for n, seat in enumerate(seats)}
        weights[rank] = alike._functional(pair.before, inputs[rank], parameters, common, pair.kept_before, own, lifted)
        expected[rank] = alike._measure(pair.before, common, inputs[rank], parameters, weights[rank], pair.kept_before, lifted)
    places = [(*seat, rank) for seat in seats for rank in ranks]
    reference = [_summed(place, expected, lenses) for place in places]
    if wide:
        return reference, []
    found = _after(pair, lenses, common | {axis: degree}, seats, inputs, weights, parameters, lifted)
    return reference, [[found[place]] for place in places]


def _inputs(pair: Alignment, sizes: dict, seed: int, dtype: torch.dtype | None, wide: bool) -> list[Tensor]:
    given = alike._spread_ids(pair.before, probe.random_inputs(pair.before, sizes, seed, dtype), seed)
    return [_wide(x) if wide else x for x in given]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _summed(place: Seat, expected: dict[int, dict[Seat, Measured]], lenses: Sequence[Lens]) -> Measured:
    """A rank's reference, with the gradients of divided weights (which such a pass divides under their own names) summed over all ranks' batches."""
    *seat, rank = place
    outputs, own = expected[rank][tuple(seat)]
    others = [by_seat[tuple(seat)][1] for by_seat in expected.values()]
    return outputs, dict(own) | {name: sum(grads[name] for grads in others) for name in placements(lenses) if name in own}


def _after(pair, lenses, axes, seats, inputs, weights, parameters, lifted) -> dict[Seat, Measured]:
    """What each rank shows, in the form of the graph before."""
    degree = list(axes.values())[-1]
    given, own, asked = {}, {}, {}
    for seat in seats:
        for rank, pieces in enumerate(on_ranks(lenses, degree, parameters[seat])):
            place = (*seat, rank)
            given[place] = [inputs[rank][seat][number] for number in pair.inputs]
            own[place], asked[place] = pieces, weights[rank][seat]
    measured = alike._measure(pair.after, axes, given, own, asked, pair.kept_after, lifted)
    renamed = {f"input:{number}": f"input:{place}" for number, place in enumerate(pair.inputs)}
    placed, found = placements(lenses), {}
    for place, (outputs, grads) in measured.items():
        seat = place[:-1]
        joined = {}
        for name, grad in grads.items():
            every = [measured[(*seat, rank)][1][name] for rank in range(degree)] if name in placed else []
            joined[renamed.get(name, name)] = placed[name].whole(every) if every else grad
        with torch.no_grad():
            for lens in reversed(lenses):
                joined = lens.backward(joined)
        found[place] = (outputs, joined)
    return found

"""Draws that the tests of the planner share."""

from hypothesis import strategies as st
from hypothesis.strategies import composite

from ftc.plan.costs import Costs
from ftc.plan.known import NAMES, fits, known

SECONDS = st.floats(0.25, 2.0)


@composite
def costs_of(draw, count: int, exchange: bool = True, memory: bool = True) -> Costs:
    """Unequal costs of `count` parts."""
    row = st.lists(SECONDS, min_size=count, max_size=count).map(tuple)
    small = st.lists(st.floats(0.0, 0.8), min_size=count, max_size=count).map(tuple)
    return Costs(
        draw(row),
        draw(row),
        draw(row),
        exchange_forward=draw(small) if exchange else (),
        exchange_backward=draw(small) if exchange else (),
        activation_bytes=draw(row) if memory else (),
        pending_bytes=draw(small) if memory else (),
        fixed_bytes=draw(small) if memory else (),
        boundary_bytes=draw(small)[: count - 1],
        hop_latency=draw(st.floats(0.0, 0.3)),
        bytes_per_second=draw(st.sampled_from([1.0, 10.0, float("inf")])),
        hidden_share=draw(st.sampled_from([0.0, 0.7, 1.0])),
    )


@composite
def known_schedules(draw, most_ranks: int = 5, most_microbatches: int = 12):
    """(name, schedule, placement, number of microbatches) of a known schedule of any size that fits."""
    name = draw(st.sampled_from(NAMES))
    sizes = [(p, m) for p in range(1, most_ranks + 1) for m in range(1, most_microbatches + 1) if fits(name, p, m)]
    ranks, microbatches = draw(st.sampled_from(sizes))
    schedule, placement = known(name, ranks, microbatches)
    return name, schedule, placement, microbatches

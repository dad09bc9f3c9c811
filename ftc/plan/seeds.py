"""Keys to start a search from: known schedules, rules, and the periodic patterns of which most pipeline schedules are made.

A pattern repeats every `period` (the busiest rank's work on one microbatch): F of stage s comes `slope` forwards after F of the stage before, with
one slope on the first half of the stages and one on the second, and likewise I on the way back. Slopes set how long activations live, so
small ones are the schedules of low memory: the building blocks of Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", arXiv:2405.15362.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from torch.distributed.pipelining.schedules import _Action

from ftc.plan.actions import B, F, I, parts
from ftc.plan.dispatch import ALONE, PAIR_FULL, PAIR_INPUT, Dispatcher, Keys, Manner
from ftc.plan.modulo import modulo_keys
from ftc.plan.simulate import Simulated

FIRST, LAST = -1e12, 1e12  # before and after all times


def from_times(problem: Dispatcher, simulated: Simulated) -> Keys:
    """A schedule's own start times, and its pairs."""
    forward, backward, weight = (_rows(problem) for _ in range(3))
    flags = [[[ALONE] * problem.count for _ in problem.forward] for _ in range(2)]
    for rank, actions in simulated.actions.items():
        for action, start in zip(actions, simulated.starts[rank], strict=True):
            for part in parts(action):
                stage, microbatch = part.stage_index, part.microbatch_index - problem.offset[part.stage_index]
                if action.sub_actions is not None:
                    flags[part.computation_type != F][stage][microbatch] = _pair_kind(action)
                if part.computation_type == F:
                    forward[stage][microbatch] = start
                elif part.computation_type in (I, B):
                    backward[stage][microbatch] = start
                # A full backward's W follows its I at once.
                if part.computation_type not in (F, I):
                    weight[stage][microbatch] = start
    return Keys(forward, backward, weight, *flags)


def _pair_kind(action: _Action) -> int:
    return PAIR_FULL if action.sub_actions[1].computation_type == B else PAIR_INPUT


def by_rule(problem: Dispatcher, backward_first: bool, deep: bool, pairs: int = ALONE) -> Keys:
    """One kind before the other, W when nothing else is there; late stages first (`deep`), or old microbatches first."""
    count = problem.count
    order = [[-place if deep else m - place * 1e-3 for m in range(count)] for place in problem.at]
    before, after = (FIRST, 0.0) if backward_first else (0.0, FIRST)
    return Keys(
        [[after + key for key in row] for row in order],
        [[before + key for key in row] for row in order],
        [[LAST + m for m in range(count)] for _ in order],
        *([[pairs] * count for _ in order] for _ in range(2)),
    )


def periodic(problem: Dispatcher, slopes: tuple[float, float, float, float], delay: float, pairs: int = ALONE) -> Keys:
    """A pattern of period work: slopes of F on both halves and of I on both halves of the way back; W `delay` periods after I."""
    stages, count = len(problem.forward), problem.count
    work = [problem.forward[s] + problem.backward[s] + problem.weight[s] for s in range(stages)]
    period = max(sum(work[s] for s in local) for local in problem.local)
    forward, backward, weight = [0.0] * stages, [0.0] * stages, [0.0] * stages
    for chain in problem.placement.chains:
        half, time = len(chain) / 2, 0.0
        for place, s in enumerate(chain):
            forward[s] = time
            time += (problem.forward[s] + problem.hop[s]) * (slopes[0] if place + 1 < half else slopes[1])
        time = forward[chain[-1]] + problem.forward[chain[-1]]
        for place, s in reversed(list(enumerate(chain))):
            backward[s], weight[s] = time, time + problem.backward[s] + delay * period
            time += (problem.backward[s] + (problem.hop[s - 1] if place else 0.0)) * (slopes[2] if place > half else slopes[3])
    rows = ([[start + m * period for m in range(count)] for start in starts] for starts in (forward, backward, weight))
    return Keys(*rows, *([[pairs] * count for _ in range(stages)] for _ in range(2)))


def all_keys(problem: Dispatcher) -> Iterator[tuple[Keys, Manner]]:
    """Rules, modulo schedules, then patterns; with exposed communication rules and patterns also with all pairs wanted."""
    unit = min(problem.forward)
    wanted = (ALONE, PAIR_FULL, PAIR_INPUT) if problem.pairing else (ALONE,)
    for pairs, deep, backward_first in product(wanted, (True, False), (True, False)):
        yield from ((by_rule(problem, backward_first, deep, pairs), manner) for manner in (Manner(), Manner(unit)))
    for keys in modulo_keys(problem):
        yield from ((keys, manner) for manner in (Manner(strict=True), Manner(), Manner(math.inf)))
    for slopes, delay, pairs in product(product((1, 2, 3), repeat=4), (1.0, 0.0), wanted):
        yield from ((periodic(problem, slopes, delay, pairs), manner) for manner in (Manner(), Manner(unit)))


def _rows(problem: Dispatcher) -> list[list[float]]:
    return [[0.0] * problem.count for _ in problem.forward]

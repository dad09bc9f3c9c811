"""Local search on keys: change some wanted times, dispatch again, keep what is not worse.

Each step starts from the start times of a schedule that was kept, so keys stay on the scale of real seconds. To get out of a local best, a
schedule that is a little longer is kept for a while, less and less as time runs out; the best one is never forgotten.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from ftc.plan.dispatch import ALONE, PAIR_FULL, PAIR_INPUT, Dispatched, Dispatcher, Keys, Manner, Rows

Change = Callable[["Neighbours", Keys, float], None]


class Neighbours:
    """Random changes of keys; `unit` seconds is the shortest action, the scale of all shifts."""

    def __init__(self, problem: Dispatcher, rng: random.Random) -> None:
        self.problem, self.rng = problem, rng
        self.stages, self.count = range(len(problem.forward)), problem.count
        self.unit = min(second for row in (problem.forward, problem.backward, problem.weight) for second in row if second > 0)

    def change(self, keys: Keys, seconds: float) -> None:
        """Change `keys` in place; `seconds` is how long their schedule takes."""
        moves: list[Change] = [_noise, _shift_stage, _shift_run, _shift_weights, _shift_all_weights, _noise_in_window]
        if self.problem.pairing:
            moves += [_flip_pairs, _flip_pairs]
        self.rng.choice(moves)(self, keys, seconds)

    def manner(self) -> Manner:
        rng, unit = self.rng, self.unit
        if rng.random() < 0.5:
            return Manner(strict=True)
        wait = rng.choice((0.0, 0.1, 0.3, 1.0, 3.0, math.inf)) * unit
        pair_wait = rng.choice((0.0, 1.0, 3.0, math.inf, math.inf)) * unit if self.problem.pairing else math.inf
        return Manner(wait, pair_wait, self.problem.pairing and rng.random() < 0.3)

    def shift(self) -> float:
        return self.rng.choice((-5.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 5.0)) * self.unit


def _rows(keys: Keys) -> tuple[Rows, Rows, Rows]:
    return keys.forward, keys.backward, keys.weight


def _noise(near: Neighbours, keys: Keys, seconds: float) -> None:
    sigma, gauss = near.rng.choice((0.2, 1.0, 3.0)) * near.unit, near.rng.gauss
    for rows in _rows(keys):
        for row in rows:
            row[:] = [key + gauss(0.0, sigma) for key in row]


def _noise_in_window(near: Neighbours, keys: Keys, seconds: float) -> None:
    """Only one rank's, and only in a part of the step."""
    rng, local = near.rng, near.rng.choice(near.problem.local)
    start = rng.random() * seconds
    end, sigma = start + rng.choice((5, 20, 60)) * near.unit, rng.choice((1.0, 3.0)) * near.unit
    for rows in _rows(keys):
        for s in local:
            rows[s][:] = [key + rng.gauss(0.0, sigma) if start < key < end else key for key in rows[s]]


def _shift_stage(near: Neighbours, keys: Keys, seconds: float) -> None:
    rows, stage, by = near.rng.choice((keys.forward, keys.backward)), near.rng.choice(near.stages), near.shift()
    rows[stage][:] = [key + by for key in rows[stage]]


def _shift_run(near: Neighbours, keys: Keys, seconds: float) -> None:
    """Some microbatches in a row, of one kind and stage."""
    rows, stage, by = near.rng.choice(_rows(keys)), near.rng.choice(near.stages), near.shift()
    start = near.rng.randrange(near.count)
    for m in range(start, min(near.count, start + near.rng.randrange(1, near.count + 1))):
        rows[stage][m] += by


def _shift_weights(near: Neighbours, keys: Keys, seconds: float) -> None:
    by = 2 * near.shift()
    for s in near.rng.choice(near.problem.local):
        keys.weight[s][:] = [key + by for key in keys.weight[s]]


def _shift_all_weights(near: Neighbours, keys: Keys, seconds: float) -> None:
    by = 2 * near.shift()
    for row in keys.weight:
        row[:] = [key + by for key in row]


def _flip_pairs(near: Neighbours, keys: Keys, seconds: float) -> None:
    """Want some forwards of a stage, or some backwards, in pairs, or alone."""
    rng = near.rng
    flags = rng.choice((keys.pairs_forward, keys.pairs_backward))[rng.choice(near.stages)]
    start, wanted = rng.randrange(near.count), rng.choice((ALONE, PAIR_FULL, PAIR_INPUT))
    for m in range(start, min(near.count, start + rng.choice((1, 2, 4, near.count)))):
        flags[m] = wanted


def improve(
    problem: Dispatcher,
    start: Dispatched,
    caps: Sequence[float],
    rng: random.Random,
    tries: int,
    stop: Callable[[Dispatched, int], bool] = lambda best, tried: False,
    slack: float = 0.004,
) -> Dispatched:
    """The best schedule found in `tries` steps from `start`, which it never falls behind. `slack`: how much longer, as a share, a
    schedule may be and still be gone on from, at the beginning. `stop(best, tried)` ends it early.
    """
    near, best, current = Neighbours(problem, rng), start, start
    for tried in range(tries):
        if stop(best, tried):
            break
        allowed = best.seconds * (1 + slack * (1 - tried / tries) ** 2)
        keys = current.keys.copy()
        for _ in range(rng.choice((1, 1, 2))):
            near.change(keys, current.seconds)
        found = problem.run(keys, near.manner(), caps, limit=max(current.seconds, allowed) + 1e-9)
        if found is None:
            continue
        if found.score <= current.score or found.seconds <= allowed:
            current = found
        if found.score < best.score:
            best = current = found
    return best

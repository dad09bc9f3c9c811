"""Formats for a budget of KL: the fewest bytes whose loss stays within it.

    minimise  sum_u bytes(u, f_u)      with      r sum_u KL(u, f_u) <= budget

KL(u, f) is what unit u loses alone (`ftc.quantize.sensitivity`), r what the sum misses: it is measured with all chosen formats at once, after which is chosen
again. The choice takes for a price per nat the best format of each unit, the price found by halving, and spends what is left greedily. At the end the loss is
measured on text that nothing was chosen on; past the budget, formats are made finer until it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftc.capture.program import Program
from ftc.quantize.calibrate import calibrate
from ftc.quantize.formats import Format
from ftc.quantize.sensitivity import Sensitivity, Unit, assignments
from ftc.quantize.trial import Loss, Store, Trials
from ftc.rewrite.calibration import Batches

Choice = Mapping[Unit, Format | None]
ROUNDS = 4  # of choosing and measuring on the text of the sensitivities
REPAIRS = 8
MARGIN = 0.95  # of the budget is aimed at: what is measured at the end is other text


@dataclass
class Chosen:
    """A choice with what was predicted for it, what was measured on text apart, and the factor r of the last prediction."""

    choice: dict[Unit, Format | None]
    predicted: float
    measured: float
    factor: float
    repairs: int
    store: Store

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes(format) for unit, format in self.choice.items())


def cheapest(found: Sensitivity, budget: float) -> dict[Unit, Format | None]:
    """The fewest bytes with a sum of losses of at most `budget`; everything as it is where nothing else fits."""
    best = dict.fromkeys(found.units)
    low, high = -60.0, 60.0  # log2 of the price, bytes a nat
    for _ in range(80):
        middle = (low + high) / 2
        choice = {u: min(found.options(u), key=lambda f, u=u: (u.num_bytes(f) + 2.0**middle * found.lost(u, f), found.lost(u, f))) for u in found.units}
        if total(found, choice) <= budget:
            best, high = choice, middle
        else:
            low = middle
    return _spend(found, best, budget)


def _spend(found: Sensitivity, choice: dict[Unit, Format | None], budget: float) -> dict[Unit, Format | None]:
    """One unit after the other made coarser, the one that saves most bytes first, while the sum stays within the budget."""
    choice, left = dict(choice), budget - total(found, choice)
    while True:
        moves = [
            (u.num_bytes(choice[u]) - u.num_bytes(f), -(found.lost(u, f) - found.lost(u, choice[u])), u, f)
            for u in found.units
            for f in found.options(u)
            if u.num_bytes(f) < u.num_bytes(choice[u]) and found.lost(u, f) - found.lost(u, choice[u]) <= left
        ]
        if not moves:
            return choice
        _, cost, unit, format = max(moves, key=lambda move: move[:2])
        choice[unit] = format
        left += cost


def total(found: Sensitivity, choice: Choice) -> float:
    """The sum of the losses of a choice."""
    return sum(found.lost(unit, format) for unit, format in choice.items())


def fit_budget(
    program: Program, found: Sensitivity, budget: float, text: Batches, loss: Loss, apart: Batches, nearest: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Chosen:  # fmt: skip
    """Choose formats for `budget` nats a token; see the module's docstring. `loss` measures on the text of the sensitivities, `apart` is other text."""
    factor, choice, aim = 1.0, None, MARGIN * budget
    for _ in range(ROUNDS):
        tried = cheapest(found, aim / factor)
        if tried == choice:
            break
        choice = tried
        store = _rounded(program, choice, text, nearest, tell)
        measured = _on(loss, store).of(assignments(choice))
        factor = _factor(found, choice, measured)
        tell(f"formats: {measured:.5f} of {budget:g} nats, {sum(u.num_bytes(f) for u, f in choice.items()):,} bytes")
        if 0.9 * aim <= measured <= aim:
            break
    held = Loss(Trials(program, store), apart)
    predicted, measured, repairs = factor * total(found, choice), held.of(assignments(choice)), 0
    while measured > budget and repairs < REPAIRS:
        repairs += 1
        factor = _factor(found, choice, measured)
        aim *= MARGIN
        choice = cheapest(found, min(aim / factor, total(found, choice) * MARGIN)) if repairs < REPAIRS else dict.fromkeys(found.units)
        tell(f"past the budget ({measured:.5f} of {budget:g} nats): finer formats")
        store = _rounded(program, choice, text, nearest, tell)
        predicted, measured = factor * total(found, choice), _on(held, store).of(assignments(choice))
    return Chosen(choice, predicted, measured, factor, repairs, store)


def _factor(found: Sensitivity, choice: Choice, measured: float) -> float:
    expected = total(found, choice)
    return measured / expected if expected > 0 and measured > 0 else 1.0


def _rounded(program: Program, choice: Choice, text: Batches, nearest: bool, tell) -> Store:
    store = Store()
    wanted = {region: {weight: [f] for weight, f in weights.items()} for region, weights in assignments(choice).items()}
    calibrate(program, wanted, text, store, nearest=nearest, tell=tell)
    return store


def _on(loss: Loss, store: Store) -> Loss:
    """The same text and distributions, with another store of values."""
    loss.trials = Trials(loss.trials.program, store)
    return loss

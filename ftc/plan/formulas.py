"""Published bubbles: how long a rank has no work in a step, for stages that all cost the same and hops that take no time.

F, I and W are seconds of one stage of the schedule's own size, B = I + W, F&B those of a pair, P ranks:

    GPipe, 1F1B        (P - 1)(F + B)                  any costs            Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1
    Interleaved1F1B    (P - 1)(F + B)                  any costs            the same, section 2.2.2: stages are 1 / v of a rank's share
    ZB1P               (P - 1)(F + B - 2 W)            W <= F and W <= I    DeepSeek-V3, arXiv:2412.19437, table 2 (arXiv:2401.10241: ZB-H1)
    DualPipe           (P / 2 - 1)(F&B + B - 3 W)      F = I and W <= F     the same table; a stage is a P-th of the model
    DualPipeV          (P - 1)(F&B + B - 3 W)          F = I and W <= F     half of it: 2 P stages, in the formula above in the place of P

The conditions are not in the papers; they are where simulated bubbles equal the formula (beyond them a W no longer fits the gaps it is
meant for). Every rank has this bubble; where pairs hide communication (F&B < F + B) ranks with fewer pairs have less, and it is the most of any.
"""

from __future__ import annotations

from ftc.errors import FtcError, nearest
from ftc.plan.known import check_numbers

FORMULAS = ("GPipe", "1F1B", "Interleaved1F1B", "ZB1P", "DualPipe", "DualPipeV")


def bubble(
    name: str, num_ranks: int, num_microbatches: int, forward: float, backward_input: float, backward_weight: float, pair: float | None = None
) -> float:
    """Seconds without work of a rank (of the rank with most, where `pair` is shorter than F + B).

    Costs are seconds of one stage; `pair` is F + B unless told. Raises FtcError for a schedule without a formula, for numbers the schedule does not
    fit, and for costs outside the formula's conditions.
    """
    if name not in FORMULAS:
        raise FtcError(f"no bubble formula for {name!r}: {nearest(name, FORMULAS)}")
    check_numbers(name, num_ranks, num_microbatches)
    f, i, w = forward, backward_input, backward_weight
    both = f + i + w if pair is None else pair
    if name in ("GPipe", "1F1B", "Interleaved1F1B"):
        return (num_ranks - 1) * (f + i + w)
    if name == "ZB1P":
        if w > min(f, i):
            raise FtcError(f"ZB1P with F {f}, I {i}, W {w}: its formula holds where W is at most F and at most I")
        return (num_ranks - 1) * (f + i - w)
    if f != i or w > f:
        raise FtcError(f"{name} with F {f}, I {i}, W {w}: its formula holds where F = I and W is at most F")
    halves = num_ranks / 2 - 1 if name == "DualPipe" else num_ranks - 1
    return halves * (both + i - 2 * w)

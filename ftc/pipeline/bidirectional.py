"""DualPipe: microbatches enter a pipeline from both ends at once (DeepSeek-V3, arXiv:2412.19437, section 3.2.1 and figure 5).

    rank                    0    1   ...  P-1
    direction 0, stage      0    1   ...  P-1      half of the microbatches, 0 .. M/2-1
    direction 1, stage     2P-1 2P-2 ...   P       the others, M/2 .. M-1

Stage P + k is a copy of stage k for the other direction and lies on rank P-1-k, so a rank holds the parts r and P-1-r of the model, and
each part is on two ranks. A copy sees half of the microbatches; `ftc.pipeline.TiedParameters` sums the gradients of both before the optimizer steps,
and so the copies stay the same. The order of steps is that of DeepSeek's own code (github.com/deepseek-ai/DualPipe, dualpipe.py, `DualPipe.step`).
"""

from __future__ import annotations

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from ftc.errors import FtcError

F, I, W = _ComputationType.FORWARD, _ComputationType.BACKWARD_INPUT, _ComputationType.BACKWARD_WEIGHT
B, PAIR = _ComputationType.FULL_BACKWARD, _ComputationType.OVERLAP_F_B


def check_numbers(num_ranks: int, num_microbatches: int) -> None:
    """FtcError, with numbers that would do, where DualPipe does not have a schedule: an even number of ranks, and of microbatches, at least two a rank."""
    if num_ranks < 2 or num_ranks % 2:
        raise FtcError(f"DualPipe on {num_ranks} ranks: it runs in both directions on an even number of ranks; use {max(2, num_ranks - 1)} or {num_ranks + 1}")
    if num_microbatches % 2 or num_microbatches < 2 * num_ranks:
        fits = max(2 * num_ranks, num_microbatches + num_microbatches % 2)
        raise FtcError(
            f"DualPipe on {num_ranks} ranks with {num_microbatches} microbatches: it takes an even number of them, {2 * num_ranks} or more, as half "
            f"of them enters at each end; use {fits}"
        )


def actions(num_ranks: int, num_microbatches: int) -> dict[int, list[_Action | None]]:
    """What each rank computes, in order; stages and microbatches are numbered as in the module's docstring. FtcError: `check_numbers`."""
    check_numbers(num_ranks, num_microbatches)
    return {rank: _Rank(rank, num_ranks, num_microbatches).steps() for rank in range(num_ranks)}


class _Rank:
    """The list of one rank as it is written. A *phase* is a direction as the rank sees it: phase 0 comes from the nearer end."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int):
        self.half = num_microbatches // 2
        self.far = rank >= num_ranks // 2
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.from_end = min(rank, num_ranks - 1 - rank)
        self.to_middle = num_ranks // 2 - 1 - self.from_end
        self.main = self.half - num_ranks + self.from_end + 1
        self.counts = {(phase, kind): 0 for phase in (0, 1) for kind in (F, B)}
        self.waiting: list[_Action] = []  # weight gradients, the oldest first
        self.done: list[_Action | None] = []

    def steps(self) -> list[_Action | None]:
        for _ in range(2 * self.to_middle):  # 1: F0
            self.add(F, 0)
        for _ in range(self.from_end + 1):  # 2: F0 F1
            self.add(F, 0)
            self.add(F, 1)
        for _ in range(self.to_middle):  # 3: I1 W1 F1
            self.add(I, 1)
            self.weights()
            self.add(F, 1)
        for number in range(self.main):  # 4: F0 & B1, F1 & B0
            if number == 0 and self.to_middle == 0:  # one after the other here: that is less of a bubble
                self.add(F, 0)
                self.add(B, 1)
            else:
                self.pair(0, 1)
            self.pair(1, 0)
        for _ in range(self.to_middle):  # 5: B1, F1 & B0
            self.add(B, 1)
            self.pair(1, 0)
        kind = B
        for number in range(self.from_end + 1):  # 6: B1 B0, in the second half with weight gradients put off
            if number == (self.from_end + 1) // 2 and self.from_end % 2 == 1:
                kind = I
            self.add(kind, 1)
            if number == (self.from_end + 1) // 2 and self.from_end % 2 == 0:
                kind = I
            self.add(kind, 0)
        for _ in range(self.to_middle):  # 7: W I0
            self.weights()
            self.add(I, 0)
        while self.waiting:  # 8: W
            self.weights()
        return self.done

    def add(self, kind: _ComputationType, phase: int) -> None:
        self.done.append(self.action(kind, phase))

    def pair(self, forward: int, backward: int) -> None:
        self.done.append(_Action(-1, PAIR, None, (self.action(F, forward), self.action(B, backward))))

    def weights(self) -> None:
        self.done.append(self.waiting.pop(0))

    def action(self, kind: _ComputationType, phase: int) -> _Action:
        counted = F if kind == F else B
        direction = phase ^ self.far
        microbatch = self.counts[phase, counted] + direction * self.half
        self.counts[phase, counted] += 1
        if kind == I:
            self.waiting.append(_Action(self.stages[direction], W, microbatch))
        return _Action(self.stages[direction], kind, microbatch)

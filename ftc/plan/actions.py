"""What a schedule is made of: torch's actions, the placement of stages on ranks, and the order in which data passes them.

A schedule is `dict[int rank, list[_Action | None]]`, as `torch.distributed.pipelining` has it; None is a slot without work. Kinds
of computation, for stage s and microbatch m:

    sFm  forward                    sIm  gradient of the stage's input          sWm  gradient of its weights
    sBm  I and W as one             (sFm;tBn)OVERLAP_F_B  a forward and a backward that run at the same time
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from ftc.errors import FtcError, nearest

F = _ComputationType.FORWARD
I = _ComputationType.BACKWARD_INPUT
W = _ComputationType.BACKWARD_WEIGHT
B = _ComputationType.FULL_BACKWARD
PAIR = _ComputationType.OVERLAP_F_B

Schedule = dict[int, list["_Action | None"]]
STYLES = ("loop", "v", "bidirectional")


@dataclass(frozen=True)
class Placement:
    """Which rank holds each stage, and along which chains of stages microbatches pass.

    `style`: "loop" (stage s on rank s mod P), "v" (0..P-1, then back P-1..0, and so on) or "bidirectional" (DualPipe: stages
    0..P-1 on ranks 0..P-1 and their mirrored copies P..2P-1 on ranks P-1..0; half of the microbatches pass each chain).
    `ranks`: the rank of each stage.
    """

    style: str
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise FtcError(f"placement {self.style!r}: {nearest(self.style, STYLES)}")
        held = set(self.ranks)
        if not self.ranks or held != set(range(len(held))):
            raise FtcError(f"stages placed on ranks {list(self.ranks)}: every rank from 0 to {max(held, default=0)} needs a stage")

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @cached_property
    def num_ranks(self) -> int:
        return max(self.ranks) + 1

    @cached_property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """The stages that a microbatch passes in turn; two chains for "bidirectional", else one."""
        if self.style != "bidirectional":
            return (tuple(range(self.num_stages)),)
        half = self.num_stages // 2
        return tuple(range(half)), tuple(range(half, self.num_stages))

    @cached_property
    def previous(self) -> tuple[int | None, ...]:
        """For each stage the one before it in its chain, None for a first one."""
        firsts = {chain[0] for chain in self.chains}
        return tuple(None if stage in firsts else stage - 1 for stage in range(self.num_stages))

    @cached_property
    def following(self) -> tuple[int | None, ...]:
        """For each stage the one after it in its chain, None for a last one."""
        lasts = {chain[-1] for chain in self.chains}
        return tuple(None if stage in lasts else stage + 1 for stage in range(self.num_stages))

    def position(self, stage: int) -> int:
        """Which part of the model a stage holds: its place in its chain."""
        return stage % len(self.chains[0])

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, holder in enumerate(self.ranks) if holder == rank)

    def microbatches(self, stage: int, num_microbatches: int) -> range:
        """The microbatches that pass `stage`: all, or with two chains the first half on the first and the second half on the second."""
        if len(self.chains) == 1:
            return range(num_microbatches)
        half = num_microbatches // 2
        return range(half) if stage in self.chains[0] else range(half, num_microbatches)


def place(style: str, num_ranks: int, stages_per_rank: int = 1) -> Placement:
    """The placement of `num_ranks * stages_per_rank` stages; FtcError where the style does not have such a one.

    "bidirectional" has two stages a rank, the second of them a mirrored copy (DeepSeek-V3, arXiv:2412.19437, figure 5).
    """
    if num_ranks < 1 or stages_per_rank < 1:
        raise FtcError(f"{num_ranks} ranks with {stages_per_rank} stages each: both must be at least 1")
    if style == "loop":
        return Placement("loop", tuple(range(num_ranks)) * stages_per_rank)
    there, back = tuple(range(num_ranks)), tuple(reversed(range(num_ranks)))
    if style == "v":
        return Placement("v", sum(((there, back)[turn % 2] for turn in range(stages_per_rank)), ()))
    if style == "bidirectional":
        if num_ranks % 2 or stages_per_rank != 2:
            raise FtcError(f"DualPipe on {num_ranks} ranks, {stages_per_rank} stages each: it needs an even number of ranks and 2 stages a rank")
        return Placement("bidirectional", there + back)
    raise FtcError(f"placement {style!r}: {nearest(style, STYLES)}")


def parts(action: _Action) -> tuple[_Action, ...]:
    """The actions that a pair is made of, or the action itself."""
    return (action,) if action.sub_actions is None else action.sub_actions


def pair(forward: _Action, backward: _Action) -> _Action:
    """One action of a forward and a backward that run at the same time, as torch spells it."""
    return _Action(-1, PAIR, None, (forward, backward))


def compact(schedule: Schedule) -> dict[int, list[_Action]]:
    """The schedule without its empty slots, ranks in order."""
    return {rank: [action for action in schedule[rank] if action is not None] for rank in sorted(schedule)}


def every_part(schedule: Schedule) -> Iterator[tuple[int, int, _Action]]:
    """(rank, slot, action) of every single computation, pairs taken apart."""
    for rank in sorted(schedule):
        for slot, action in enumerate(schedule[rank]):
            if action is not None:
                for part in parts(action):
                    yield rank, slot, part


def placement_of(schedule: Schedule, style: str | None = None) -> Placement:
    """The placement that a schedule's actions imply: the rank of each stage; the style is told, or found by comparison.

    DualPipe's stages are on the ranks of a V; what tells them apart is that its two halves see different microbatches.
    Raises FtcError where a stage is on two ranks, is left out, or where the placement is none of the known ones and no style was given.
    """
    holder: dict[int, int] = {}
    for rank, slot, action in every_part(schedule):
        first = holder.setdefault(action.stage_index, rank)
        if first != rank:
            raise FtcError(f"stage {action.stage_index} is on rank {first} and, slot {slot}, on rank {rank}: a stage lives on one rank")
    missing = sorted(set(range(max(holder, default=-1) + 1)) - set(holder))
    if missing or not holder:
        raise FtcError(f"no action for stage {missing[0] if missing else 0}: stages are numbered from 0 without gaps")
    ranks = tuple(holder[stage] for stage in range(len(holder)))
    if style is not None:
        return Placement(style, ranks)
    num_ranks = max(ranks) + 1
    if _mirrored(schedule, ranks, num_ranks):
        return Placement("bidirectional", ranks)
    for known in ("loop", "v"):
        if len(ranks) % num_ranks == 0 and place(known, num_ranks, len(ranks) // num_ranks).ranks == ranks:
            return Placement(known, ranks)
    raise FtcError(f"stages on ranks {list(ranks)}: neither a loop nor a V; valid styles: {', '.join(STYLES)}")


def _mirrored(schedule: Schedule, ranks: tuple[int, ...], num_ranks: int) -> bool:
    """Whether these are two chains: placed as such, with no microbatch on both."""
    if num_ranks % 2 or len(ranks) != 2 * num_ranks or ranks != place("bidirectional", num_ranks, 2).ranks:
        return False
    seen: tuple[set[int | None], set[int | None]] = (set(), set())
    for _, _, action in every_part(schedule):
        seen[action.stage_index >= num_ranks].add(action.microbatch_index)
    return seen[0].isdisjoint(seen[1])

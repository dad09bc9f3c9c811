"""Proof that a schedule is whole and cannot deadlock: every action once, and an order of all events in which nothing waits for ever.

Two executions stand behind a proof:

1. compute alone: each rank takes its actions in order, an action waits for what it needs (`messages.needs`);
2. with sends and receives as torch's runtime adds them, all of them blocking: a send ends when the receiver is at the matching receive, and
   a rank does nothing meanwhile. Whatever runs to the end under that rule does so under any weaker one: sends that only start,
   receives posted early, messages between two ranks served one at a time in the order of the lists.

Why one execution is enough: a rank's list is fixed, so an action that can run now can still run after any other has run. If one order
of events gets to the end, none can get stuck.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.distributed.pipelining.schedules import _Action

from ftc.errors import FtcError
from ftc.plan.actions import PAIR, B, F, I, Placement, Schedule, W, compact, every_part, parts
from ftc.plan.messages import SEND_B, SEND_F, Key, makes, message_key, needs, with_messages


@dataclass(frozen=True)
class Proof:
    """order: (rank, action) of all computation in an order that respects every list and every need; with_messages: the lists as run,
    sends and receives included; num_messages: how many are sent.
    """

    order: tuple[tuple[int, _Action], ...]
    with_messages: dict[int, tuple[_Action, ...]]
    num_messages: int


def prove(schedule: Schedule, placement: Placement, num_microbatches: int) -> Proof:
    """A `Proof`, or FtcError naming the action that is missing, there twice or misplaced, or the cycle of waits."""
    check_whole(schedule, placement, num_microbatches)
    lists = compact(schedule)
    order = ordered(lists, placement)
    messages = with_messages(schedule, placement)
    rendezvous(messages, placement)
    sends = sum(action.computation_type in (SEND_F, SEND_B) for rank in messages.values() for action in rank)
    return Proof(tuple(order), {rank: tuple(actions) for rank, actions in messages.items()}, sends)


def check_whole(schedule: Schedule, placement: Placement, num_microbatches: int) -> None:
    """FtcError unless each stage has, for each of its microbatches, one F and either one B or one I and one W, on the stage's own rank."""
    if sorted(schedule) != list(range(placement.num_ranks)):
        raise FtcError(f"a schedule for ranks {sorted(schedule)}: the stages are placed on ranks 0 to {placement.num_ranks - 1}")
    seen: Counter[_Action] = Counter()
    for rank, slot, action in every_part(schedule):
        _check_place(action, rank, slot, placement, num_microbatches)
        seen[action] += 1
        if seen[action] > 1:
            raise FtcError(f"{action} is there twice, the second time on rank {rank}, slot {slot}")
    for rank in sorted(schedule):
        for action in schedule[rank]:
            if action is not None and action.computation_type == PAIR:
                _check_pair(action, rank)
    for stage in range(placement.num_stages):
        for microbatch in placement.microbatches(stage, num_microbatches):
            _check_complete(stage, microbatch, seen)


def _check_place(action: _Action, rank: int, slot: int, placement: Placement, num_microbatches: int) -> None:
    stage, where = action.stage_index, f"{action} on rank {rank}, slot {slot}"
    if action.computation_type not in (F, I, W, B):
        raise FtcError(f"{where}: a schedule holds F, I, W, B and pairs of them alone")
    if not 0 <= stage < placement.num_stages:
        raise FtcError(f"{where}: there are stages 0 to {placement.num_stages - 1}")
    if placement.ranks[stage] != rank:
        raise FtcError(f"{where}: stage {stage} is placed on rank {placement.ranks[stage]}")
    allowed = placement.microbatches(stage, num_microbatches)
    if action.microbatch_index not in allowed:
        raise FtcError(f"{where}: stage {stage} sees microbatches {allowed.start} to {allowed.stop - 1}")


def _check_pair(action: _Action, rank: int) -> None:
    kinds = [part.computation_type for part in parts(action)]
    if len(kinds) != 2 or kinds[0] != F or kinds[1] not in (B, I):
        raise FtcError(f"{action} on rank {rank}: a pair is a forward and then a backward B or I")


def _check_complete(stage: int, microbatch: int, seen: Counter[_Action]) -> None:
    there = {kind.value for kind in (F, I, W, B) if _Action(stage, kind, microbatch) in seen}
    if there in ({"F", "B"}, {"F", "I", "W"}):
        return
    if "F" not in there:
        raise FtcError(f"{stage}F{microbatch} is missing")
    if "B" in there:
        raise FtcError(f"stage {stage} has {stage}B{microbatch} and also {sorted(there - {'F', 'B'})[0]}: a full backward is I and W already")
    missing = sorted({"I", "W"} - there)
    raise FtcError(f"{stage}{missing[0]}{microbatch} is missing" if len(missing) == 1 else f"{stage}B{microbatch} (or I and W) is missing")


def ordered(lists: dict[int, list[_Action]], placement: Placement) -> list[tuple[int, _Action]]:
    """All (rank, action) in an order in which each finds what it needs; FtcError with the cycle of waits where there is none."""
    at, made, order = dict.fromkeys(lists, 0), set(), []
    waiting: dict[Key, list[int]] = {}
    runnable = list(reversed(lists))
    while runnable:
        rank = runnable.pop()
        while at[rank] < len(lists[rank]):
            action = lists[rank][at[rank]]
            missing = [key for part in parts(action) for key in needs(part, placement) if key not in made]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            order.append((rank, action))
            at[rank] += 1
            for key in filter(None, map(makes, parts(action))):
                made.add(key)
                runnable.extend(waiting.pop(key, ()))
    if any(at[rank] < len(lists[rank]) for rank in lists):
        raise FtcError(f"deadlock: {_cycle(lists, at, made, placement)}")
    return order


def _cycle(lists: dict[int, list[_Action]], at: dict[int, int], made: set[Key], placement: Placement) -> str:
    """Who waits for whom, once round: each rank's next action, what it needs, and the rank that has that further down its list."""
    holder = {key: rank for rank, order in lists.items() for action in order for key in map(makes, parts(action)) if key is not None}
    rank = next(rank for rank in lists if at[rank] < len(lists[rank]))
    path: list[tuple[int, str]] = []
    while rank not in [visited for visited, _ in path]:
        action = lists[rank][at[rank]]
        missing = next(key for part in parts(action) for key in needs(part, placement) if key not in made)
        path.append((rank, f"rank {rank} waits at {action} for {missing[1]}{missing[0]}{missing[2]}"))
        rank = holder[missing]
    start = [visited for visited, _ in path].index(rank)
    return ", ".join(text for _, text in path[start:]) + f", which rank {rank} has only after {lists[rank][at[rank]]}"


def rendezvous(lists: dict[int, list[_Action]], placement: Placement) -> None:
    """Run lists with sends and receives, all blocking; FtcError naming what each rank waits at where they do not all come to an end."""
    at = dict.fromkeys(lists, 0)
    made: dict[int, set[Key]] = {rank: set() for rank in lists}
    active = list(lists)
    while active:
        rank = active.pop()
        while at[rank] < len(lists[rank]):
            action = lists[rank][at[rank]]
            if action.is_compute_op:
                held = made[rank] | {makes(part) for part in parts(action)} if action.sub_actions else made[rank]
                if not all(key in held for part in parts(action) for key in needs(part, placement)):
                    break
                made[rank].update(key for part in parts(action) if (key := makes(part)) is not None)
                at[rank] += 1
                continue
            peer = _peer(action, placement)
            other = lists[peer][at[peer]] if at[peer] < len(lists[peer]) else None
            if not _match(action, other, placement) or not _have(action, rank, made, placement):
                break
            made[peer if action.computation_type in (SEND_F, SEND_B) else rank].add(message_key(action, placement))
            at[rank] += 1
            at[peer] += 1
            active.append(peer)
    stuck = {rank: lists[rank][at[rank]] for rank in lists if at[rank] < len(lists[rank])}
    if stuck:
        raise FtcError(f"deadlock with blocking messages: {', '.join(f'rank {rank} waits at {action}' for rank, action in stuck.items())}")


def _have(action: _Action, rank: int, made: dict[int, set[Key]], placement: Placement) -> bool:
    """Whether the sender has what it is to send; the receiver's side is asked for the sender."""
    sender = rank if action.computation_type in (SEND_F, SEND_B) else _peer(action, placement)
    return message_key(action, placement) in made[sender]


def _peer(action: _Action, placement: Placement) -> int:
    kind, stage, _ = message_key(action, placement)
    target = placement.following[stage] if kind == "F" else placement.previous[stage]
    sends = action.computation_type in (SEND_F, SEND_B)
    return placement.ranks[target if sends else stage]


def _match(action: _Action, other: _Action | None, placement: Placement) -> bool:
    if other is None or other.is_compute_op:
        return False
    return (action.computation_type in (SEND_F, SEND_B)) != (other.computation_type in (SEND_F, SEND_B)) and message_key(
        action, placement
    ) == message_key(other, placement)

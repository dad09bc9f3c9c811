"""A schedule with its sends and receives, in the order in which torch's runtime adds them.

torch (`_add_send_recv`) goes round the ranks in order; an action is appended once what it needs has been received, and with it, at the
same moment, the send to its own rank's list and the receive to the other rank's. So all lists are projections of one sequence
of events in which a send and its receive are one event. This is the same for placements with two chains (DualPipe), which torch's has not.
"""

from __future__ import annotations

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from ftc.errors import FtcError
from ftc.plan.actions import F, Placement, Schedule, W, compact, parts

SEND_F, RECV_F = _ComputationType.SEND_F, _ComputationType.RECV_F
SEND_B, RECV_B = _ComputationType.SEND_B, _ComputationType.RECV_B

Key = tuple[str, int, int]  # what a computation makes: ("F" or "I", stage, microbatch)


def makes(part: _Action) -> Key | None:
    """What others may wait for: the output of a forward, the input's gradient of a backward."""
    if part.computation_type == W:
        return None
    return ("F" if part.computation_type == F else "I", part.stage_index, part.microbatch_index)


def needs(part: _Action, placement: Placement) -> list[Key]:
    """What has to exist before a single computation may start, its own stage's part first."""
    kind, stage, microbatch = part.computation_type, part.stage_index, part.microbatch_index
    if kind == F:
        previous = placement.previous[stage]
        return [] if previous is None else [("F", previous, microbatch)]
    if kind == W:
        return [("I", stage, microbatch)]
    following = placement.following[stage]
    return [("F", stage, microbatch), *([] if following is None else [("I", following, microbatch)])]


def receiver(key: Key, placement: Placement) -> tuple[int, int] | None:
    """(stage, rank) that a result is sent to, None where it stays on its rank or ends there."""
    kind, stage, _ = key
    target = placement.following[stage] if kind == "F" else placement.previous[stage]
    if target is None or placement.ranks[target] == placement.ranks[stage]:
        return None
    return target, placement.ranks[target]


def with_messages(schedule: Schedule, placement: Placement) -> dict[int, list[_Action]]:
    """Each rank's actions with sends and receives, as torch's runtime would run them. Raises FtcError where no order of events exists."""
    orders = compact(schedule)
    lists: dict[int, list[_Action]] = {rank: [] for rank in orders}
    held: dict[int, set[Key]] = {rank: set() for rank in orders}
    positions = dict.fromkeys(orders, 0)
    while any(positions[rank] < len(orders[rank]) for rank in orders):
        before = sum(positions.values())
        for rank, order in orders.items():
            if positions[rank] < len(order) and _ready(order[positions[rank]], held[rank], placement):
                _append(order[positions[rank]], rank, lists, held, placement)
                positions[rank] += 1
        if sum(positions.values()) == before:
            stuck = {rank: orders[rank][positions[rank]] for rank in orders if positions[rank] < len(orders[rank])}
            raise FtcError(f"no order of sends and receives exists; waiting: {', '.join(f'{a} on rank {r}' for r, a in stuck.items())}")
    return lists


def _ready(action: _Action, held: set[Key], placement: Placement) -> bool:
    own = {makes(part) for part in parts(action)}
    return all(key in held or key in own for part in parts(action) for key in needs(part, placement))


def _append(action: _Action, rank: int, lists: dict[int, list[_Action]], held: dict[int, set[Key]], placement: Placement) -> None:
    lists[rank].append(action)
    for part in parts(action):
        key = makes(part)
        if key is None:
            continue
        held[rank].add(key)
        target = receiver(key, placement)
        if target is not None:
            forward = part.computation_type == F
            lists[rank].append(_Action(part.stage_index, SEND_F if forward else SEND_B, part.microbatch_index))
            lists[target[1]].append(_Action(target[0], RECV_F if forward else RECV_B, part.microbatch_index))
            held[target[1]].add(key)


def message_key(action: _Action, placement: Placement) -> Key:
    """What a send or a receive carries."""
    kind, stage, microbatch = action.computation_type, action.stage_index, action.microbatch_index
    if kind == SEND_F:
        return ("F", stage, microbatch)
    if kind == SEND_B:
        return ("I", stage, microbatch)
    if kind == RECV_F:
        return ("F", placement.previous[stage], microbatch)
    return ("I", placement.following[stage], microbatch)

"""When each action of a schedule starts and ends, how long ranks idle, and what they hold: a simulation by events, on paper only.

    start(a) = max(end of the action before a on its rank, arrivals of what a needs),    end(a) = start(a) + seconds(a)

Two readings of a message from rank p to rank q:

"asynchronous"  it leaves when the action that made it ends and arrives `hop` seconds later, as many at a time as there are.
"torch"         as torch's runtime has them: the receive is posted where `messages.with_messages` puts it in q's list, so a rank that is busy posts
                it late; a message moves once both sides have posted it, and messages of one direction between two ranks follow each other.

Memory of a rank: F adds its stage's activations when it starts; I (or B) turns them into what W needs (or into nothing) when it ends,
W frees that when it ends; weights, gradients and optimizer state are there throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.pipelining.schedules import _Action

from ftc.errors import FtcError, nearest
from ftc.plan.actions import B, F, I, Placement, Schedule, W, compact, parts
from ftc.plan.costs import Costs
from ftc.plan.messages import RECV_B, RECV_F, SEND_B, SEND_F, Key, makes, message_key, needs, with_messages

RUNTIMES = ("asynchronous", "torch")


@dataclass(frozen=True)
class Simulated:
    """What a schedule takes.

    actions, starts, ends: for each rank its actions without empty slots, and their seconds from the start of the step.
    step_seconds: end of the last action of any rank.   busy: seconds of work of each rank.
    memory: for each rank (seconds, bytes) after every change, the first at time 0.   peak_bytes: the most of each rank.
    """

    actions: dict[int, tuple[_Action, ...]]
    starts: dict[int, tuple[float, ...]]
    ends: dict[int, tuple[float, ...]]
    step_seconds: float
    busy: tuple[float, ...]
    memory: tuple[tuple[tuple[float, float], ...], ...]
    peak_bytes: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds of the step in which each rank has no work: its bubble."""
        return tuple(self.step_seconds - busy for busy in self.busy)

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time without work, 0 to 1."""
        return sum(self.idle) / (self.step_seconds * len(self.busy))


def action_seconds(action: _Action, costs: Costs, placement: Placement) -> float:
    """Seconds of one action, its exposed communication included; of a pair, `Costs.pair_seconds`."""
    if action.sub_actions is not None:
        forward, backward = action.sub_actions
        here, there = placement.position(forward.stage_index), placement.position(backward.stage_index)
        return costs.pair_seconds(here, there, full=backward.computation_type == B)
    part = placement.position(action.stage_index)
    if action.computation_type == F:
        return costs.forward[part] + costs.exchange_forward[part]
    if action.computation_type == W:
        return costs.backward_weight[part]
    backward = costs.backward_input[part] + costs.exchange_backward[part]
    return backward if action.computation_type == I else backward + costs.backward_weight[part]


def check_sizes(costs: Costs, placement: Placement) -> None:
    """FtcError where the costs are not those of this placement's stages."""
    if len(costs) != len(placement.chains[0]):
        raise FtcError(f"costs of {len(costs)} stages for a placement of {len(placement.chains[0])}: join regions into that many stages first")


def simulate(schedule: Schedule, costs: Costs, placement: Placement, runtime: str = "asynchronous") -> Simulated:
    """Run a schedule on paper. Raises FtcError where it cannot go on (see `prove` for the reason) or where the sizes do not fit."""
    check_sizes(costs, placement)
    if runtime not in RUNTIMES:
        raise FtcError(f"runtime {runtime!r}: {nearest(runtime, RUNTIMES)}")
    lists = compact(schedule) if runtime == "asynchronous" else with_messages(schedule, placement)
    if sorted(lists) != list(range(placement.num_ranks)):
        raise FtcError(f"a schedule of ranks {sorted(lists)} for a placement on {placement.num_ranks} ranks")
    clock = _Clock(lists, costs, placement, posted=runtime == "torch")
    clock.run()
    actions = {rank: tuple(action for action in lists[rank] if action.is_compute_op) for rank in lists}
    starts = {rank: tuple(clock.starts[rank]) for rank in lists}
    ends = {rank: tuple(clock.ends[rank]) for rank in lists}
    busy = tuple(sum(e - s for s, e in zip(starts[rank], ends[rank], strict=True)) for rank in lists)
    memory = tuple(_memory(rank, actions[rank], starts[rank], ends[rank], costs, placement) for rank in lists)
    peaks = tuple(max(held for _, held in line) for line in memory)
    return Simulated(actions, starts, ends, max(max(times, default=0.0) for times in ends.values()), busy, memory, peaks)


class _Clock:
    """Each rank's place in its list and its time; a rank goes on until it needs what nobody has made yet."""

    def __init__(self, lists: dict[int, list[_Action]], costs: Costs, placement: Placement, posted: bool) -> None:
        self.lists, self.costs, self.placement, self.posted = lists, costs, placement, posted
        self.at = dict.fromkeys(lists, 0)
        self.now = dict.fromkeys(lists, 0.0)
        self.starts: dict[int, list[float]] = {rank: [] for rank in lists}
        self.ends: dict[int, list[float]] = {rank: [] for rank in lists}
        self.made: dict[Key, float] = {}  # when a result exists on its own rank
        self.received: dict[Key, float] = {}  # when the receive of a result was posted
        self.moved: dict[Key, float] = {}  # when a posted message arrived
        self.queues: dict[tuple[int, int], list[Key]] = {}  # per direction, messages in the order of their receives
        self.link: dict[tuple[int, int], float] = {}  # until when a direction is taken
        self.seconds: dict[tuple, float] = {}

    def run(self) -> None:
        waiting: dict[Key, list[int]] = {}
        runnable = list(self.lists)
        while runnable:
            rank = runnable.pop()
            for key in self._go(rank, waiting):
                runnable.extend(waiting.pop(key, ()))
        stuck = {rank: self.lists[rank][at] for rank, at in self.at.items() if at < len(self.lists[rank])}
        if stuck:
            raise FtcError(f"the schedule cannot go on: {', '.join(f'rank {rank} waits at {action}' for rank, action in stuck.items())}")

    def _go(self, rank: int, waiting: dict[Key, list[int]]) -> list[Key]:
        """Advance one rank as far as it gets; what it has made."""
        made, order = [], self.lists[rank]
        while self.at[rank] < len(order):
            action = order[self.at[rank]]
            if action.computation_type in (SEND_F, SEND_B):
                self.made[message_key(action, self.placement)] = max(self.now[rank], self.made[message_key(action, self.placement)])
            elif action.computation_type in (RECV_F, RECV_B):
                self._post(rank, message_key(action, self.placement))
            else:
                start = self._start(rank, action, waiting)
                if start is None:
                    return made
                made += self._finish(rank, action, start)
            self.at[rank] += 1
        return made

    def _post(self, rank: int, key: Key) -> None:
        self.received[key] = self.now[rank]
        self.queues.setdefault((self.placement.ranks[key[1]], rank), []).append(key)

    def _start(self, rank: int, action: _Action, waiting: dict[Key, list[int]]) -> float | None:
        start = self.now[rank]
        for part in parts(action):
            for key in needs(part, self.placement):
                if key not in self.made:
                    waiting.setdefault(key, []).append(rank)
                    return None
                start = max(start, self._arrival(key, rank))
        return start

    def _finish(self, rank: int, action: _Action, start: float) -> list[Key]:
        # A pair costs what its two stages do, whatever the microbatches.
        shape = (action.stage_index, action.computation_type, *(part[:2] for part in action.sub_actions or ()))
        if shape not in self.seconds:
            self.seconds[shape] = action_seconds(action, self.costs, self.placement)
        end = start + self.seconds[shape]
        self.starts[rank].append(start)
        self.ends[rank].append(end)
        self.now[rank] = end
        keys = [key for part in parts(action) if (key := makes(part)) is not None]
        for key in keys:
            self.made[key] = end
        return keys

    def _arrival(self, key: Key, rank: int) -> float:
        """When what exists somewhere is here; of posted messages, all that go before it in its direction move first."""
        source = self.placement.ranks[key[1]]
        if source == rank:
            return self.made[key]
        if not self.posted:
            return self.made[key] + self._hop(key)
        queue = self.queues[source, rank]
        while key not in self.moved:
            head = queue.pop(0)
            sent = max(self.made[head], self.received[head], self.link.get((source, rank), 0.0))
            self.link[source, rank] = sent + self._hop(head) - self.costs.hop_latency
            self.moved[head] = sent + self._hop(head)
        return self.moved[key]

    def _hop(self, key: Key) -> float:
        kind, stage, _ = key
        position = self.placement.position(stage)
        return self.costs.hop(position if kind == "F" else position - 1)


def _memory(
    rank: int, actions: tuple[_Action, ...], starts: tuple[float, ...], ends: tuple[float, ...], costs: Costs, placement: Placement
) -> tuple[tuple[float, float], ...]:
    held = sum(costs.fixed_bytes[placement.position(stage)] for stage in placement.stages_of(rank))
    line = [(0.0, held)]
    for action, start, end in zip(actions, starts, ends, strict=True):
        for part in parts(action):
            if part.computation_type == F:
                held += costs.activation_bytes[placement.position(part.stage_index)]
                line.append((start, held))
        for part in parts(action):
            position = placement.position(part.stage_index)
            kept, pending = costs.activation_bytes[position], costs.pending_bytes[position]
            change = {F: 0.0, I: pending - kept, B: -kept, W: -pending}[part.computation_type]
            if part.computation_type != F:
                held += change
                line.append((end, held))
    return tuple(line)

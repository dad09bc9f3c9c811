"""I and W that follow each other become one full backward B where nobody waits for the I meanwhile.

A full backward is one pass over the graph, cheaper to launch, but its result leaves only after W. Take the latest times at which every action may
start without the step getting longer. In that schedule B may stand where its W ended last if what waits for the I starts late enough; all
such B at once keep every other action at its latest time, so the step stays as short as it was.
"""

from __future__ import annotations

from torch.distributed.pipelining.schedules import _Action

from ftc.plan.actions import B, F, I, Placement, Schedule, W, compact, pair, parts
from ftc.plan.costs import Costs
from ftc.plan.messages import Key, makes, needs
from ftc.plan.prove import ordered
from ftc.plan.simulate import Simulated, action_seconds, simulate


def fuse(schedule: Schedule, costs: Costs, placement: Placement) -> Schedule:
    """The schedule with B for I and W where that costs nothing; its simulated step is not longer."""
    simulated = simulate(schedule, costs, placement)
    latest = _latest_starts(simulated, costs, placement)
    due = _due(simulated, latest, costs, placement)
    fused: Schedule = {}
    for rank, actions in compact(schedule).items():
        kept: list[_Action | None] = []
        for index, action in enumerate(actions):
            before = kept[-1] if kept else None
            if _follows(before, action) and latest[rank][index] + costs.backward_weight[placement.position(action.stage_index)] <= due.get(
                makes(before), simulated.step_seconds
            ):
                kept[-1] = _Action(action.stage_index, B, action.microbatch_index)
            else:
                kept.append(action)
        fused[rank] = kept
    return fused


def full_backwards(schedule: Schedule) -> Schedule:
    """The schedule with B in the place of every I, whatever it costs, and without W."""

    def full(action: _Action) -> _Action:
        if action.sub_actions is not None:
            return pair(*(full(part) for part in action.sub_actions))
        return action._replace(computation_type=B) if action.computation_type == I else action

    return {rank: [full(action) for action in actions if action.computation_type != W] for rank, actions in compact(schedule).items()}


def _follows(before: _Action | None, action: _Action) -> bool:
    return (
        before is not None
        and before.computation_type == I
        and action.computation_type == W
        and (before.stage_index, before.microbatch_index) == (action.stage_index, action.microbatch_index)
    )


def _latest_starts(simulated: Simulated, costs: Costs, placement: Placement) -> dict[int, list[float]]:
    """When each action may start at the latest, in the order of its rank, if the step is not to get longer."""
    latest: dict[int, list[float]] = {rank: [] for rank in simulated.actions}
    due: dict[Key, float] = {}
    for rank, action in reversed(ordered(compact(simulated.actions), placement)):
        end = latest[rank][-1] if latest[rank] else simulated.step_seconds
        end = min([end, *(due[key] for part in parts(action) if (key := makes(part)) in due)])
        latest[rank].append(end - action_seconds(action, costs, placement))
        for part in parts(action):
            for key in needs(part, placement):
                due[key] = min(due.get(key, simulated.step_seconds), latest[rank][-1] - _hop(key, rank, costs, placement))
    return {rank: starts[::-1] for rank, starts in latest.items()}


def _due(simulated: Simulated, latest: dict[int, list[float]], costs: Costs, placement: Placement) -> dict[Key, float]:
    """When each input gradient has to exist for the other ranks' latest times (a rank's own W comes along)."""
    due: dict[Key, float] = {}
    for rank, actions in simulated.actions.items():
        for start, action in zip(latest[rank], actions, strict=True):
            for part in parts(action):
                for key in needs(part, placement):
                    if part.computation_type not in (F, W) and key[0] == "I":
                        due[key] = start - _hop(key, rank, costs, placement)
    return due


def _hop(key: Key, rank: int, costs: Costs, placement: Placement) -> float:
    kind, stage, _ = key
    if placement.ranks[stage] == rank:
        return 0.0
    position = placement.position(stage)
    return costs.hop(position if kind == "F" else position - 1)

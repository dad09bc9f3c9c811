"""Proofs: whole schedules pass, each kind of defect is named, and messages are those of torch's own lowering."""

import random

import pytest
from helpers_plan import known_schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action, _add_send_recv

from ftc.errors import FtcError
from ftc.plan.actions import B, F, I, W, compact, pair, parts, place
from ftc.plan.known import known
from ftc.plan.messages import makes, needs, with_messages
from ftc.plan.prove import prove, rendezvous


@given(drawn=known_schedules())
@settings(max_examples=50)
def test_known_schedules_are_proved_by_an_order_that_holds(drawn):
    _, schedule, placement, microbatches = drawn
    proof = prove(schedule, placement, microbatches)
    made = set()
    for _, action in proof.order:
        own = {makes(part) for part in parts(action)}
        assert all(key in made or key in own for part in parts(action) for key in needs(part, placement))
        made |= own
    for rank, row in compact(schedule).items():
        assert [action for where, action in proof.order if where == rank] == row


@given(drawn=known_schedules())
@settings(max_examples=50)
def test_messages_are_those_that_torch_adds(drawn):
    name, schedule, placement, _ = drawn
    if name == "DualPipe":
        # torch has no placement with two chains; there every send has its receive.
        lists = with_messages(schedule, placement)
        kinds = [action.computation_type.value for row in lists.values() for action in row]
        assert kinds.count("SEND_F") == kinds.count("RECV_F") > 0 and kinds.count("SEND_B") == kinds.count("RECV_B") > 0
        return
    torchs = _add_send_recv({rank: list(row) for rank, row in schedule.items()}, lambda stage: placement.ranks[stage], placement.num_stages)
    assert with_messages(schedule, placement) == torchs


@given(data=st.data(), drawn=known_schedules(4, 8))
def test_a_missing_action_is_named(data, drawn):
    _, schedule, placement, microbatches = drawn
    rank = data.draw(st.sampled_from(sorted(schedule)))
    slot = data.draw(st.integers(0, len(schedule[rank]) - 1))
    lost = schedule[rank][slot]
    broken = {**schedule, rank: schedule[rank][:slot] + schedule[rank][slot + 1 :]}
    with pytest.raises(FtcError, match="is missing|schedule for ranks") as caught:
        prove(broken, placement, microbatches)
    assert any(f"{part.stage_index}{kind}{part.microbatch_index}" in str(caught.value) for part in parts(lost) for kind in "FIWB")


@given(data=st.data(), drawn=known_schedules(4, 8))
def test_an_action_that_is_there_twice_is_named(data, drawn):
    _, schedule, placement, microbatches = drawn
    rank = data.draw(st.sampled_from(sorted(schedule)))
    again = data.draw(st.sampled_from(schedule[rank]))
    with pytest.raises(FtcError, match="is there twice") as caught:
        prove({**schedule, rank: [*schedule[rank], again]}, placement, microbatches)
    assert str(parts(again)[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[0].append(_Action(0, I, 0)), "a full backward is I and W already"),
        (lambda rows: rows[1].append(_Action(0, W, 0)), "stage 0 is placed on rank 0"),
        (lambda rows: rows[0].append(_Action(0, F, 9)), "microbatches 0 to 3"),
        (lambda rows: rows[0].append(_Action(7, F, 0)), "stages 0 to 1"),
        (lambda rows: rows.pop(1), "ranks 0 to 1"),
        (lambda rows: rows[0].append(pair(_Action(0, B, 0), _Action(0, F, 0))), "twice"),
    ],
)
def test_misplaced_actions_are_named(change, words):
    schedule, placement = known("1F1B", 2, 4)
    change(schedule)
    with pytest.raises(FtcError, match=words):
        prove(schedule, placement, 4)


def test_a_pair_is_a_forward_and_then_a_backward():
    rows = {0: [_Action(0, F, 0), pair(_Action(0, B, 0), _Action(0, F, 1)), _Action(0, B, 1)]}
    with pytest.raises(FtcError, match="a pair is a forward"):
        prove(rows, place("loop", 1), 2)


def test_a_cycle_of_waits_is_told_once_round():
    # Rank 0 wants its backward before the forward that rank 1 needs for it, and rank 1 wants another one first.
    rows = {
        0: [_Action(0, F, 0), _Action(0, B, 0), _Action(0, F, 1), _Action(0, B, 1)],
        1: [_Action(1, F, 1), _Action(1, B, 1), _Action(1, F, 0), _Action(1, B, 0)],
    }
    with pytest.raises(FtcError, match="deadlock: rank 0 waits at 0B0 for 1I0, rank 1 waits at 1F1 for 0F1, which rank 0 has only after 0B0"):
        prove(rows, place("loop", 2), 2)


def test_an_action_before_what_it_needs_on_its_own_rank_is_a_deadlock():
    schedule, placement = known("ZB1P", 2, 2)
    for rank, row in schedule.items():
        first = next(n for n, action in enumerate(row) if action.computation_type == I)
        weight = row.index(_Action(rank, W, row[first].microbatch_index))
        broken = {**schedule, rank: [*row[:first], row[weight], *row[first:weight], *row[weight + 1 :]]}
        with pytest.raises(FtcError, match="deadlock"):
            prove(broken, placement, 2)


@given(drawn=known_schedules(4, 8), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_shuffled_orders_are_proved_or_refused_as_an_exhaustive_run_says(drawn, seed):
    _, schedule, placement, microbatches = drawn
    rng, rows = random.Random(seed), {rank: list(row) for rank, row in schedule.items()}
    for _ in range(rng.randrange(4)):
        row = rows[rng.randrange(len(rows))]
        n = rng.randrange(len(row))
        row.insert(rng.randrange(len(row)), row.pop(n))
    try:
        prove(rows, placement, microbatches)
        proved = True
    except FtcError as error:
        assert "deadlock" in str(error)
        proved = False
    assert proved == _runs(rows, placement)


def _runs(rows, placement):
    """Whether all actions get done, one at a time, whichever can go."""
    left, made = {rank: list(row) for rank, row in rows.items()}, set()
    moved = True
    while moved:
        moved = False
        for row in left.values():
            if row and all(key in made for part in parts(row[0]) for key in needs(part, placement)):
                made |= {makes(part) for part in parts(row.pop(0))}
                moved = True
    return not any(left.values())


@given(drawn=known_schedules(4, 8))
def test_blocking_messages_in_torchs_order_come_to_an_end(drawn):
    _, schedule, placement, _ = drawn
    rendezvous(with_messages(schedule, placement), placement)


def test_messages_in_an_order_that_blocks_are_refused():
    schedule, placement = known("1F1B", 2, 2)
    lists = with_messages(schedule, placement)
    # Rank 1 sends its first gradient before it receives the second activations; the other way round each waits for the other.
    row = lists[1]
    send = next(n for n, action in enumerate(row) if action.computation_type.value == "SEND_B")
    receive = max(n for n, action in enumerate(row) if action.computation_type.value == "RECV_F")
    assert receive < send
    row.insert(send, row.pop(receive))
    with pytest.raises(FtcError, match="deadlock with blocking messages"):
        rendezvous(lists, placement)
    lists = with_messages(schedule, placement)
    lists[1] = [action for action in lists[1] if action.computation_type.value != "RECV_F"]
    with pytest.raises(FtcError, match="deadlock with blocking messages"):
        rendezvous(lists, placement)

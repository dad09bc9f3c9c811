"""Pipelines on gloo ranks against one process: the loss of every microbatch and every gradient."""

import functools

import pytest
import split_ranks
import torch


@functools.cache
def alone(name: str, layers: int, microbatches: int, passes: tuple = ()):
    return split_ranks.alone(name, layers, microbatches, passes)


def check(found, name, layers, microbatches, passes=(), times=1, same_losses=True) -> None:
    losses, gradients = alone(name, layers, microbatches, passes)
    assert set().union(*(held for _, held in found)) == set(gradients)
    for _, held in found:
        for key, gradient in held.items():
            expected = times * gradients[key]
            error = (gradient - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
            assert error <= 1e-5, f"{key}: {error}"
    if same_losses:
        known = sorted(loss for losses_here, _ in found for loss in losses_here)
        torch.testing.assert_close(known, sorted(losses), rtol=1e-5, atol=0)


SCHEDULES = ["ZBVZeroBubble", "DualPipeV", "DualPipe"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*SCHEDULES, "InterleavedZeroBubble", "1F1B"])
def test_two_ranks_train_as_one_process_does(ranks, schedule):
    check(ranks.run(split_ranks.step, schedule, "tiny", 4, 4, size=2, evaluate=True), "tiny", 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_ranks_train_as_one_process_does(ranks, schedule):
    check(ranks.run(split_ranks.step, schedule, "tiny", 8, 8, size=4), "tiny", 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["DualPipeV", "DualPipe"])
def test_more_than_one_token_is_predicted_over_stages(ranks, schedule):
    passes = ("raise", "add-mtp")
    check(ranks.run(split_ranks.step, schedule, "tiny", 4, 4, passes, size=2), "tiny", 4, 4, passes)


@pytest.mark.slow
def test_experts_are_trained_over_stages(ranks):
    passes = ("raise", "fuse-moe")
    check(ranks.run(split_ranks.step, "ZBVZeroBubble", "tiny-moe", 4, 4, passes, size=2), "tiny-moe", 4, 4, passes)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["DualPipeV", "DualPipe"])
def test_shards_of_stages_train_as_one_process_does(ranks, schedule):
    found = ranks.run(split_ranks.step, schedule, "tiny", 4, 4, shards=2, size=4)
    check(found, "tiny", 4, 4, same_losses=False)  # a shard's loss is that of its half of each microbatch


@pytest.mark.slow
def test_a_schedule_from_a_file_is_run(ranks, tmp_path):
    check(ranks.run(split_ranks.step, "DualPipeV", "tiny", 4, 4, csv=str(tmp_path / "searched.csv"), size=2), "tiny", 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_a_stage_may_be_paired_with_itself_and_microbatches_come_in_any_order(ranks, tmp_path, shards):
    path = tmp_path / "searched.csv"
    path.write_text("0F2,0F0,(0F3;0B2)OVERLAP_F_B,0I0,(0F1;0I3)OVERLAP_F_B,0W3,0B1,0W0\n")
    (first, *_) = found = ranks.run(split_ranks.step, None, "tiny", 2, 4, csv=str(path), shards=shards, size=shards)
    check(found, "tiny", 2, 4, same_losses=False)
    if shards == 1:
        assert first[0] == pytest.approx(alone("tiny", 2, 4)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipe"])
def test_gradients_of_batches_add_up(ranks, schedule):
    check(ranks.run(split_ranks.step, schedule, "tiny", 4, 4, steps=2, size=2), "tiny", 4, 4, times=2)


@pytest.mark.slow
def test_recomputed_regions_are_trained_over_stages(ranks):
    check(ranks.run(split_ranks.step, "DualPipe", "tiny", 4, 4, recompute=True, size=2), "tiny", 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_our_stages_run_in_the_runtime_of_torch(ranks, together):
    check(ranks.run(split_ranks.step_of_torch, "DualPipeV", "tiny", 4, 4, together, size=2), "tiny", 4, 4)


@pytest.mark.slow
def test_pairs_take_regions_in_turn(ranks):
    (seen,) = ranks.run(split_ranks.order_of_pairs, 4, 4, True, size=1)
    assert seen
    for order in seen:
        first, second = (["layers.0", "layers.1"], ["layers.2", "layers.3"]) if order[0] == "F layers.0" else (["layers.2", "layers.3"], ["layers.0", "layers.1"])
        forward, backward = [f"F {name}" for name in first], [f"B {name}" for name in reversed(second)]
        assert [o for o in order if o in forward] == forward and [o for o in order if o in backward] == backward
        assert order != forward + backward, "one after the other"
        assert order.index(backward[0]) < order.index(forward[-1])
    (apart,) = ranks.run(split_ranks.order_of_pairs, 4, 4, False, size=1)
    for order in apart:
        assert [o[0] for o in order] == ["F", "F", "B", "B"]


@pytest.mark.slow
def test_stages_that_do_not_fit_are_named(ranks):
    said = ranks.run(split_ranks.wrong_stages, size=2)
    assert "runs the stages [0, 3] of 4, in this order, and was given 3 of 4, 0 of 4" in said[0]
    assert "rank 1" in said[1]


@pytest.mark.slow
def test_weight_gradients_that_nobody_asked_for_are_named(ranks):
    said = ranks.run(split_ranks.forgotten_weights, size=1)
    assert "microbatches [0, 1, 2, 3] were not computed" in said[0]

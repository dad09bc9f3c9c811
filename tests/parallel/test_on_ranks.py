"""Programs on real ranks (gloo) against one process: loss and every gradient to 1e-5 relative in float32, alone and composed."""

import pytest
import rank_work as work

TP = ("tensor-parallel", {"degree": 2})
CP = ("context-parallel", {"degree": 2})
FUSED = ["raise", "fuse-qkv", "fuse-gate-up"]


def check(results: list, name: str, inside: bool) -> None:
    """Every rank's loss and gradients against the plain model's."""
    loss, grads = work.alone(name, inside)
    for result in results:
        assert abs(result[0] - loss) <= 1e-5 * abs(loss)
        assert set(result[1]) == set(grads)
        assert work.largest_error(result[1], grads) <= 1e-5


@pytest.mark.parametrize(
    ("name", "passes", "inside"),
    [
        ("decoder", [TP], True),
        ("decoder", [*FUSED, "chunk-cross-entropy", TP], True),
        ("decoder with biases", ["fuse-qkv", TP, "fuse-gate-up"], True),
        ("decoder with one kv head", ["fuse-qkv", TP], True),
        ("Llama", [*FUSED, TP], False),
        ("Qwen2", [TP, "fuse-qkv", "fuse-gate-up"], False),
        ("Qwen3", [*FUSED, TP], False),
    ],
)
def test_tensor_parallel_on_two_ranks_is_one_process(ranks, name, passes, inside):
    check(ranks.run(work.tensor_parallel, name, passes, inside, size=2), name, inside)


@pytest.mark.parametrize(
    ("name", "passes", "inside", "balanced"),
    [
        ("decoder", [CP], True, True),
        ("decoder", [*FUSED, "chunk-cross-entropy", CP], True, True),
        ("decoder with biases", ["fuse-qkv", ("context-parallel", {"degree": 2, "balanced": False})], True, False),
        ("Llama", [*FUSED, CP], False, True),
        ("Qwen3", [CP, "fuse-qkv"], False, True),
    ],
)
def test_context_parallel_on_two_ranks_is_one_process(ranks, name, passes, inside, balanced):
    check(ranks.run(work.context_parallel, name, passes, inside, balanced, size=2), name, inside)


@pytest.mark.parametrize("passes", [[*FUSED, "chunk-cross-entropy", CP, TP], [TP, CP]])
def test_both_together_on_four_ranks_are_one_process(ranks, passes):
    check(ranks.run(work.both, "decoder", passes), "decoder", True)


@pytest.mark.parametrize(("name", "passes", "inside"), [("decoder", [*FUSED, "chunk-cross-entropy", TP], True), ("Qwen2", [*FUSED, TP], False)])
def test_fsdp_over_tensor_parallel_is_one_process(ranks, name, passes, inside):
    results = ranks.run(work.fsdp_and_tensor_parallel, name, passes, inside)
    check(results, name, inside)
    for _, _, norm, whole in results:
        assert abs(norm - whole) <= 1e-5 * whole


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_continues_on_another_number_of_ranks(ranks, tmp_path, fsdp):
    losses = ranks.run(work.save_after_training, str(tmp_path / "c"), ["fuse-qkv", TP], fsdp, size=4 if fsdp else 2)[0]
    alone = ranks.run(work.load_and_train, str(tmp_path / "c"), ["fuse-qkv"], 1, size=1)[0]
    four = ranks.run(work.load_and_train, str(tmp_path / "c"), ["fuse-qkv", ("tensor-parallel", {"degree": 4})], 4, size=4)[0]
    fused_later = ranks.run(work.load_and_train, str(tmp_path / "c"), [TP, "fuse-qkv"], 2, size=2)[0]
    for found in (alone, fused_later, four):
        assert found == pytest.approx(losses, rel=1e-5)


def test_unbinding_gives_back_every_bit(ranks):
    assert all(ranks.run(work.there_and_back, size=2))


def test_a_structure_first_met_while_bound_goes_through_the_passes(ranks):
    assert max(ranks.run(work.late_variants, size=2)) <= 1e-5


def test_compiled_regions_keep_their_collectives(ranks):
    check(ranks.run(work.compiled, ["fuse-qkv", TP], "aot_eager", size=2), "decoder", True)


def test_a_rank_that_fails_is_reported_and_the_pool_goes_on(ranks):
    with pytest.raises(RuntimeError, match="has no axis 'sequence'"):
        ranks.run("test_on_ranks:wrong_axis", size=2)
    assert ranks.run("torch:get_num_threads", size=2) == [1, 1]


def wrong_axis() -> None:
    """Binds what is not there."""
    work.parallel.bind(work.rewritten("decoder", [TP], True), None, "sequence")


def test_a_group_of_another_size_is_refused(ranks):
    with pytest.raises(RuntimeError, match="was divided over 2 ranks, but the group has 4"):
        ranks.run(work.tensor_parallel, "decoder", [TP], True, size=4)

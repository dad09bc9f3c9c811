"""A pair of stages as one graph on two ranks: expert exchanges in both halves, sharded parameters; same bits as one after the other."""

import merge_work as work
import pytest
import torch


@pytest.mark.parametrize("kind", ["gated", "biases", "dropping", "all experts"])
def test_a_pair_with_expert_exchanges_gives_the_bits_of_its_halves_and_of_autograd(ranks, kind):
    for found, model, started in ranks.run(work.expert_parallel, kind, ([5, 5], [5, 5]), size=2):
        assert all(found.values()), found
        assert len(started) == 2 * 3 + 2 * 3  # two mixtures forward and two backward: counts, there, back
        assert model["interleaved_ms"] <= model["concatenated_ms"] and model["bound_ms"] <= model["interleaved_ms"] * (1 + 1e-9)
        assert model["hidden"] > 0


@pytest.mark.parametrize("kind", ["gated", "biases"])
def test_a_backward_in_two_parts_exchanges_no_more(ranks, kind):
    """The weights' part starts from rows that came for the inputs' part."""
    for found, _, started in ranks.run(work.expert_parallel, kind, ([5, 5], [5, 5]), parts=True, size=2):
        assert all(found.values()), found
        assert len(started) == 2 * 3 + 2 * 3


def test_ranks_with_batches_of_different_sizes_take_one_order(ranks):
    """A rank of one token beside one of seven: the exchanges of both must stand in one order, or they would wait for each other for ever."""
    results = ranks.run(work.expert_parallel, "gated", ([1, 7], [1, 7]), size=2)
    assert all(all(found.values()) for found, _, _ in results)
    assert results[0][2] == results[1][2]


@pytest.mark.slow
def test_a_pair_goes_through_torch_compile(ranks):
    for found, _, _ in ranks.run(work.expert_parallel, "gated", ([5, 5], [5, 5]), "aot_eager", size=2):
        assert all(found.values()), found


@pytest.mark.parametrize(("name", "bucket_bytes"), [("uneven", 0), ("uneven", 300), ("decoder", 4096), ("tied decoder", 2**20)])
def test_sharded_parameters_give_the_bits_of_whole_ones(ranks, name, bucket_bytes):
    for found in ranks.run(work.sharded, name, bucket_bytes, size=2):
        counts, model = found.pop("collectives"), found.pop("model")
        assert all(found.values()), found
        assert counts["all_gather"] > 0 and counts["reduce_scatter"] > 0
        if bucket_bytes == 2**20:  # one message: both halves read the same shards, so they are gathered once
            assert counts == {"all_gather": 1, "reduce_scatter": 1}
        assert model["interleaved_ms"] <= model["concatenated_ms"]


@pytest.mark.slow
def test_shards_may_be_kept_in_a_wider_dtype(ranks):
    """Three ranks, rows that they do not divide; float64 shards of a float32 graph: cast before they are sent."""
    for found in ranks.run(work.sharded, "decoder", 4096, torch.float64, size=3):
        assert found["forward"] and found["pair"]

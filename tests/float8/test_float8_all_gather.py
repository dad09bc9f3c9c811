"""FSDP2 that gathers weights in float8: same bits as a gather in bfloat16, at half the bytes."""

import float8_rank_work as work
import pytest
import torch

from ftc.errors import FtcError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_training_has_the_same_bits_at_half_the_bytes(ranks, recipe):
    plain = ranks.run(work.train, recipe, False, size=2, width=256)[0]
    losses, sent, calls, weights = ranks.run(work.train, recipe, True, size=2, width=256)[0]
    assert losses == plain[0]
    assert all(torch.equal(weights[name], plain[3][name]) for name in plain[3])
    marked = sum(2 * t.numel() // 2 for name, t in weights.items() if "_proj" in name) * 2  # bfloat16 bytes of one rank, in two gathers
    saved = plain[1]["gather"] - sent["gather"] - sent["reduce"]
    assert 0.5 <= 1 - saved / marked <= 0.52
    assert calls["reduce"] == 1  # the scales of all weights that span ranks


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_shards_of_unequal_size_have_the_same_bits(ranks, recipe):
    plain, found = (ranks.run(work.train, recipe, flag, size=3, dtype="float32", steps=1) for flag in (False, True))
    for a, b in zip(plain, found, strict=True):
        assert a[0] == b[0] and all(torch.equal(a[3][name], b[3][name]) for name in a[3])


def test_one_scale_a_weight_needs_no_second_gather(ranks):
    plain, found = (ranks.run(work.train, "tensorwise", flag, size=2, reshard=False, save="exact")[0] for flag in (False, True))
    assert plain[0] == found[0] and found[1]["gather"] < plain[1]["gather"]


def test_checkpoints_hold_plain_numbers_and_loaded_ones_are_scaled_anew(ranks):
    for kinds, first, second, alone, marked in ranks.run(work.reload, "tensorwise", size=2):
        assert kinds == {"Tensor"} and marked == 14
        assert second != first and second == pytest.approx(alone, rel=1e-6)


def test_a_scaling_that_was_not_gathered_is_refused(ranks):
    assert all("activation checkpointing" in text for text in ranks.run(work.refused, "rowwise", size=2))
    assert ranks.run(work.refused, "tensorwise", size=2) == ["", ""]


@pytest.mark.parametrize("given", [{"reshard": False}, {"recomputed": True}])
def test_what_a_recipe_needs_is_asked_for_beforehand(given):
    from ftc.float8.all_gather import gather_in_float8

    with pytest.raises(FtcError, match="scales weights in two ways"):
        gather_in_float8(work.program_of("rowwise", True), **given)
    assert len(gather_in_float8(work.program_of("tensorwise", True), **given)) == 14


def test_weights_that_something_else_reads_are_not_marked():
    from ftc.float8.all_gather import float8_weights

    program = work.program_of("rowwise", True)
    graphs = [variant.captured.graph for code in program.codes for variant in code.all_variants()]
    names = set(float8_weights(graphs))
    assert len(names) == 7 and all(name.endswith("_proj.weight") for name in names)
    graph = program.regions[0].code.all_variants()[0].captured.graph
    node = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "mlp.down_proj.weight")
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        graph.call_function(torch.ops.aten.sum.default, (node,))
    assert "mlp.down_proj.weight" not in float8_weights(graphs)

"""Routing that is collected is the routing that happens, and listening changes nothing."""

import math

import pytest
import torch
from helpers_routing import Known, chosen, evenly, known
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
from ftc.errors import FtcError
from ftc.moe.ablation import random_choice
from ftc.moe.routing import Mixtures, collect, saturation, windows

CASES = {
    "seed": st.integers(0, 2**20),
    "layers": st.integers(1, 3),
    "experts": st.integers(1, 6),
    "top_k": st.integers(1, 3),
    "drop": st.sampled_from([0.0, 0.25]),
    "gate": st.sampled_from(["softmax", "sigmoid"]),
}


def drawn(seed, layers, experts, top_k, vocabulary=9):
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(vocabulary, experts, generator=generator) for _ in range(layers)]
    return tables, min(top_k, experts), torch.randint(vocabulary, (2, 3, 7), generator=generator)


@settings(max_examples=4)
@given(**CASES)
def test_routing_equals_counts_by_brute_force(seed, layers, experts, top_k, drop, gate):
    tables, top_k, batches = drawn(seed, layers, experts, top_k)
    routing = collect(known(tables, top_k, drop=drop, gate=gate), [{"input_ids": ids} for ids in batches])
    assert routing.tokens.tolist() == [batches.numel()] * layers
    for layer, table in enumerate(tables):
        sets = chosen(table, top_k, batches, drop, gate)
        pairs = [[sum(a in s and b in s for s in sets) for b in range(experts)] for a in range(experts)]
        scores = (table.double().softmax(-1) if gate == "softmax" else table.double().sigmoid())[batches.flatten()]
        assert routing.pairs[layer].tolist() == pairs
        assert routing.counts[layer].tolist() == [pairs[e][e] for e in range(experts)]
        assert int(routing.unfilled[layer]) == batches.numel() * top_k - sum(map(len, sets))
        expected = (scores / scores.sum(-1, keepdim=True)).amax(-1).mean()
        assert abs(float(routing.confidence[layer] - expected)) < 1e-12


@settings(max_examples=3)
@given(seed=st.integers(0, 2**20), layers=st.integers(1, 3))
def test_listening_leaves_results_program_and_mode_as_they_are(seed, layers):
    tables, top_k, (ids, _) = drawn(seed, layers, 4, 2)
    mixtures = known(tables, top_k)
    program = mixtures.program.train()
    heard = []
    expected, arounds = program(ids), [region.around for region in program.regions]
    assert torch.equal(mixtures.run({"input_ids": ids}, lambda choice: heard.append(choice.layer)), expected)
    assert heard == list(range(layers)) and program.training
    assert torch.equal(program(ids), expected) and [region.around for region in program.regions] == arounds


def test_fused_mixtures_are_routed_as_plain_ones():
    tables, top_k, batches = drawn(0, 2, 5, 2)
    plain = known(tables, top_k)
    fused = Mixtures(ftc.rewrite(plain.program, ["fuse-moe"], check=False))
    first, second = (collect(m, [{"input_ids": ids} for ids in batches]) for m in (plain, fused))
    assert torch.equal(first.pairs, second.pairs) and torch.equal(first.confidence, second.confidence)


def test_slots_beyond_the_capacity_are_counted_as_unfilled():
    """The model says so by weights of 0 alone once it is raised: the indices stay those of the top-k."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(0)
    moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "capacity_factor": 0.5}
    model = Decoder(preset("tiny-moe", vocab_size=64, hidden_size=16, head_dim=4, num_hidden_layers=1, moe=moe)).eval()
    program = ftc.rewrite(model, ["raise-moe"], example={"input_ids": torch.arange(24).view(2, 12)}, check=False)
    routing = collect(program, [{"input_ids": torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))}])
    capacity = math.ceil(0.5 * 48 * 2 / 4)
    assert int(routing.counts.max()) <= capacity and int(routing.unfilled) >= 48 and int(routing.counts.sum() + routing.unfilled) == 96


def test_a_sum_of_routings_is_the_routing_of_both_texts():
    tables, top_k, batches = drawn(1, 2, 4, 2)
    mixtures = known(tables, top_k)
    one, other = (collect(mixtures, [{"input_ids": ids}]) for ids in batches)
    both = collect(mixtures, [{"input_ids": ids} for ids in batches])
    total = one + other
    assert torch.equal(total.pairs, both.pairs) and torch.equal(total.tokens, both.tokens)
    assert torch.allclose(total.confidence, both.confidence, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="different programs"):
        one + collect(known(tables[:1], top_k), [{"input_ids": batches[0]}])


def test_a_random_router_loads_experts_evenly_and_keeps_the_number_of_choices():
    tables, _, _ = drawn(2, 2, 6, 3)
    ids = torch.randint(9, (40, 50))
    routing = collect(known(tables, 3), [{"input_ids": ids}], random_choice(6))
    assert routing.counts.sum(1).tolist() == [ids.numel() * 3] * 2
    assert float((routing.counts / 1000 - 1).abs().max()) < 0.1  # 2000 draws of probability 1/2: 4.5 standard deviations
    assert routing.unfilled.tolist() == [0, 0]


def test_saturation_is_one_with_itself_and_the_shared_part_with_another():
    first, second = evenly(6, 2, 12), evenly(6, 2, 12).roll(1, 1)  # of two neighbours one is shared
    ids = torch.arange(12).view(1, 12)
    mixtures = known([first, first], 2)
    assert saturation(mixtures, mixtures, [{"input_ids": ids}]).tolist() == [1.0, 1.0]
    assert saturation(mixtures, known([first, second], 2), [{"input_ids": ids}]).tolist() == [1.0, 0.5]
    with pytest.raises(FtcError, match="earlier checkpoint has 1 layers"):
        saturation(mixtures, known([first], 2), [{"input_ids": ids}])


def test_a_program_without_experts_and_nothing_to_read_are_errors():
    dense = ftc.capture(torch.nn.Sequential(torch.nn.Linear(3, 3)), (torch.randn(2, 3),))
    with pytest.raises(FtcError, match="there are no experts"):
        Mixtures(dense)
    with pytest.raises(ValueError, match="no batch"):
        collect(known([evenly(4, 1, 8)], 1), [])
    model = Known([evenly(4, 1, 8), evenly(3, 1, 8)], 1, torch.arange(8))
    with pytest.raises(FtcError, match=r"different numbers of experts, \[4, 3\]"):
        Mixtures(ftc.capture(model, {"input_ids": torch.arange(6).view(2, 3)}))


@settings(max_examples=25)
@given(count=st.integers(2, 60), context=st.integers(2, 20), batch=st.integers(1, 4))
def test_windows_are_whole_in_order_and_without_padding(count, context, batch):
    parts = windows(list(range(count)), context, batch)
    length = min(context, count)
    assert torch.cat(parts).flatten().tolist() == list(range(count // length * length))
    assert all(part.shape[1] == length and 1 <= len(part) <= batch for part in parts)

"""Numbers of specialisation have their known values for routers that are known, and knocking experts out harms those who use them."""

import math

import pytest
import torch
from helpers_routing import by_domain, evenly, known
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.moe.ablation import ablate, cross_entropy, knocked_out, num_runs, random_choice, without
from ftc.moe.routing import Routing, collect
from ftc.moe.specialisation import (
    co_activation,
    dead_experts,
    load_entropy,
    load_share,
    max_violation,
    mutual_information,
    random_co_activation,
    specialisation,
    strongest_pair,
    utilisation,
)

SIZES = {"domains": st.integers(2, 3), "each": st.integers(1, 3)}


def routing(counts, pairs=None, tokens=None, top_k=1):
    """One with given numbers, [L, E] and [L, E, E]."""
    counts = torch.tensor(counts)
    pairs = torch.diag_embed(counts) if pairs is None else torch.tensor(pairs)
    tokens = counts.sum(1) // top_k if tokens is None else torch.tensor(tokens)
    names = tuple(f"layers.{i}" for i in range(len(counts)))
    return Routing(names, counts, pairs, tokens, torch.zeros_like(tokens), torch.full(tokens.shape, torch.nan, dtype=torch.float64))


def texts_of(domains: int, tokens: int) -> dict[str, list]:
    """Every token of each domain once, twice over."""
    return {f"domain {d}": [torch.arange(d * tokens, (d + 1) * tokens).repeat(2, 1)] for d in range(domains)}


@settings(max_examples=4)
@given(**SIZES, layers=st.integers(1, 2))
def test_a_router_that_sends_each_domain_to_its_own_experts_is_the_oracle(domains, each, layers):
    tokens, experts = 2 * each, domains * each
    for top_k in {1, each}:
        mixtures = known([by_domain(domains, each, top_k, tokens)] * layers, top_k)
        found = specialisation({name: collect(mixtures, [{"input_ids": ids} for ids in batches]) for name, batches in texts_of(domains, tokens).items()})
        for d in range(domains):
            expected = torch.zeros(experts, dtype=torch.float64)
            expected[d * each : (d + 1) * each] = domains
            assert torch.allclose(found.over_chance[:, d], expected.expand(layers, -1), atol=1e-12, rtol=0)
            assert set((found.own[:, d] // each).tolist()) == {d}
        assert torch.allclose(found.most_over_chance, torch.full((layers, domains), float(domains), dtype=torch.float64), atol=1e-12, rtol=0)
        assert torch.allclose(found.oracle, torch.full((layers,), float(domains), dtype=torch.float64), atol=1e-12, rtol=0)
        assert torch.allclose(found.information, found.oracle.log(), atol=1e-12, rtol=0)
        assert found.own_lead.isinf().all()


@settings(max_examples=3)
@given(experts=st.integers(2, 5), top_k=st.integers(1, 2))
def test_a_router_that_ignores_the_domain_is_at_chance(experts, top_k):
    mixtures = known([evenly(experts, top_k, 2 * experts)], top_k)
    found = specialisation({name: collect(mixtures, [{"input_ids": ids} for ids in batches]) for name, batches in texts_of(2, experts).items()})
    assert torch.allclose(found.over_chance, torch.ones_like(found.over_chance), atol=1e-12, rtol=0)
    assert float(found.information.abs().max()) < 1e-12
    assert torch.allclose(found.own_lead, torch.ones_like(found.own_lead), atol=1e-12, rtol=0)


@given(seed=st.integers(0, 2**20), domains=st.integers(1, 4), experts=st.integers(1, 6))
def test_information_equals_the_difference_of_entropies_and_stays_in_its_bounds(seed, domains, experts):
    slots = torch.rand(3, domains, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    slots /= slots.sum(-1, keepdim=True)
    mean = slots.mean(1)
    by_entropy = -(mean * mean.log()).sum(-1) + (slots * slots.log()).sum(-1).mean(1)
    found = mutual_information(slots)
    assert torch.allclose(found, by_entropy, atol=1e-12, rtol=0)
    assert bool((found > -1e-12).all()) and bool((found <= math.log(min(domains, experts)) + 1e-12).all())


def test_domains_weigh_alike_whatever_their_number_of_tokens():
    few, many = routing([[3, 1]]), routing([[300, 100]])
    other = routing([[10, 30]])
    assert torch.allclose(specialisation({"a": few, "b": other}).information, specialisation({"a": many, "b": other}).information, atol=1e-12, rtol=0)


def test_the_own_expert_is_what_sets_a_domain_apart_and_not_what_everybody_uses():
    found = specialisation({"a": routing([[60, 30, 10]]), "b": routing([[60, 10, 30]])})
    assert found.most.tolist() == [[0, 0]] and found.own.tolist() == [[1, 2]]
    assert torch.allclose(found.own_lead, torch.tensor([[3.0, 3.0]], dtype=torch.float64), atol=1e-12, rtol=0)
    assert specialisation({"a": routing([[60, 30, 10]])}).own.tolist() == [[0]]


def test_utilisation_of_a_collapsed_and_of_an_even_router():
    loads = routing([[8, 0, 0, 0], [2, 2, 2, 2], [4, 4, 0, 0]])
    assert load_share(loads).tolist() == [[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]]
    assert max_violation(loads).tolist() == [3, 0, 1]
    assert torch.allclose(load_entropy(loads), torch.tensor([0, 1, 0.5], dtype=torch.float64), atol=1e-12, rtol=0)
    assert dead_experts(loads) == [[1, 2, 3], [], [2, 3]]
    assert [row["dead"] for row in utilisation(loads).values()] == dead_experts(loads)


def test_co_activation_is_over_independence():
    # 100 tokens of two experts each: 40 chose 0 and 1, 40 chose 2 and 3, 10 chose 0 and 2, 10 chose 1 and 3
    pairs = [[50, 40, 10, 0], [40, 50, 0, 10], [10, 0, 50, 40], [0, 10, 40, 50]]
    found = routing([[50] * 4], [pairs], top_k=2)
    lift = co_activation(found)[0]
    assert lift[0, 1] == 40 / 25 and lift[0, 2] == 10 / 25 and lift[0, 3] == 0 and lift.diagonal().isnan().all()
    assert strongest_pair(found, 0) == (0, 1, 40 / 25)
    assert strongest_pair(found, 0, least=26) is None
    assert random_co_activation(2, 4) == pytest.approx(2 / 3, abs=1e-12) and math.isnan(random_co_activation(1, 4))


def test_random_choices_meet_as_the_formula_says():
    mixtures = known([evenly(5, 3, 10)], 3)
    found = collect(mixtures, [{"input_ids": torch.zeros(50, 100, dtype=torch.int64)}], random_choice(5, seed=1))
    lift = co_activation(found)[0]
    assert abs(float(lift.nanmean()) - random_co_activation(3, 5)) < 0.01


@given(seed=st.integers(0, 2**20), experts=st.integers(1, 5), top_k=st.integers(1, 3), drop=st.booleans())
def test_a_knocked_out_expert_has_no_slot_and_weights_sum_up_as_before(seed, experts, top_k, drop):
    generator = torch.Generator().manual_seed(seed)
    weights, indices = torch.rand(20, experts, generator=generator, dtype=torch.float64).topk(min(top_k, experts), -1)
    if drop:
        indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.3, experts, indices)
    new, scaled = knocked_out(indices, weights, 0, experts)
    hit, live = (indices == 0).any(-1), (indices != experts)
    assert not (new == 0).any() and torch.equal(new[indices != 0], indices[indices != 0])
    assert torch.equal(scaled[~hit], weights[~hit])
    left = (live & (indices != 0)).any(-1)
    sums = torch.where(new != experts, scaled, 0).sum(-1)
    assert torch.allclose(sums[hit & left], torch.where(live, weights, 0).sum(-1)[hit & left], atol=1e-12, rtol=0)
    assert bool((sums[hit & ~left] == 0).all())


@settings(max_examples=3)
@given(domains=st.integers(2, 3), layers=st.integers(1, 2))
def test_harm_is_in_the_own_domain_alone_where_every_domain_has_its_own_expert(domains, layers):
    tokens, vocabulary = 4, domains * 4
    following = torch.arange(vocabulary) // tokens * tokens + (torch.arange(vocabulary) + 1) % tokens  # the text: 0 1 2 3 0 1 ..., in each domain
    mixtures = known([by_domain(domains, 1, 1, tokens)] * layers, 1, following)
    texts = {f"domain {d}": [torch.arange(9)[None] % tokens + d * tokens] for d in range(domains)}
    own = specialisation({n: collect(mixtures, [{"input_ids": ids} for ids in b]) for n, b in texts.items()}).own
    seen = []
    harm = ablate(mixtures, texts, own, done=lambda: seen.append(1))
    assert len(seen) == num_runs(own) == layers * domains + domains + 2
    others = ~torch.eye(domains, dtype=torch.bool)
    assert bool((harm.one[:, others] == 0).all()) and bool((harm.every[others] == 0).all())
    gone = torch.full((domains,), math.log(vocabulary), dtype=torch.float64)  # all layers' own experts: nothing is left to predict by
    assert torch.allclose(harm.base + harm.every.diagonal(), gone, atol=1e-5, rtol=0)  # logits are read in float32
    assert bool((harm.every.diagonal() > 1).all()) and harm.ratio(harm.every).isnan().all()
    assert torch.equal(harm.one[0], harm.every) == (layers == 1)


def test_an_unused_expert_harms_nothing_and_a_shared_one_harms_all_alike():
    table = torch.zeros(8, 3)
    table[:, :2] = torch.tensor([5.0, 4.0])
    following = torch.arange(8) // 4 * 4 + (torch.arange(8) + 1) % 4
    mixtures = known([table], 1, following)
    texts = {"a": [torch.arange(9)[None] % 4], "b": [torch.arange(9)[None] % 4 + 4]}
    for batches in texts.values():
        base = cross_entropy(mixtures, batches)
        assert cross_entropy(mixtures, batches, without({0: 2}, 3)) == base
        assert cross_entropy(mixtures, batches, without({0: 1}, 3)) == base
    harm = ablate(mixtures, texts, torch.tensor([[0, 0]]))
    assert torch.allclose(harm.one, harm.one[0, 0, 0].expand(1, 2, 2), atol=1e-5, rtol=0) and float(harm.one[0, 0, 0]) > 1
    assert torch.allclose(harm.ratio(harm.one), torch.ones(1, 2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_nothing_and_different_programs_are_errors():
    with pytest.raises(ValueError, match="no domain"):
        specialisation({})
    with pytest.raises(ValueError, match="different programs"):
        specialisation({"a": routing([[1, 2]]), "b": routing([[1, 2, 3]])})

"""Mixture of experts: against the formulas written out token by token, its limits, its errors, and what a decoder makes of it."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.decoder import Decoder
from ftc.models.moe import (
    MixtureOfExperts,
    MoeConfig,
    Router,
    check_routers,
    top_k_in_each_group,
    within_best_groups,
    within_capacity,
)
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc.dialect.moe  # noqa: F401  registers the operator
from ftc.errors import FtcError

WIDTH = 6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer_of(config, seed=0, dtype=torch.float64):
    """A layer with weights and selection bias drawn anew."""
    layer = MixtureOfExperts(WIDTH, config, "layers.3.mlp").to(dtype)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator(seed), dtype=torch.float64) * 0.7)
            seed += 1
    return layer


def tokens_of(shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, WIDTH, generator=generator(1000 + seed), dtype=torch.float64).to(dtype)


@st.composite
def configs(draw):
    size, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    num_experts, virtual = size * groups, draw(st.booleans()) and groups > 1
    topk_groups = 1 if virtual else draw(st.integers(1, groups))
    top_k = groups * draw(st.integers(1, size)) if virtual else draw(st.integers(1, size * topk_groups))
    return MoeConfig(
        num_experts, top_k, draw(st.integers(1, 5)),
        gate=draw(st.sampled_from(["softmax", "sigmoid", "softmax-of-top-k"])), norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])), shared_intermediate_size=draw(st.sampled_from([0, 4])),
        selection_bias=draw(st.booleans()), groups=1 if virtual else groups, topk_groups=topk_groups, virtual_groups=groups if virtual else 1,
        weight_on_input=draw(st.booleans()),
    )  # fmt: skip


def chosen(config, scores, bias):
    """The experts of one token, by sorting: a list of numbers."""
    size = config.num_experts // max(config.groups, config.virtual_groups)
    groups = [range(start, start + size) for start in range(0, config.num_experts, size)]
    value = [float((score + shift).detach()) for score, shift in zip(scores, bias, strict=True)]

    def best(experts, count):
        return sorted(experts, key=lambda e: -value[e])[:count]

    if config.virtual_groups > 1:
        return [e for group in groups for e in best(group, config.top_k // config.virtual_groups)]
    if config.groups > 1:
        groups = sorted(groups, key=lambda group: -sum(value[e] for e in best(group, 2)))[: config.topk_groups]
    return best([e for group in groups for e in group], config.top_k)


def expert_of(module, x_D):
    """W_down (silu(W_gate x) * W_up x) of one token."""
    gate = module.gate_proj.weight @ x_D
    return module.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * (module.up_proj.weight @ x_D))


def written_out(layer, x_ND):
    """The layer one token after another, and the experts of each."""
    config, rows, experts = layer.config, [], []
    bias = layer.gate.e_score_correction_bias if config.selection_bias else torch.zeros(config.num_experts)
    for x_D in x_ND:
        logits = layer.gate.weight @ x_D
        if config.gate == "sigmoid":
            scores = 1 / (1 + torch.exp(-logits))
        else:
            scores = logits if config.gate == "softmax-of-top-k" else torch.exp(logits) / torch.exp(logits).sum()
        numbers = chosen(config, scores, bias)
        weights = scores[numbers]
        if config.gate == "softmax-of-top-k":
            weights = torch.exp(weights) / torch.exp(weights).sum()
        elif config.norm_topk_prob:
            weights = weights / weights.sum()
        y_D = torch.zeros_like(x_D)
        for number, weight in zip(numbers, weights * config.routed_scaling_factor, strict=True):
            expert = layer.experts[number]
            y_D = y_D + (expert_of(expert, weight * x_D) if config.weight_on_input else weight * expert_of(expert, x_D))
        rows.append(y_D if layer.shared_experts is None else y_D + expert_of(layer.shared_experts, x_D))
        experts.append(numbers)
    return torch.stack(rows), experts


@settings(max_examples=60)
@given(configs(), st.integers(1, 4), st.integers(0, 99))
def test_it_is_its_formulas_token_by_token_with_gradients(config, tokens, seed):
    layer, x = layer_of(config, seed), tokens_of((2, tokens), seed).requires_grad_()
    found, (expected, experts) = layer(x), written_out(layer, x.flatten(0, 1))
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
    assert [sorted(row) for row in layer.gate(x.flatten(0, 1))[0].tolist()] == [sorted(row) for row in experts]
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True) for y in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@settings(max_examples=15)
@given(configs(), st.sampled_from([None, 1.0, 1.5]), st.integers(0, 99))
def test_the_experts_are_the_operator_ftc_moe(config, capacity_factor, seed):
    layer = layer_of(dataclasses.replace(config, capacity_factor=capacity_factor), seed)
    x_ND = tokens_of((config.num_experts,), seed)
    routing = layer.gate(x_ND)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in layer.experts])
    down = torch.stack([e.down_proj.weight for e in layer.experts])
    expected = torch.ops.ftc.moe(x_ND, *routing, gate_up, down, weight_on_input=config.weight_on_input)
    torch.testing.assert_close(layer.routed(x_ND, *routing), expected, rtol=1e-12, atol=1e-12)


@given(configs(), st.integers(0, 99))
def test_the_selection_bias_shifts_the_choice_and_not_the_weights(config, seed):
    config = dataclasses.replace(config, selection_bias=True, groups=1, topk_groups=1, virtual_groups=1, norm_topk_prob=False)
    router, x_ND = layer_of(config, seed).gate, tokens_of((5,), seed)
    router.e_score_correction_bias.zero_()[-1] = 1e6
    indices, weights = router(x_ND)
    assert (indices == config.num_experts - 1).sum(1).eq(1).all(), "the favoured expert is everyone's"
    if config.gate != "softmax-of-top-k":
        scores = router.scores(x_ND @ router.weight.T)
        torch.testing.assert_close(weights, scores.gather(1, indices) * config.routed_scaling_factor)
    assert "e_score_correction_bias" not in dict(router.named_parameters())


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 4), st.integers(0, 99))
def test_tokens_stay_within_their_best_groups(size, groups, topk_groups, seed):
    topk_groups = min(topk_groups, groups)
    scores = torch.rand(7, size * groups, generator=generator(seed), dtype=torch.float64)
    limited = within_best_groups(scores, groups, topk_groups)
    for row, kept in zip(scores.unflatten(1, (groups, size)), limited.unflatten(1, (groups, size)), strict=True):
        worth = [sum(sorted(group.tolist())[-2:]) for group in row]
        best = sorted(range(groups), key=lambda g: -worth[g])[:topk_groups]
        for number in range(groups):
            assert torch.equal(kept[number], row[number] if number in best else torch.full((size,), -math.inf, dtype=torch.float64))


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_virtual_groups_each_give_the_same_number(groups, size, data):
    each = data.draw(st.integers(1, size))
    scores = torch.rand(5, groups * size, generator=generator(data.draw(st.integers(0, 99))))
    indices = top_k_in_each_group(scores, each * groups, groups)
    assert all(Counter((row // size).tolist()) == dict.fromkeys(range(groups), each) and len(set(row.tolist())) == len(row) for row in indices)


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_an_expert_drops_the_tokens_that_come_after_its_last_place(tokens, num_experts, data):
    top_k, capacity = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, 4))
    indices = torch.stack([torch.randperm(num_experts, generator=generator(seed))[:top_k] for seed in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator(9)) + 0.1
    found_indices, found_weights = within_capacity(indices, weights, num_experts, capacity)
    taken = Counter()
    for n in range(tokens):
        for k in range(top_k):
            expert = int(indices[n, k])
            taken[expert] += 1
            kept = taken[expert] <= capacity
            assert int(found_indices[n, k]) == (expert if kept else num_experts)
            assert float(found_weights[n, k]) == (float(weights[n, k]) if kept else 0.0)


def test_dropped_tokens_get_nothing_and_the_others_what_they_got_without_a_limit():
    # Five tokens that all want expert 1 of 2; ceil(1.2 * 5 / 2) = 3 places.
    config = MoeConfig(2, 1, 4, capacity_factor=1.2)
    limited, x = layer_of(config), tokens_of((1, 5)).abs()
    with torch.no_grad():
        limited.gate.weight[0], limited.gate.weight[1] = -1.0, 1.0
        free = MixtureOfExperts(WIDTH, dataclasses.replace(config, capacity_factor=None)).double()
        free.load_state_dict(limited.state_dict())
        assert torch.equal(limited(x)[:, :3], free(x)[:, :3]) and not limited(x)[:, 3:].any() and free(x)[:, 3:].any()


@pytest.mark.parametrize(("factor", "tokens", "places"), [(1.1, 10, 11), (1.0, 10, 10), (1.25, 3, 4), (0.5, 3, 2), (0.1, 10, 1)])
def test_the_capacity_is_the_decimal_share_rounded_up(factor, tokens, places):
    assert MoeConfig(4, 4, 8, capacity_factor=factor).capacity(tokens, "moe") == places


@given(st.integers(1, 4), st.sampled_from([None, 0.5, 1.0, 1.25]), st.integers(4, 12), st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 99))
def test_expert_choice_gives_every_expert_its_best_tokens_and_the_same_number(top_k, factor, tokens, gate, seed):
    config = MoeConfig(6, top_k, 3, gate=gate, norm_topk_prob=False, expert_choice=True, capacity_factor=factor)
    if tokens * top_k * (factor or 1.0) < 6:
        with pytest.raises(ValueError, match=r"layers\.3\.mlp: capacity_factor .* less than one of"):
            layer_of(config)(tokens_of((1, tokens)))
        return
    layer, x_ND = layer_of(config, seed), tokens_of((tokens,), seed)
    indices, weights = layer.gate(x_ND)
    capacity = math.ceil((factor or 1.0) * tokens * top_k / 6)
    logits = x_ND @ layer.gate.weight.T
    scores = 1 / (1 + torch.exp(-logits)) if gate == "sigmoid" else torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    expected = torch.zeros_like(x_ND)
    for e, expert in enumerate(layer.experts):
        best = sorted(range(tokens), key=lambda n: -float(scores[n, e].detach()))[:capacity]
        assert sorted(torch.where(indices == e)[0].tolist()) == sorted(best)
        for n in best:
            expected[n] += scores[n, e] * expert_of(expert, x_ND[n])
    torch.testing.assert_close(layer.routed(x_ND, indices, weights), expected, rtol=1e-12, atol=1e-12)


def test_expert_choice_looks_at_later_tokens_and_a_token_choice_does_not():
    x = tokens_of((1, 8))
    changed = torch.cat([x[:, :4], 9 * x[:, 4:]], 1)
    for expert_choice in (True, False):
        layer = layer_of(MoeConfig(4, 1, 4, norm_topk_prob=False, expert_choice=expert_choice))
        assert torch.allclose(layer(x)[:, :4], layer(changed)[:, :4]) != expert_choice


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "softmax-of-top-k"])
def test_the_router_computes_in_float32_whatever_the_model_is_in(gate):
    config = MoeConfig(8, 2, 4, gate=gate)
    low, x_ND = layer_of(config, dtype=torch.bfloat16), tokens_of((9,), dtype=torch.bfloat16)
    high = Router(WIDTH, config)
    high.load_state_dict(low.gate.state_dict())
    for found, expected in zip(low.gate(x_ND), high(x_ND.float()), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert low(x_ND).dtype == torch.bfloat16


@settings(max_examples=5)
@given(configs(), st.integers(0, 99))
def test_gradients_reach_the_router_and_are_those_of_small_steps(config, seed):
    config = dataclasses.replace(config, norm_topk_prob=False, gate="sigmoid")
    layer, x_BTD = layer_of(config, seed), tokens_of((1, 4), seed)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"gate.weight": w}, (x_BTD,)), (layer.gate.weight,))
    layer(x_BTD).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.0}, {"expert_choice": True, "norm_topk_prob": False}, {"groups": 2, "selection_bias": True}])
def test_a_graph_of_it_holds_no_branch_on_values(changes):
    layer = layer_of(MoeConfig(4, 2, 3, **changes), dtype=torch.float32)
    program = torch.export.export(layer, (tokens_of((2, 4), 1, torch.float32),))
    one_sided = torch.ones(2, 4, WIDTH)  # leaves experts without tokens
    for x in (tokens_of((2, 4), 2, torch.float32), one_sided):
        torch.testing.assert_close(program.module()(x), layer(x))


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 9}, "top_k is 9; a token has at most num_experts = 8"),
        ({"top_k": 0}, "top_k is 0; it must be a positive whole number"),
        ({"num_experts": True}, "num_experts is True"),
        ({"intermediate_size": 2.0}, "intermediate_size is 2.0"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size is -1; it must be a whole number"),
        ({"groups": 3}, "groups is 3; num_experts 8 must be a multiple of it"),
        ({"virtual_groups": 3}, "virtual_groups is 3; num_experts 8 must be a multiple of it"),
        ({"groups": 2, "virtual_groups": 2}, "virtual_groups is 2; it cannot be limited to 1 of groups = 2"),
        ({"groups": 2, "topk_groups": 3}, "topk_groups is 3; there are only groups = 2"),
        ({"groups": 8, "topk_groups": 1}, "top_k is 2; 1 of 8 groups hold 1 experts"),
        ({"top_k": 3, "virtual_groups": 2}, "top_k is 3; each of virtual_groups = 2"),
        ({"gate": "tanh"}, "gate is 'tanh'; valid: softmax, sigmoid, softmax-of-top-k"),
        ({"capacity_factor": 0}, "capacity_factor is 0; it must be above 0"),
        ({"capacity_factor": math.nan}, "capacity_factor is nan; it must be above 0"),
        ({"expert_choice": True}, "norm_topk_prob is True; with expert_choice it must be False"),
        ({"expert_choice": True, "norm_topk_prob": False, "gate": "softmax-of-top-k"}, "gate is 'softmax-of-top-k'; with expert_choice"),
        ({"expert_choice": True, "norm_topk_prob": False, "selection_bias": True}, "selection_bias is True; with expert_choice it must be False"),
        ({"expert_choice": True, "norm_topk_prob": False, "capacity_factor": 5.0}, "capacity_factor is 5.0; times top_k 2 it is above num_experts 8"),
    ],
)
def test_what_cannot_be_is_named_with_its_layer(changes, said):
    config = dataclasses.replace(MoeConfig(8, 2, 4), **changes)
    with pytest.raises(ValueError) as raised:
        MixtureOfExperts(WIDTH, config, "layers.3.mlp")
    assert str(raised.value).startswith(f"layers.3.mlp: {said}")
    with pytest.raises(FtcError) as raised:
        preset("tiny-moe", moe=config, first_dense_layers=1)
    assert f"layers.1.mlp: {said}" in str(raised.value)


def test_less_than_one_token_an_expert_is_refused_when_tokens_are_known():
    model = Decoder(preset("tiny-moe", moe={"capacity_factor": 1.25}, num_hidden_layers=2, first_dense_layers=1))
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: capacity_factor 5/4 gives each of 8 experts less than one of 3 tokens"):
        model(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("changes", [{}, {"gate": "sigmoid"}, {"gate": "softmax-of-top-k"}, {"expert_choice": True, "norm_topk_prob": False}])
def test_the_first_router_that_is_not_finite_is_named(changes):
    model, ids = Decoder(preset("tiny-moe", moe=changes)), torch.arange(24).view(2, 12)
    check_routers(model, input_ids=ids)
    model.layers[2].mlp.gate.weight.data[:, 5] = math.nan
    with pytest.raises(ValueError, match=r"layers\.2\.mlp: the router gives weights .* for \d+ of 24 tokens; its parameters are not finite either"):
        check_routers(model, ids)
    assert not any(module._forward_hooks for module in model.modules())


# --- in a decoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe": {"num_expert": 4}}, "unknown field 'num_expert' of moe; did you mean 'num_experts'"),
        ({"first_dense_layers": 4}, "first_dense_layers is 4; it must be 0 to 3"),
        ({"moe": None, "first_dense_layers": 1}, "first_dense_layers is 1, but without moe"),
        ({"mlp_bias": True}, "experts have no biases"),
        ({"qk_norm": "heads"}, "qk_norm is 'heads'; valid: None, 'head', 'projection'"),
        ({"qk_norm": "head", "latent": "deepseek-v3"}, "latent attention has norms of its own"),
    ],
)
def test_a_decoder_with_experts_that_cannot_be_is_named(changes, said):
    with pytest.raises(FtcError) as raised:
        preset("tiny-moe", **changes)
    assert said in str(raised.value)
    with pytest.raises(FtcError, match="moe lacks num_experts, top_k"):
        preset("tiny", moe={"intermediate_size": 4})


def test_the_dense_preset_computes_as_much_a_token():
    config, dense = preset("tiny-moe"), preset("tiny-moe-dense")
    assert config.moe.active_intermediate_size == dense.intermediate_size

    def sizes(model, share):
        return sum(p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters() if ".gate.weight" not in name)

    assert sizes(meta_decoder(config), 2 / 8) == sizes(meta_decoder(dense), 1)
    assert sum(p.numel() for p in meta_decoder(preset("olmoe-1b-7b")).parameters()) == 6_919_161_856  # the released model's


def test_first_layers_are_dense_and_weights_are_drawn_in_all_experts():
    torch.manual_seed(0)
    model = Decoder(preset("tiny-moe", first_dense_layers=1, moe={"selection_bias": True, "shared_intermediate_size": 64}))
    assert [isinstance(block.mlp, MixtureOfExperts) for block in model.layers] == [False, True, True, True]
    moe = model.layers[1].mlp
    moe.gate.e_score_correction_bias.fill_(3.0)
    model.init_weights()
    assert not moe.gate.e_score_correction_bias.any()
    for module in (*moe.experts, moe.shared_experts):
        assert float(module.gate_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(module.down_proj.weight.detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert float(moe.gate.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


@settings(max_examples=6)
@given(st.sampled_from(["softmax", "sigmoid"]), st.sampled_from([None, "head", "projection"]), st.integers(2, 11))
def test_a_decoder_with_experts_is_causal(gate, qk_norm, cut):
    torch.manual_seed(cut)
    model = Decoder(preset("tiny-moe", num_hidden_layers=2, qk_norm=qk_norm, initializer_range=0.2, moe={"gate": gate})).double()
    ids = torch.randint(512, (1, 12))
    other = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % 512], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :cut], model(other)[:, :cut], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(model(ids)[:, cut:], model(other)[:, cut:])


def test_training_a_few_steps_lowers_the_loss_of_a_small_text():
    torch.manual_seed(0)
    model = Decoder(preset("tiny-moe", num_hidden_layers=2))
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.arange(33).view(1, 33) * 7 % 512
    losses = []
    for _ in range(12):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(block.mlp.gate.weight.grad.abs().sum() > 0 for block in model.layers)

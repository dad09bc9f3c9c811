"""raise-attention: every spelling of softmax attention is one call, with what it is read off correctly; what is no attention stays."""

import math

import pytest
import torch
import torch.nn.functional as F
from blocks import B, D, G, H, Heads, K, T, calls, causal_bias, copied, export, largest_error, repeat, sdpa
from ftc.passes.raise_attention import SDPA, SOFTCAP, RaiseAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.rewrite.residue import residue

SCALE = K**-0.5


def scores_of(q, k):
    return q @ repeat(k).transpose(-1, -2) * SCALE


def eager(q, k, v):
    scores = scores_of(q, k)
    return F.softmax(scores + causal_bias(scores), -1, dtype=torch.float32).to(q.dtype) @ repeat(v)


def where_tril(q, k, v):
    scores = scores_of(q, k)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.where(keep, scores, torch.finfo(scores.dtype).min).softmax(-1) @ repeat(v)


def in_place(q, k, v):
    scores = scores_of(q, k)
    scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e9)
    return scores.softmax(-1) @ repeat(v)


def exponentials(q, k, v):
    scores = scores_of(q, k)
    scores = scores + causal_bias(scores)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ repeat(v)


def einsum(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, repeat(k), repeat(v)))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(K)
    probabilities = (scores + causal_bias(scores)).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", probabilities, v).transpose(1, 2)


def grouped(q, k, v):
    batch, _, length, width = q.shape
    scores = q.reshape(batch, G, H // G, length, width) @ k.unsqueeze(2).transpose(-1, -2) * SCALE
    return ((scores + causal_bias(scores)).softmax(-1) @ v.unsqueeze(2)).reshape(batch, H, length, width)


def batched(q, k, v):
    batch, heads, length, width = q.shape
    flat = [x.reshape(batch * heads, length, width) for x in (q, repeat(k), repeat(v))]
    scores = torch.baddbmm(
        causal_bias(q @ q.transpose(-1, -2)).unsqueeze(0), flat[0], flat[1].transpose(1, 2), alpha=SCALE
    )
    return torch.bmm(scores.softmax(-1), flat[2]).view(batch, heads, length, width)


def keys_first(q, k, v):
    scores = repeat(k) @ q.transpose(-1, -2) * SCALE
    probabilities = (scores + causal_bias(scores).T).softmax(-2)
    return (repeat(v).transpose(-1, -2) @ probabilities).transpose(-1, -2)


def scale_before(q, k, v):
    q, k = q * K**-0.25, k * K**-0.25
    scores = q @ repeat(k).transpose(-1, -2)
    return (scores + causal_bias(scores)).softmax(-1) @ repeat(v)


def stacked_heads(q, k, v):
    k = torch.stack([k] * (H // G), dim=2).flatten(1, 2)
    v = torch.cat([v[:, i // (H // G)].unsqueeze(1) for i in range(H)], dim=1)
    return sdpa(q, k, v, is_causal=True)


def masked_call(q, k, v):
    return sdpa(q, repeat(k), repeat(v), attn_mask=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())


CAUSAL = [
    eager, where_tril, in_place, exponentials, einsum, grouped, batched, keys_first, scale_before, stacked_heads, masked_call,
]  # fmt: skip


@pytest.mark.parametrize("attend", CAUSAL, ids=lambda f: f.__name__)
def test_a_causal_spelling_becomes_one_call_with_unrepeated_heads(attend):
    graph = export(Heads(attend), torch.randn(B, T, D))
    before = copied(graph)
    outcome = RaiseAttention().apply(graph)
    (call,) = calls(graph, SDPA)
    assert not outcome.misses and not residue(graph)
    assert call.args[1].meta["val"].shape[1] == call.args[2].meta["val"].shape[1] == G
    assert call.args[3] is None and call.args[5] is True
    assert call.kwargs["enable_gqa"] is True and call.kwargs["scale"] == pytest.approx(SCALE, rel=1e-12)
    assert largest_error(before, graph) <= 1e-12
    again = RaiseAttention().apply(graph)
    assert again.already == 1 and not again.matches


def test_the_raised_graph_holds_in_float32():
    graph = export(Heads(eager), torch.randn(B, T, D))
    before = copied(graph)
    RaiseAttention().apply(graph)
    assert largest_error(before, graph, lifted=False) <= 1e-5


@pytest.mark.parametrize("window", [3, 40, 8192])
def test_a_sliding_window_is_no_plain_causal_mask(window):
    def attend(q, k, v):
        place = torch.arange(q.shape[2])
        gap = place[:, None] - place[None, :]
        return sdpa(q, k, v, attn_mask=(gap >= 0) & (gap < window), enable_gqa=True)

    graph = export(Heads(attend), torch.randn(B, T, D))
    RaiseAttention().apply(graph)
    (call,) = calls(graph, SDPA)
    assert call.args[5] is False and call.args[3].target is torch.ops.ftc.causal_mask.default
    assert call.args[3].args[2] == window


def test_a_soft_cap_is_read_off():
    def attend(q, k, v):
        scores = 5.0 * torch.tanh(scores_of(q, k) / 5.0)
        return (scores + causal_bias(scores)).softmax(-1) @ repeat(v)

    graph = export(Heads(attend), torch.randn(B, T, D))
    before = copied(graph)
    RaiseAttention().apply(graph)
    (call,) = calls(graph, SOFTCAP)
    assert call.kwargs["softcap"] == 5.0 and call.kwargs["scale"] == pytest.approx(SCALE) and call.args[5] is True
    assert largest_error(before, graph) <= 1e-12


@pytest.mark.parametrize("kind", ["float", "bool", "causal and bool"])
def test_a_mask_that_is_an_input_stays_a_mask(kind):
    def attend(q, k, v, mask):
        scores = scores_of(q, k)
        if kind == "float":
            scores = scores + mask
        else:
            scores = scores.masked_fill(~mask, float("-inf"))
        if kind == "causal and bool":
            scores = scores + causal_bias(scores)
        return scores.softmax(-1) @ repeat(v)

    mask = torch.randn(B, 1, T, T) if kind == "float" else torch.ones(B, 1, T, T, dtype=torch.bool)
    graph = export(Heads(attend), torch.randn(B, T, D), mask)
    before = copied(graph)
    RaiseAttention().apply(graph)
    (call,) = calls(graph, SDPA)
    assert call.args[3] is not None and call.args[5] is False
    assert largest_error(before, graph) <= 1e-12


def test_biases_by_head_and_distance_stay_a_mask():
    def attend(q, k, v):
        scores = scores_of(q, k)
        place = torch.arange(q.shape[2])
        slopes = 2.0 ** -torch.arange(1, H + 1)
        bias = slopes[:, None, None] * (place[None, :] - place[:, None])
        return (scores + bias + causal_bias(scores)).softmax(-1) @ repeat(v)

    graph = export(Heads(attend), torch.randn(B, T, D))
    before = copied(graph)
    RaiseAttention().apply(graph)
    (call,) = calls(graph, SDPA)
    assert call.args[3] is not None and largest_error(before, graph) <= 1e-12


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(D, 5)

    def forward(self, x):
        return self.weight(x).softmax(-1).topk(2).values


def test_a_router_is_named_as_one():
    graph = export(Router(), torch.randn(B, T, D))
    outcome = RaiseAttention().apply(graph)
    assert not outcome.matches and not outcome.misses
    assert [left.kind for left in residue(graph)] == ["router"]


def wrong_axis(q, k, v):
    return scores_of(q, k).softmax(-2) @ repeat(v)


def clamped(q, k, v):
    return scores_of(q, k).clamp(min=-3.0).softmax(-1) @ repeat(v)


def weak_mask(q, k, v):
    scores = scores_of(q, k)
    return torch.where(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), scores, -5.0).softmax(-1) @ repeat(v)


def detached(q, k, v):
    return (scores_of(q, k.detach())).softmax(-1) @ repeat(v)


@pytest.mark.parametrize("attend", [wrong_axis, clamped, weak_mask], ids=lambda f: f.__name__)
def test_what_is_no_attention_is_declined_with_the_node_where_it_parts(attend):
    graph = export(Heads(attend), torch.randn(B, T, D))
    before = str(graph)
    outcome = RaiseAttention().apply(graph)
    assert not outcome.matches and len(outcome.misses) == 1
    assert outcome.misses[0].reason and outcome.misses[0].node in before
    assert "blocks.py:" in outcome.misses[0].location
    assert [left.kind for left in residue(graph)] == ["attention"]


def test_a_stopped_gradient_is_kept():
    graph = export(Heads(detached), torch.randn(B, T, D))
    before = copied(graph)
    RaiseAttention().apply(graph)
    assert calls(graph, torch.ops.aten.detach.default) and largest_error(before, graph) <= 1e-12


@settings(max_examples=8)
@given(
    offset=st.integers(-2, 2),
    scale=st.floats(0.05, 2.0),
    order=st.permutations(range(H)),
    fill=st.sampled_from([float("-inf"), -1e4, torch.finfo(torch.float32).min]),
)
def test_a_variant_is_rewritten_as_what_it_is(offset, scale, order, fill):
    def attend(q, k, v):
        scores = q @ repeat(k)[:, list(order)].transpose(-1, -2) * scale
        keep = (
            torch.ones(scores.shape[-2:], dtype=torch.bool).tril(max(offset, 0))
            if offset
            else torch.ones((), dtype=torch.bool)
        )
        return torch.where(keep, scores, fill).softmax(-1) @ repeat(v)

    graph = export(Heads(attend), torch.randn(B, T, D))
    before = copied(graph)
    RaiseAttention().apply(graph)
    for call in calls(graph, SDPA):
        assert call.args[5] is (offset < 0), "causal although the mask reaches the future, or the other way round"
        assert call.kwargs["scale"] == pytest.approx(scale)
    assert largest_error(before, graph) <= 1e-12

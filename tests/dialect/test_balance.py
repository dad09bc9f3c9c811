"""ftc::balance: the weights keep their bits, the gradient is that of the losses written out, and choices are counted once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from ftc.dialect.balance import SUMS, parts_of, share_of_batch, tally_size

balance = torch.ops.ftc.balance


def losses(logits, indices, gate, tokens, pool=None):
    """The three losses as their papers write them, with loops over sequences."""
    experts = logits.shape[1]
    scores = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    p = scores / scores.sum(-1, keepdim=True)

    def switch(p, indices, f=None):
        chosen = torch.nn.functional.one_hot(indices, experts + 1)[..., :experts].sum((0, 1)).to(p)
        f = chosen / chosen.sum() if f is None else f
        return experts * (f * p.mean(0)).sum()

    parts = [switch(*part) for part in zip(p.split(tokens), indices.split(tokens), strict=True)]
    return switch(p, indices, pool), sum(parts) / len(parts), logits.logsumexp(-1).square().mean()


def routed(seed, tokens=12, experts=5, k=2, dtype=torch.float64, skew=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, experts, generator=generator, dtype=torch.float64) * 2 + skew * torch.arange(experts)).to(dtype)
    values, indices = logits.topk(k)
    return logits.requires_grad_(), values.detach().softmax(-1).requires_grad_(), indices, torch.zeros(tally_size(experts), dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["softmax", "sigmoid"]), st.sampled_from(["batch", "pool"]), st.integers(0, 99), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]), st.floats(0.1, 1.0), st.booleans(),
)  # fmt: skip
def test_the_gradient_is_that_of_the_losses_written_out(gate, scope, seed, sequences, k, precision, share, dropped):
    dtype, bound = precision
    logits, weights, indices, tally = routed(seed, 4 * sequences, 5, k, dtype)
    if dropped:
        indices[0] = 5
    pool = 1 + 9 * torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))  # loads: at least one token
    parts_of(tally, 5)[1].copy_(pool)
    used = balance(weights, logits, indices, tally, gate=gate, switch=0.3, sequence=0.2, tokens_in_sequence=4, z=0.1, scope=scope)
    assert torch.equal(used, weights) and not tally[:5].any()
    upstream = torch.randn_like(used)
    with share_of_batch(share):
        used.backward(upstream)
    assert torch.equal(weights.grad, upstream)
    leaf = logits.detach().double().requires_grad_()
    found = losses(leaf, indices, gate, 4, (pool / pool.sum()) if scope == "pool" else None)
    (expected,) = torch.autograd.grad(share * (0.3 * found[0] + 0.2 * found[1] + 0.1 * found[2]), leaf)
    assert (logits.grad - expected).abs().max() <= bound * expected.abs().max()
    means = dict(zip(SUMS, parts_of(tally, 5)[2] / len(indices), strict=True))
    assert [means[n] for n in ("switch", "sequence", "z")] == pytest.approx([float(v.detach()) for v in found], rel=bound)
    assert tally[:5].tolist() == [int((indices == e).sum()) for e in range(5)] and means["tokens"] == 1


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_perfect_balance_costs_one_and_pulls_nowhere(gate):
    indices = torch.arange(6).view(6, 1)
    logits, weights = torch.zeros(6, 6, requires_grad=True), torch.ones(6, 1, requires_grad=True)
    tally = torch.zeros(tally_size(6), dtype=torch.float64)
    balance(weights, logits, indices, tally, gate=gate, switch=1.0).sum().backward()
    assert logits.grad.abs().max() < 1e-7
    assert dict(zip(SUMS, tally[12:].tolist(), strict=True))["switch"] == pytest.approx(6.0)


def test_an_empty_pool_stands_for_the_call_itself():
    grads = []
    for scope in ("batch", "pool"):
        logits, weights, indices, tally = routed(1)
        balance(weights, logits, indices, tally, switch=1.0, scope=scope).sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def _block(logits, weights, indices, tally):
    return (balance(weights * 2, logits * 1.0, indices, tally, switch=0.5, z=0.1) * 3).sum()


def _run(around, **fresh):
    logits, weights, indices, tally = routed(3, **fresh)
    around(_block)(logits, weights, indices, tally).backward()
    return logits.grad, weights.grad, tally


def test_recomputation_and_compilation_change_no_bit_and_count_once():
    expected = _run(lambda f: f)
    assert expected[2][:5].sum() == 24 and expected[0].abs().max() > 0

    def recomputed(function):
        return lambda *args: checkpoint(function, *args, use_reentrant=False)

    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    for around in (recomputed, lambda f: compiled, lambda f: recomputed(compiled)):
        assert all(torch.equal(a, b) for a, b in zip(expected, _run(around), strict=True))


def test_compilation_also_counts_where_the_router_is_not_trained():
    logits, weights, indices, tally = routed(4)
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    compiled(logits.detach(), weights, indices, tally).backward()
    assert tally[:5].sum() == 24


def test_two_microbatches_may_be_under_way_at_once_and_nothing_is_counted_without_gradients():
    logits, weights, indices, tally = routed(5)
    with torch.no_grad():
        _block(logits, weights, indices, tally)
    first, second = _block(logits, weights, indices, tally), _block(logits, weights, indices, tally)
    assert not tally.any()
    first.backward()
    second.backward()
    assert tally[:5].sum() == 48


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 99))
def test_four_shares_add_up_to_the_batch(seed):
    """z is a mean over tokens, and with f of the pool the Switch loss is one too: both are those of the whole batch."""
    logits, weights, indices, tally = routed(seed, 16)
    parts_of(tally, 5)[1].copy_(torch.rand(5))
    options = {"switch": 0.3, "z": 0.1, "scope": "pool"}
    balance(weights, logits, indices, tally.clone(), **options).sum().backward()
    parts = logits.detach().clone().requires_grad_()
    for part, w, i in zip(parts.split(4), weights.split(4), indices.split(4), strict=True):
        with share_of_batch(0.25):
            balance(w, part, i, tally, **options).sum().backward()
    assert (parts.grad - logits.grad).abs().max() <= 1e-12 * logits.grad.abs().max()
    assert tally[:5].sum() == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "softmx"}, "no gate 'softmx'; .*softmax"), ({"scope": "global"}, "no scope 'global'"), ({"sequence": 0.1}, "needs tokens_in_sequence"),
    ],
)  # fmt: skip
def test_unknown_options_are_named(change, message):
    logits, weights, indices, tally = routed(0)
    with pytest.raises(ValueError, match=message):
        balance(weights, logits, indices, tally, **change)


def test_shapes_that_do_not_fit_are_named():
    logits, weights, indices, tally = routed(0)
    with pytest.raises(ValueError, match="tally of 5 experts is float64 \\[17\\]"):
        balance(weights, logits, indices, tally[1:])
    with pytest.raises(ValueError, match="no sequences of 5"):
        balance(weights, logits, indices, tally, sequence=0.1, tokens_in_sequence=5).sum().backward()
    with pytest.raises(ValueError, match="a microbatch cannot be 0"), share_of_batch(0.0):
        pass

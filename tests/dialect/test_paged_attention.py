"""ftc::paged_attention: the definition against a plain loop, every fast path against the definition, writes, errors, compile."""

import pytest
import torch
from helpers_paged import SIZES, TOLERANCE, error, rows
from helpers_paged import key_value_case as case
from hypothesis import given
from hypothesis import strategies as st

import ftc.dialect  # noqa: F401
from ftc.dialect import paged_attention as op
from ftc.errors import FtcError

paged_attention = torch.ops.ftc.paged_attention


def loop(query, history, cached, new, scale, window=None, softcap=None):
    """One query and head at a time, in float64."""
    batch, heads, num_tokens, _ = query.shape
    groups, value_width = history[0][1].shape[1:]
    out = torch.zeros(batch, heads, num_tokens, value_width, dtype=torch.float64)
    for b, (keys, values) in enumerate(history):
        for t in range(int(new[b])):
            last = int(cached[b]) + t
            first = 0 if window is None else max(0, last - window + 1)
            for h in range(heads):
                g = h // (heads // groups)
                scores = keys[first : last + 1, g].double() @ query[b, h, t].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, h, t] = scores.softmax(0) @ values[first : last + 1, g].double()
    return out


SHAPES = {"groups": st.integers(1, 3), "share": st.integers(1, 3), "width": st.sampled_from([4, 8]), "value_width": st.sampled_from([3, 8])}
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@pytest.mark.parametrize("function", [op.reference, paged_attention], ids=["definition", "op"])
@given(SIZES, st.fixed_dictionaries(SHAPES), DTYPES, st.sampled_from([None, 1, 3, 17]), st.sampled_from([None, 2.0]))
def test_equals_a_loop_over_queries_and_heads(function, sizes, shapes, dtype, window, softcap):
    inputs, history = case(**sizes, **shapes, dtype=dtype)
    result = function(*inputs, scale=0.4, window=window, softcap=softcap)
    expected = loop(inputs[0], history, *inputs[6:], 0.4, window, softcap)
    assert result.dtype == dtype and error(result, expected) <= TOLERANCE[dtype]


@given(SIZES, st.fixed_dictionaries(SHAPES), st.sampled_from([None, 1, 3, 17]))
def test_fused_call_over_gathered_pages_equals_the_definition(sizes, shapes, window):
    """What CUDA runs for prefill; it waits for no value of the device, so the CPU can show it."""
    inputs, history = case(**sizes, **shapes, dtype=torch.float64)
    result = op._cuda(*inputs, scale=0.4, window=window)
    assert error(result, loop(inputs[0], history, *inputs[6:], 0.4, window)) <= 1e-12


@given(SIZES, st.fixed_dictionaries(SHAPES))
def test_writes_real_tokens_in_place_and_nothing_else(sizes, shapes):
    inputs, history = case(**sizes, **shapes, dtype=torch.float32)
    before = [cache.clone() for cache in inputs[3:5]]
    paged_attention(*inputs, scale=1.0)
    block_table, cached, new = inputs[5:]
    for cache, old, which in zip(inputs[3:5], before, (0, 1), strict=True):
        changed = (cache.view(torch.int32) != old.view(torch.int32)).flatten(2).any(-1)
        assert changed.sum() == new.sum()
        for b, tokens in enumerate(history):
            total = int(cached[b] + new[b])
            for slot, token in zip(rows(cache, block_table, b, total), tokens[which], strict=True):
                assert torch.equal(slot, token)


@given(SIZES, st.fixed_dictionaries(SHAPES), st.sampled_from([torch.float8_e4m3fn, torch.int8]), DTYPES)
def test_quantised_cache_reads_what_was_written_within_its_rounding(sizes, shapes, cache_dtype, dtype):
    sizes = {**sizes, "longest": 0, "num_tokens": sizes["num_tokens"] + 5}
    inputs, history = case(**sizes, **shapes, dtype=dtype, cache_dtype=cache_dtype)
    scales = [torch.full(inputs[3].shape[:3], float("nan")) for _ in range(2)]
    result = paged_attention(*inputs, *scales, scale=0.4)
    # A row's error is at most half a step of its largest magnitude (int8), or 2^-4 of each value, 2^-10 of the largest (e4m3).
    for cache, scale, which in zip(inputs[3:5], scales, (0, 1), strict=True):
        for b, pair in enumerate(history):
            count = int(inputs[7][b])
            stored = rows(cache, inputs[5], b, count)
            steps = rows(scale, inputs[5], b, count)
            for slot, step, token in zip(stored, steps, pair[which].float(), strict=True):
                largest = token.abs().amax(-1, keepdim=True)
                bound = largest / 253 if cache_dtype == torch.int8 else token.abs() / 16 + largest / 1024
                assert ((slot.float() * step[:, None] - token).abs() <= bound).all()
    # ... and the output is exactly that of the values that were stored.
    dequantised = [
        tuple(
            torch.stack([slot.float() * step[:, None] for slot, step in zip(rows(c, inputs[5], b, n), rows(s, inputs[5], b, n), strict=True)])
            if (n := int(inputs[7][b]))
            else torch.zeros(0, *c.shape[2:])
            for c, s in zip(inputs[3:5], scales, strict=True)
        )
        for b in range(sizes["batch"])
    ]
    expected = loop(inputs[0], dequantised, *inputs[6:], 0.4)
    assert error(result, expected) <= max(TOLERANCE[dtype], 1e-5)  # the scales are float32


@given(SIZES, st.fixed_dictionaries(SHAPES), st.integers(1, 3))
def test_chunks_one_after_another_equal_all_at_once(sizes, shapes, chunk):
    sizes = {**sizes, "num_tokens": 7}
    inputs, _ = case(**sizes, **shapes, dtype=torch.float64, ragged=False)
    query, key, value, *caches, block_table, cached, new = inputs
    copies = [cache.clone() for cache in caches]
    whole = paged_attention(*inputs, scale=0.5)
    parts = []
    for start in range(0, 7, chunk):
        part = slice(start, min(start + chunk, 7))
        size = torch.full_like(new, part.stop - part.start)
        parts.append(paged_attention(query[:, :, part], key[:, :, part], value[:, :, part], *copies, block_table, cached + start, size, scale=0.5))
    assert error(torch.cat(parts, 2), whole) <= 1e-12


def simple(**changes):
    sizes = {"batch": 2, "num_tokens": 1, "block_size": 4, "longest": 9, "consecutive": False, "seed": 1}
    shapes = {"groups": 2, "share": 2, "width": 4, "value_width": 4, "dtype": torch.float32, "ragged": False}
    return case(**{**sizes, **shapes, **changes})


def test_a_full_cache_and_a_missing_block_are_named_before_any_write():
    inputs, _ = simple()
    *_, block_table, cached, new = inputs
    before = inputs[3].clone()
    full = [*inputs[:6], torch.tensor([4 * block_table.shape[1], 1], dtype=torch.int32), new]
    with pytest.raises(FtcError, match=r"cache full: sequence 0 needs \d+ tokens .* hold \d+"):
        paged_attention(*full, scale=1.0)
    far = block_table.clone()
    far[1, 0] = inputs[3].shape[0]
    with pytest.raises(FtcError, match=rf"sequence 1 names block {inputs[3].shape[0]}; the cache has blocks 0 to"):
        paged_attention(*inputs[:5], far, cached, new, scale=1.0)
    with pytest.raises(FtcError, match="new between 0 and 1"):
        paged_attention(*inputs[:7], new + 1, scale=1.0)
    assert torch.equal(inputs[3].view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.__setitem__(1, i[1][..., :3]), "do not fit"),
        (lambda i: i.__setitem__(0, i[0][:, :3]), "3 heads cannot share 2"),
        (lambda i: i.__setitem__(3, i[3][:, :, :1]), "key_cache .* must be"),
        (lambda i: i.__setitem__(5, i[5].float()), "block_table is torch.float32"),
        (lambda i: i.__setitem__(6, i[6][:1]), r"cached has shape \[1\]"),
        (lambda i: i.__setitem__(4, i[4].to(torch.int8)), "needs value_scale"),
        (lambda i: i.__setitem__(4, i[4].to(torch.int32)), "value_cache is torch.int32"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(change, message):
    inputs, _ = simple()
    change(inputs)
    with pytest.raises(FtcError, match=message):
        paged_attention(*inputs, scale=1.0)


def test_registration_is_sound_and_the_node_is_not_dead_code():
    inputs, _ = simple()
    inputs[3:5] = [torch.zeros_like(cache) for cache in inputs[3:5]]  # opcheck compares with ==, NaN would not be equal
    torch.library.opcheck(paged_attention.default, tuple(inputs), {"scale": 0.5})
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(8)]
    graph.call_function(paged_attention.default, tuple(nodes), {"scale": 0.5})
    graph.output(nodes[0])
    graph.eliminate_dead_code()
    assert any(node.target is paged_attention.default for node in graph.nodes)


def test_compiled_equals_eager_and_mutates_the_caches():
    inputs, _ = simple()
    copies = [*inputs[:3], *(cache.clone() for cache in inputs[3:5]), *inputs[5:]]

    def step(*tensors):
        return paged_attention(*tensors, scale=0.5) * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*copies), step(*inputs))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(copies[3:5], inputs[3:5], strict=True))

"""ftc::paged_latent_attention: both forms against attention over written-out keys and values, the FP8 rows, errors, compile."""

import pytest
import torch
from helpers_paged import SIZES, TOLERANCE, error, rows
from helpers_paged import latent_case as case
from hypothesis import given
from hypothesis import strategies as st

import ftc.dialect  # noqa: F401
from ftc.dialect import fp8_latent
from ftc.dialect import paged_latent_attention as op
from ftc.errors import FtcError

paged_latent_attention = torch.ops.ftc.paged_latent_attention
SHAPES = {
    "groups": st.integers(1, 3),
    "share": st.integers(1, 2),
    "nope": st.sampled_from([0, 3, 8]),
    "rope": st.sampled_from([2, 4]),
    "width": st.sampled_from([4, 6, 132]),
    "value_width": st.sampled_from([2, 5]),
}
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
FORMS = pytest.mark.parametrize("absorb_up_to", [0, 16], ids=["expanded", "absorbed"])


def written_out(inputs, history, groups, scale):
    """Keys and values of every sequence written out in float64, one query and head at a time."""
    q_nope, q_pe, latent, k_pe, kv_b, *_, cached, new = inputs
    batch, heads, num_tokens, nope = q_nope.shape
    weights = kv_b.double().unflatten(0, (groups, -1))
    out = torch.zeros(batch, heads, num_tokens, weights.shape[1] - nope, dtype=torch.float64)
    for b, tokens in enumerate(history):
        if tokens.dtype == torch.uint8:
            c, r = fp8_latent.unpack(tokens, latent.shape[-1], k_pe.shape[-1], torch.float64)
        else:
            c, r = tokens.double().split([latent.shape[-1], k_pe.shape[-1]], -1)
        for t in range(int(new[b])):
            last = int(cached[b]) + t + 1
            for h in range(heads):
                weight = weights[h // (heads // groups)]
                scores = (c @ weight[:nope].T) @ q_nope[b, h, t].double() + r @ q_pe[b, h, t].double()
                out[b, h, t] = (scores[:last] * scale).softmax(0) @ (c @ weight[nope:].T)[:last]
    return out


@FORMS
@pytest.mark.parametrize("function", [op.reference, paged_latent_attention], ids=["definition", "op"])
@given(SIZES, st.fixed_dictionaries(SHAPES), DTYPES)
def test_equals_attention_over_written_out_keys_and_values(function, absorb_up_to, sizes, shapes, dtype):
    inputs, history = case(**sizes, **shapes, dtype=dtype)
    result = function(*inputs, groups=shapes["groups"], scale=0.3, absorb_up_to=absorb_up_to)
    assert result.dtype == dtype
    assert error(result, written_out(inputs, history, shapes["groups"], 0.3)) <= TOLERANCE[dtype]


@FORMS
@given(SIZES, st.fixed_dictionaries(SHAPES), st.booleans())
def test_fused_call_over_gathered_pages_equals_written_out(absorb_up_to, sizes, shapes, packed):
    """What CUDA runs for prefill; it waits for no value of the device, so the CPU can show it."""
    inputs, history = case(**sizes, **shapes, dtype=torch.float64, packed=packed)
    result = op._cuda(*inputs, groups=shapes["groups"], scale=0.3, absorb_up_to=absorb_up_to)
    assert error(result, written_out(inputs, history, shapes["groups"], 0.3)) <= 1e-12


@given(SIZES, st.fixed_dictionaries(SHAPES), st.sampled_from([torch.float64, torch.float32]))
def test_absorbed_equals_expanded(sizes, shapes, dtype):
    inputs, _ = case(**sizes, **shapes, dtype=dtype)
    results = [paged_latent_attention(*inputs, groups=shapes["groups"], scale=0.3, absorb_up_to=upto) for upto in (0, 16)]
    assert error(results[0], results[1]) <= TOLERANCE[dtype]


@FORMS
@given(SIZES, st.fixed_dictionaries(SHAPES), DTYPES)
def test_packed_cache_gives_the_attention_of_its_stored_values(absorb_up_to, sizes, shapes, dtype):
    inputs, history = case(**sizes, **shapes, dtype=dtype, packed=True)
    result = paged_latent_attention(*inputs, groups=shapes["groups"], scale=0.3, absorb_up_to=absorb_up_to)
    assert error(result, written_out(inputs, history, shapes["groups"], 0.3)) <= TOLERANCE[dtype]


@given(SIZES, st.fixed_dictionaries(SHAPES), st.booleans())
def test_writes_real_tokens_in_place_and_nothing_else(sizes, shapes, packed):
    inputs, history = case(**sizes, **shapes, dtype=torch.float32, packed=packed)
    before = inputs[5].clone()
    paged_latent_attention(*inputs, groups=shapes["groups"], scale=1.0)
    cache, block_table, cached, new = inputs[5:]
    assert (cache.view(torch.uint8) != before.view(torch.uint8)).any(-1).sum() == new.sum()
    for b, tokens in enumerate(history):
        for slot, token in zip(rows(cache, block_table, b, int(cached[b] + new[b])), tokens, strict=True):
            assert torch.equal(slot, token)


@given(st.integers(0, 2**20), st.integers(1, 300), st.integers(0, 16), st.floats(-6, 6))
def test_packed_rows_keep_e4m3_precision_in_every_group(seed, width, rope, exponent):
    generator = torch.Generator().manual_seed(seed)
    latent, k_pe = torch.randn(3, width, generator=generator) * 10**exponent, torch.randn(3, rope, generator=generator)
    packed = fp8_latent.pack(latent, k_pe)
    assert packed.shape == (3, fp8_latent.row_bytes(width, rope)) and packed.dtype == torch.uint8
    c, r = fp8_latent.unpack(packed, width, rope, torch.float32)
    for part, back in zip(latent.split(fp8_latent.GROUP, -1), c.split(fp8_latent.GROUP, -1), strict=True):
        largest = part.abs().amax(-1, keepdim=True)
        assert ((back - part).abs() <= part.abs() / 16 * 1.001 + largest * 2**-10 / 448 * 1.001).all()
    assert torch.equal(r, k_pe.bfloat16().float())


def test_published_row_is_656_bytes():
    assert fp8_latent.row_bytes(512, 64) == 656


def simple(**changes):
    sizes = {"batch": 2, "num_tokens": 1, "block_size": 4, "longest": 9, "consecutive": False, "seed": 1}
    shapes = {"groups": 2, "share": 2, "nope": 4, "rope": 2, "width": 8, "value_width": 3, "dtype": torch.float32, "ragged": False}
    return case(**{**sizes, **shapes, **changes})


def test_a_full_cache_and_a_missing_block_are_named_before_any_write():
    inputs, _ = simple()
    *_, block_table, cached, new = inputs
    before = inputs[5].clone()
    with pytest.raises(FtcError, match=r"cache full: sequence 1 needs \d+ tokens .* hold \d+"):
        paged_latent_attention(*inputs[:7], torch.tensor([1, 4 * block_table.shape[1]]), new, groups=2, scale=1.0)
    with pytest.raises(FtcError, match="sequence 0 names block 99; the cache has blocks 0 to"):
        paged_latent_attention(*inputs[:6], block_table.masked_fill(block_table >= 0, 99), cached, new, groups=2, scale=1.0)
    assert torch.equal(inputs[5].view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "groups", "message"),
    [
        (lambda i: i.__setitem__(0, i[0][:, :1]), 2, "q_nope .* must be"),
        (lambda i: i.__setitem__(2, i[2][:1]), 2, "latent .* must be"),
        (lambda i: None, 3, "do not fit 3 groups"),
        (lambda i: i.__setitem__(4, i[4][:8]), 2, "leaves no value"),
        (lambda i: i.__setitem__(5, i[5][..., :9]), 2, r"must be \[num_blocks, block_size, 10\] .* or .* 16\] in torch.uint8"),
        (lambda i: i.__setitem__(8, i[8].bool()), 2, "new is torch.bool"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(change, groups, message):
    inputs, _ = simple()
    change(inputs)
    with pytest.raises(FtcError, match=message):
        paged_latent_attention(*inputs, groups=groups, scale=1.0)


@FORMS
def test_registration_is_sound_and_compiled_equals_eager(absorb_up_to):
    options = {"groups": 2, "scale": 0.5, "absorb_up_to": absorb_up_to}
    inputs, _ = simple()
    inputs[5] = torch.zeros_like(inputs[5])  # opcheck compares with ==, NaN would not be equal
    torch.library.opcheck(paged_latent_attention.default, tuple(inputs), options)
    copies = [tensor.clone() for tensor in inputs]

    def step(*tensors):
        return paged_latent_attention(*tensors, **options) * 2

    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*copies), step(*inputs))
    assert torch.equal(copies[5], inputs[5]) and copies[5].any()
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(9)]
    graph.call_function(paged_latent_attention.default, tuple(nodes), options)
    graph.output(nodes[0])
    graph.eliminate_dead_code()
    assert any(node.target is paged_latent_attention.default for node in graph.nodes)

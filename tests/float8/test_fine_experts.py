"""`ftc::float8_moe`: `ftc::moe` where FP8 is exact, close to it elsewhere, and what it keeps and refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc.dialect  # noqa: F401
from ftc.dialect import moe
from ftc.errors import FtcError
from ftc.float8.fine_experts import form_of
from ftc.float8.recipes import NAMES

OPS = torch.ops.ftc
SIZES = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([1, 6, 30]), "experts": st.integers(1, 4), "share": st.integers(1, 3), "wide": st.sampled_from([16, 48, 144]),
        "inner": st.sampled_from([16, 130]), "gated": st.booleans(), "biased": st.booleans(), "on_input": st.booleans(), "seed": st.integers(0, 2**20),
    }
)  # fmt: skip


def routing(tokens, experts, share, generator, dropped):
    share = min(share, experts)
    indices = torch.stack([torch.randperm(experts, generator=generator)[:share] for _ in range(tokens)])
    indices[torch.rand(tokens, share, generator=generator) < dropped] = experts
    return indices


def selecting(experts, rows, columns, generator, ones):
    """[E, rows, columns]: each row picks a column, times 1 or -1, no column twice where there are enough."""
    matrix = torch.zeros(experts, rows, columns)
    for e in range(experts):
        order = torch.cat([torch.randperm(columns, generator=generator) for _ in range(-(-rows // columns))])[:rows]
        matrix[e, torch.arange(rows), order] = ones(rows)
    return matrix


def exact_case(tokens, experts, share, wide, inner, gated, biased, seed, on_input=False, dropped=0.2):
    """Tensors whose products FP8 does without rounding: small powers of two that matrices pick, none more than twice."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.tensor([-1.0, 1.0, 2.0, 0.0])[torch.randint(4, shape, generator=generator)]  # noqa: E731
    sign = lambda count: torch.tensor([-1.0, 1.0])[torch.randint(2, (count,), generator=generator)]  # noqa: E731
    indices = routing(tokens, experts, share, generator, dropped)
    weights = torch.tensor([0.5, 1.0, -2.0])[torch.randint(3, indices.shape, generator=generator)]
    gate_up = selecting(experts, inner * (2 if gated else 1), wide, generator, sign)
    down = selecting(experts, inner, wide, generator, sign).transpose(1, 2).contiguous()
    tensors = [draw(tokens, wide), weights, gate_up, down, *([0 * gate_up[:, :, 0], draw(experts, wide)] if biased else [None, None])]
    return tensors, indices, draw(tokens, wide)


def normal_case(tokens, experts, share, wide, inner, gated, biased, seed, on_input=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    indices, high = routing(tokens, experts, share, generator, 0.2), inner * (2 if gated else 1)
    tensors = [normal(tokens, wide), normal(*indices.shape), normal(experts, high, wide) * wide**-0.5, normal(experts, wide, inner) * inner**-0.5]
    tensors += [normal(experts, high), normal(experts, wide)] if biased else [None, None]
    return [None if t is None else t.to(dtype) for t in tensors], indices, normal(tokens, wide).to(dtype)


def both_ways(operator, tensors, indices, grad, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = operator(leaves[0], indices, *leaves[1:], **options)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


@pytest.mark.parametrize("recipe", NAMES)
def test_where_every_number_is_exact_it_is_the_mixture(recipe):
    @settings(max_examples=8)
    @given(SIZES)
    def check(sizes):
        tensors, indices, grad = exact_case(**sizes)
        options = {"activation": "identity", "weight_on_input": sizes["on_input"]}
        got = both_ways(OPS.float8_moe, tensors, indices, grad, recipe=recipe, **options)
        expected = both_ways(OPS.moe, tensors, indices, grad, **options)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("recipe", NAMES)
def test_elsewhere_it_is_close_to_it(recipe):
    """In norm, forward and every gradient: tensorwise casts gradients to e5m2, with two bits of mantissa."""
    sizes = {"tokens": 80, "experts": 3, "share": 2, "wide": 160, "inner": 144, "gated": True, "biased": True, "seed": 3}
    for on_input in (False, True):
        tensors, indices, grad = normal_case(**sizes)
        got = both_ways(OPS.float8_moe, tensors, indices, grad, recipe=recipe, weight_on_input=on_input)
        expected = both_ways(OPS.moe, tensors, indices, grad, weight_on_input=on_input)
        for g, e in zip(got[:-1], expected[:-1], strict=True):
            assert 1e-3 * e.norm() < (g - e).norm() < 0.11 * e.norm()
        torch.testing.assert_close(got[-1], expected[-1])  # the bias behind the last product meets no FP8


@pytest.mark.parametrize("recipe", ["fine", "rowwise"])
def test_another_experts_matrix_would_be_noticed(recipe):
    sizes = {"tokens": 30, "experts": 3, "share": 2, "wide": 48, "inner": 40, "gated": True, "biased": False, "seed": 5}
    tensors, indices, _ = exact_case(**sizes)
    right = OPS.float8_moe(tensors[0], indices, *tensors[1:], activation="identity", recipe=recipe)
    for place in (2, 3):
        wrong = [t.roll(1, 0) if i == place else t for i, t in enumerate(tensors)]
        assert (OPS.float8_moe(wrong[0], indices, *wrong[1:], activation="identity", recipe=recipe) - right).norm() > 0.1 * right.norm()


def test_the_weight_of_zero_on_the_input_has_its_gradient():
    sizes = {"tokens": 12, "experts": 2, "share": 1, "wide": 32, "inner": 16, "gated": False, "biased": True, "seed": 8}
    tensors, indices, grad = exact_case(**sizes)
    tensors[1].zero_()
    options = {"activation": "identity", "weight_on_input": True}
    got = both_ways(OPS.float8_moe, tensors, indices, grad, recipe="fine", **options)
    expected = both_ways(OPS.moe, tensors, indices, grad, **options)
    assert expected[2].abs().max() > 0
    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("recipe", NAMES)
def test_one_cast_of_the_tokens_is_all_that_is_kept_of_them(recipe):
    sizes = {"tokens": 64, "experts": 8, "share": 4, "wide": 256, "inner": 96, "gated": True, "biased": False, "seed": 1}
    tensors, indices, _ = normal_case(**sizes, dtype=torch.bfloat16)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        OPS.float8_moe(leaves[0] * 1, indices, *leaves[1:], recipe=recipe)
    given_ones = {t.data_ptr() for t in (indices, *leaves) if t is not None}
    own = [t for t in found if t.data_ptr() not in given_ones and t.dtype != torch.bfloat16]
    assert not [t for t in found if t.dtype == torch.bfloat16 and t.data_ptr() not in given_ones]
    assert sum(t.untyped_storage().nbytes() for t in own) <= 64 * (256 + 4 * 256 // 128)


@pytest.mark.parametrize("recipe", ["fine", "rowwise"])
def test_compiled_it_gives_the_same_bits(recipe):
    sizes = {"tokens": 20, "experts": 3, "share": 2, "wide": 48, "inner": 32, "gated": True, "biased": True, "seed": 2}
    tensors, indices, grad = normal_case(**sizes)
    run = torch.compile(lambda x, *rest: OPS.float8_moe(x, *rest, recipe=recipe), backend="aot_eager", fullgraph=True)
    for g, e in zip(both_ways(run, tensors, indices, grad), both_ways(OPS.float8_moe, tensors, indices, grad, recipe=recipe), strict=True):
        assert torch.equal(g, e)


def test_only_wanted_gradients_are_made_and_are_the_same():
    sizes = {"tokens": 20, "experts": 3, "share": 2, "wide": 48, "inner": 32, "gated": True, "biased": True, "seed": 4}
    tensors, indices, grad = normal_case(**sizes)
    for on_input in (False, True):
        whole = both_ways(OPS.float8_moe, tensors, indices, grad, recipe="fine", weight_on_input=on_input)[1:]
        for place in range(6):
            leaves = [t.detach().requires_grad_(i == place) for i, t in enumerate(tensors)]
            out = OPS.float8_moe(leaves[0], indices, *leaves[1:], recipe="fine", weight_on_input=on_input)
            assert torch.equal(torch.autograd.grad(out, leaves[place], grad)[0], whole[place])


def test_experts_without_tokens_and_tokens_without_experts():
    sizes = {"tokens": 6, "experts": 4, "share": 1, "wide": 32, "inner": 16, "gated": True, "biased": True, "seed": 6}
    tensors, indices, grad = normal_case(**sizes)
    indices.fill_(1)[0] = 4
    got = both_ways(OPS.float8_moe, tensors, indices, grad, recipe="fine")
    assert not got[0][0].any() and got[0][1:].any() and not got[1][0].any()
    for gradient in got[3:]:
        assert not gradient[[0, 2, 3]].any() and gradient[1].any()
    indices.fill_(4)
    assert not any(t.any() for t in both_ways(OPS.float8_moe, tensors, indices, grad, recipe="fine"))


@pytest.mark.parametrize("recipe", NAMES)
def test_what_does_not_fit_or_is_not_finite_is_an_error(recipe):
    sizes = {"tokens": 6, "experts": 2, "share": 1, "wide": 32, "inner": 16, "gated": True, "biased": False, "seed": 6}
    tensors, indices, _ = normal_case(**sizes)
    run = lambda tensors, **options: OPS.float8_moe(tensors[0], indices, *tensors[1:], recipe=recipe, **options)  # noqa: E731
    with pytest.raises(ValueError, match="no activation 'sillu'"):
        run(tensors, activation="sillu")
    with pytest.raises(ValueError, match="gate_up must be"):
        run([*tensors[:3], tensors[3][:, :, :5], *tensors[4:]])
    with pytest.raises(FtcError, match="infinities or NaN"):
        run([tensors[0].log(), *tensors[1:]])


def test_a_recipe_that_there_is_not_is_named():
    with pytest.raises(FtcError, match="no recipe 'finer'; did you mean 'fine'"):
        form_of("finer")


def test_fakes_have_the_shapes_of_the_operators():
    sizes = {"tokens": 6, "experts": 2, "share": 1, "wide": 160, "inner": 16, "gated": True, "biased": True, "seed": 6}
    tensors, indices, grad = normal_case(**sizes)
    meta = lambda ts: [t.to("meta") if isinstance(t, torch.Tensor) else t for t in ts]  # noqa: E731
    for recipe in NAMES:
        arguments = [tensors[0], indices, *tensors[1:]]
        made = OPS.float8_moe_forward(*arguments, recipe=recipe)
        rest = [indices, *tensors[1:], "silu", [], False, recipe, [True] * 6]
        for real, fake in (
            (made, OPS.float8_moe_forward(*meta(arguments), recipe=recipe)),
            (OPS.float8_moe_backward(grad, *made[1:], *rest), OPS.float8_moe_backward(*meta([grad, *made[1:], *rest]))),
        ):
            assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


def test_the_definition_has_the_arguments_of_the_mixture():
    options = {"activation": moe.CLAMPED, "constants": [1.7, 7.0]}
    sizes = {"tokens": 40, "experts": 3, "share": 2, "wide": 64, "inner": 48, "gated": True, "biased": True, "seed": 7}
    tensors, indices, grad = normal_case(**sizes)
    got = both_ways(OPS.float8_moe, tensors, indices, grad, recipe="fine", **options)
    expected = both_ways(OPS.moe, tensors, indices, grad, **options)
    assert all((g - e).norm() < 0.1 * e.norm() for g, e in zip(got, expected, strict=True))

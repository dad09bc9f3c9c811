"""ftc::moe and ftc::fused_moe equal each other, results and gradients, in every mode that PyTorch runs them in."""

import functools

import pytest
import torch
from helpers_moe import CASES, NAMES, TOLERANCE, assert_equal, draw, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from ftc.dialect import fused_moe, moe
from ftc.kernels import cpu_moe

fused, plain = torch.ops.ftc.fused_moe, torch.ops.ftc.moe
ONE = dict(
    seed=0, tokens=9, experts=4, top_k=2, width=8, middle=6, activation="silu", gated=True, bias=True, dropped=True, weight_on_input=False
)  # fmt: skip


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """Both with the compiled kernel and without."""
    if request.param == "plain":
        monkeypatch.setattr(cpu_moe, "library", lambda: None)
    elif cpu_moe.library() is None:
        pytest.skip("needs a C++ compiler")


@given(**CASES, dtype=st.sampled_from(list(TOLERANCE)))
def test_moe_equals_its_definition(dtype, **case):
    tensors, options = draw(**case, dtype=dtype)
    expected = with_gradients(moe.definition, tensors, options)
    assert_equal(with_gradients(plain, tensors, options), expected, 0.0)


def test_definition_is_a_sum_over_chosen_experts():
    (x, indices, weights, gate_up, down, gate_up_bias, down_bias), options = draw(**ONE)
    for n in range(x.shape[0]):
        expected = torch.zeros(8, dtype=torch.float64)
        for e, w in zip(indices[n].tolist(), weights[n], strict=True):
            if e < 4:
                gate, up = (gate_up[e] @ x[n] + gate_up_bias[e]).chunk(2)
                expected = expected + w * (down[e] @ (gate * torch.sigmoid(gate) * up) + down_bias[e])
        torch.testing.assert_close(plain(x, indices, weights, gate_up, down, gate_up_bias, down_bias)[n], expected, rtol=1e-13, atol=1e-13)


@given(**CASES, dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]), compiled=st.booleans())
def test_fused_equals_the_definition(dtype, compiled, **case):
    tensors, options = draw(**case, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(cpu_moe, "library", lambda: None)
        assert_equal(with_gradients(fused, tensors, options), with_gradients(moe.definition, tensors, options), TOLERANCE[dtype])


@given(**CASES, weights_dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_bfloat16_is_as_close_to_float64_as_the_definition(weights_dtype, **case):
    tensors, options = draw(**case | {"activation": "silu"}, dtype=torch.bfloat16, weights_dtype=weights_dtype)
    exact = [t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_() for t in tensors]
    truth = with_gradients(moe.definition, exact, options)
    got, reference = with_gradients(fused, tensors, options), with_gradients(moe.definition, tensors, options)
    for name, one in got.items():
        assert one.dtype == reference[name].dtype
        distance = (reference[name].double() - truth[name]).norm()
        assert (one.double() - truth[name]).norm() <= 1.3 * distance + 2e-2 * truth[name].norm(), name


@given(**CASES)
def test_gathered_equals_the_definition(**case):
    tensors, options = draw(**case)
    with torch.no_grad():
        got = fused_moe.gathered(*tensors, *options.values())
        assert_equal({"out": got}, {"out": moe.definition(*tensors, **options)}, 1e-12)


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_grouped_products_equal_one_by_one(weight_on_input):
    case = ONE | {"tokens": 30, "width": 16, "middle": 32, "experts": 7, "weight_on_input": weight_on_input}
    tensors, options = draw(**case, dtype=torch.float32)
    tensors[1][tensors[1] == 2] = 7  # an expert of no rows
    with torch.no_grad():
        arguments, want = (*tensors, *options.values()), [True] * 6
        grad = torch.randn_like(tensors[0])
        for function, inputs in ((fused_moe.sorted_forward, arguments), (fused_moe.sorted_backward, (grad, *arguments, want))):
            one, other = function(*inputs, grouped=True), function(*inputs, grouped=False)
            one, other = (dict(zip(NAMES, x if isinstance(x, tuple) else (x,), strict=False)) for x in (one, other))
            assert_equal(one, other, 1e-5)


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(kernels, weight_on_input, bias):
    tensors, options = draw(**ONE | {"tokens": 3, "width": 3, "middle": 2, "bias": bias, "weight_on_input": weight_on_input})
    x, indices, *rest = tensors
    assert torch.autograd.gradcheck(lambda x, *rest: fused(x, indices, *rest, **options), (x, *rest))


def test_an_expert_of_no_tokens_has_zero_gradients(kernels):
    tensors, options = draw(**ONE)
    indices = tensors[1]
    indices[indices == 1] = 4
    found = with_gradients(fused, tensors, options)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert not found[name][1].any() and found[name][0].any()


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_gradients_asked_for_are_made(kernels, wanted):
    tensors, options = draw(**ONE)
    leaves = [tensors[0], *tensors[2:]]
    expected = torch.autograd.grad(moe.definition(*tensors, **options).sum(), leaves[wanted])[0]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    made = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.ftc.fused_moe_backward.default:
                made.extend(t.numel() > 0 for t in out)
            return out

    with Made():
        fused(*tensors, **options).sum().backward()
    assert made == [i == wanted for i in range(6)]
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_without_grad_mode(kernels):
    tensors, options = draw(**ONE)
    with torch.no_grad():
        assert not fused(*tensors, **options).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fused(*tensors, **options), moe.definition(*tensors, **options))
    assert not fused(*(t if t is None else t.detach() for t in tensors), **options).requires_grad


def test_inputs_that_are_not_contiguous(kernels):
    tensors, options = draw(**ONE)
    expected = with_gradients(moe.definition, tensors, options)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    strided = [t.requires_grad_() if t.is_floating_point() else t for t in strided]
    assert not any(t.is_contiguous() for t in strided)
    assert_equal(with_gradients(fused, strided, options), expected, 1e-12)


@pytest.mark.parametrize("operator", [plain, fused], ids=["moe", "fused_moe"])
def test_torch_compile_keeps_one_node_and_its_gradient(operator):
    graphs = []

    def keep(module, example):
        graphs.append([n.target for n in module.graph.nodes if n.op == "call_function"])
        return torch._dynamo.backends.debugging.aot_eager(module, example)

    options = draw(**ONE)[1]
    compiled = torch.compile(functools.partial(operator, **options), backend=keep, fullgraph=True, dynamic=True)
    for tokens in (9, 14):
        tensors, _ = draw(**ONE | {"tokens": tokens})
        assert_equal(with_gradients(lambda *t, **_: compiled(*t), tensors, options), with_gradients(moe.definition, tensors, options), 1e-12)
    assert graphs and all(graph.count(operator) + graph.count(operator.default) == 1 for graph in graphs)


def test_export_keeps_the_node_with_dynamic_tokens():
    tensors, options = draw(**ONE)

    class Experts(torch.nn.Module):
        def forward(self, x, indices, weights):
            return fused(x, indices, weights, *tensors[3:], **options)

    size = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Experts(), tensors[:3], dynamic_shapes=({0: size},) * 3, strict=False)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [fused.default]
    other, _ = draw(**ONE | {"tokens": 17})
    torch.testing.assert_close(program.module()(*other[:3]), moe.definition(*other[:3], *tensors[3:], **options))


def test_under_activation_checkpointing(kernels):
    tensors, options = draw(**ONE)
    recomputed = lambda *t, **o: checkpoint(functools.partial(fused, **o), *t, use_reentrant=False)  # noqa: E731
    assert_equal(with_gradients(recomputed, tensors, options), with_gradients(moe.definition, tensors, options), 1e-12)


def test_nothing_but_the_inputs_is_kept_for_the_backward():
    tensors, options = draw(**ONE | {"tokens": 200})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(*tensors, **options)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("operator", [plain, fused], ids=["moe", "fused_moe"])
def test_torch_library_accepts_the_registration(operator):
    tensors, options = draw(**ONE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, tensors, options, test_utils=checks)


@pytest.mark.parametrize("operator", [plain, fused], ids=["moe", "fused_moe"])
@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (9, 7), "does not fit its 4 experts"),
        (0, (8, 8), "does not fit its 4 experts"),
        (2, (9, 3), "does not fit its 4 experts"),
        (3, (4, 11, 8), "do not fit each other"),
        (4, (5, 8, 6), "do not fit each other"),
        (4, (8, 6), "takes x"),
    ],
)
def test_shapes_that_do_not_fit_are_named(operator, place, shape, message):
    tensors, options = draw(**ONE)
    changed = [torch.zeros(shape, dtype=torch.float64) if i == place else t for i, t in enumerate(tensors)]
    with pytest.raises(ValueError, match=message):
        operator(*changed, **options)


@pytest.mark.parametrize(("place", "name"), [(5, "gate_up_bias"), (6, "down_bias")])
def test_a_bias_that_does_not_fit_is_named(place, name):
    tensors, options = draw(**ONE)
    with pytest.raises(ValueError, match=rf"{name} is \[4, 3\]"):
        fused(*(torch.zeros(4, 3, dtype=torch.float64) if i == place else t for i, t in enumerate(tensors)), **options)


@pytest.mark.parametrize("operator", [plain, fused], ids=["moe", "fused_moe"])
@pytest.mark.parametrize(
    ("change", "message"),
    [({"activation": "siluu"}, "no activation 'siluu'"), ({"constants": [1.0]}, "takes 0 constants"), ({"activation": moe.CLAMPED}, "takes 2 constants")],
)
def test_options_that_there_are_not_are_named(operator, change, message):
    tensors, options = draw(**ONE)
    with pytest.raises(ValueError, match=message):
        operator(*tensors, **options | change)


@pytest.mark.parametrize("name", ["moe", "fused_moe"])
def test_gradients_come_under_a_mode_that_looks_on(name):
    from torch.utils.flop_counter import FlopCounterMode

    x, gate_up, down = (torch.randn(*shape, requires_grad=True) for shape in ((10, 6), (5, 8, 6), (5, 6, 4)))
    weights, indices = torch.rand(10, 5).topk(2)
    with FlopCounterMode(display=False):
        getattr(torch.ops.ftc, name)(x, indices, weights, gate_up, down).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (x, gate_up, down))

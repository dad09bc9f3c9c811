"""ftc::chunk_cross_entropy equals its definition, loss and gradients, in every mode that PyTorch runs it in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc.dialect.chunk_cross_entropy as definition

op = torch.ops.ftc.chunk_cross_entropy
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw_inputs(seed, tokens, width, vocabulary, dtype, bias, ignored, ignore_index=-100):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()  # noqa: E731
    labels_N = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_N[torch.rand(tokens, generator=generator) < ignored] = ignore_index
    return make(tokens, width), make(vocabulary, width), make(vocabulary) if bias else None, labels_N


def loss_and_gradients(function, hidden, weight, bias, labels, seed, **options):
    loss = function(hidden, weight, bias, labels, **options)
    parameters = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    upstream = torch.randn(loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(seed))
    return [loss.detach(), *torch.autograd.grad(loss, parameters, upstream)]


def assert_close(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.isnan(), other.isnan())
        scale = max(other.nan_to_num().abs().max().item(), 1e-3) if other.numel() else 1.0
        assert (one - other).nan_to_num().abs().le(tolerance * scale).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 17),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 23),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk=st.none() | st.integers(1, 20),
    options=st.fixed_dictionaries(
        {
            "ignore_index": st.sampled_from([-100, 0]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
            "reduction": st.sampled_from(definition.REDUCTIONS),
            "softcap": st.sampled_from([None, 0.7, 30.0]),
            "logit_scale": st.sampled_from([1.0, 0.125, -2.0]),
            "upcast": st.booleans(),
        }
    ),
)
def test_loss_and_gradients_equal_the_definition(seed, tokens, width, vocabulary, dtype, bias, ignored, chunk, options):
    inputs = draw_inputs(seed, tokens, width, vocabulary, dtype, bias, ignored, options["ignore_index"])
    got = loss_and_gradients(op, *inputs, seed, chunk=chunk, **options)
    assert_close(got, loss_and_gradients(definition.reference, *inputs, seed, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", definition.REDUCTIONS)
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
def test_only_the_gradients_asked_for_are_made(reduction, needed):
    hidden, weight, bias, labels = draw_inputs(0, 7, 4, 11, torch.float64, True, 0.2)
    for tensor, need in zip((hidden, weight, bias), needed, strict=True):
        tensor.requires_grad_(need)
    loss = op(hidden, weight, bias, labels, reduction=reduction, chunk=3)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.sum().backward()
        expected = definition.reference(hidden, weight, bias, labels, reduction=reduction).sum()
        (one,) = (tensor for tensor in (hidden, weight, bias) if tensor.requires_grad)
        torch.testing.assert_close(one.grad, torch.autograd.grad(expected, one)[0], rtol=1e-12, atol=1e-12)
    assert [tensor.grad is not None for tensor in (hidden, weight, bias)] == list(needed)


@pytest.mark.parametrize("reduction", definition.REDUCTIONS)
def test_gradcheck(reduction):
    *tensors, labels = draw_inputs(1, 6, 3, 7, torch.float64, True, 0.3)
    assert torch.autograd.gradcheck(lambda *t: op(*t, labels, -100, 0.1, reduction, 2.0, 0.5, True, 4), tensors)


def test_gradients_accumulate_over_two_backward_calls():
    hidden, weight, _, labels = draw_inputs(2, 9, 4, 8, torch.float64, False, 0.0)
    loss = op(hidden, weight, None, labels, chunk=2)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    twice = torch.autograd.grad(3 * loss, [hidden, weight])
    assert_close(twice, [3 * gradient for gradient in once], 1e-14)


@pytest.mark.parametrize("upcast", [True, False])
def test_bfloat16_is_as_close_to_float64_as_the_definition(upcast):
    hidden, weight, bias, labels = draw_inputs(3, 64, 16, 50, torch.bfloat16, True, 0.2)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]

    def gradients(function, tensors):
        loss = function(*tensors, labels, upcast=upcast, chunk=5)
        assert loss.dtype == (torch.float64 if tensors is exact else torch.float32 if upcast else torch.bfloat16)
        return torch.autograd.grad(loss, tensors)

    truth = gradients(definition.reference, exact)
    got, plain = gradients(op, [hidden, weight, bias]), gradients(definition.reference, [hidden, weight, bias])
    for one, other, exactly in zip(got, plain, truth, strict=True):
        assert (one.double() - exactly).norm() <= 1.2 * (other.double() - exactly).norm()


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(19, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        )

    def forward(self, hidden, labels):
        return op(hidden, self.weight, None, labels, chunk=4)


def head_inputs(tokens):
    hidden, _, _, labels = draw_inputs(5, tokens, 6, 19, torch.float64, False, 0.2)
    return hidden, labels


def test_export_keeps_the_op_and_its_gradient_with_dynamic_tokens():
    model, tokens = Head(), torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, head_inputs(8), dynamic_shapes=({0: tokens}, {0: tokens}), strict=False)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [op.default]
    hidden, labels = head_inputs(13)
    expected = torch.autograd.grad(model(hidden, labels), [hidden, model.weight])
    exported = program.module()
    assert_close(torch.autograd.grad(exported(hidden, labels), [hidden, exported.weight]), expected, 1e-14)
    decomposed = program.run_decompositions()  # an inference graph: the loss alone
    (rows,) = [n for n in decomposed.graph.nodes if n.target is torch.ops.ftc.chunk_cross_entropy_rows.default]
    assert rows.args[-1] == [False, False, False]
    with torch.no_grad():
        torch.testing.assert_close(decomposed.module()(hidden, labels), model(hidden, labels))


def test_no_gradient_is_made_without_grad_mode():
    hidden, weight, bias, labels = draw_inputs(11, 7, 4, 9, torch.float64, True, 0.2)

    class Wanted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.ftc.chunk_cross_entropy_rows.default:
                self.wanted = args[-1]
            return func(*args, **(kwargs or {}))

    with Wanted() as mode, torch.no_grad():
        assert not op(hidden, weight, bias, labels).requires_grad
    assert mode.wanted == [False, False, False]
    with Wanted() as mode:
        assert op(hidden, weight, bias, labels).requires_grad
    assert mode.wanted == [True, True, True]


@pytest.mark.parametrize("reduction", definition.REDUCTIONS)
def test_aot_autograd_traces_forward_and_backward(reduction):
    function = lambda h, w, y: op(h, w, None, y, reduction=reduction, chunk=4)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (9, 14):
        hidden, weight, _, labels = draw_inputs(6, tokens, 6, 19, torch.float64, False, 0.2)
        got = loss_and_gradients(lambda h, w, b, y: compiled(h, w, y), hidden, weight, None, labels, 0)
        assert_close(
            got, loss_and_gradients(definition.reference, hidden, weight, None, labels, 0, reduction=reduction), 1e-12
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden, weight, labels), function(hidden, weight, labels))


@pytest.mark.parametrize("reduction", definition.REDUCTIONS)
def test_torch_library_accepts_the_registration(reduction):
    hidden, weight, bias, labels = draw_inputs(7, 7, 4, 9, torch.float64, True, 0.2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        op.default, (hidden, weight, bias, labels), {"reduction": reduction, "chunk": 3}, test_utils=checks
    )


@pytest.mark.parametrize("bad", [19, -1])
def test_a_label_outside_the_vocabulary_raises_as_in_pytorch(bad):
    hidden, weight, _, labels = draw_inputs(8, 7, 6, 19, torch.float64, False, 0.0)
    labels[5] = bad
    for function in (definition.reference, op):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            function(hidden, weight, None, labels, chunk=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "unknown reduction 'median'"),
        ({"label_smoothing": 1.5}, "label_smoothing 1.5"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"chunk": 0}, "chunk 0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels \\[3\\]"),
        ({"labels": torch.zeros(7, dtype=torch.int32)}, "torch.int32"),
        ({"weight": torch.zeros(19, 5, dtype=torch.float64)}, "do not fit"),
        ({"weight": torch.zeros(19, 6)}, "one floating dtype"),
        ({"bias": torch.zeros(18, dtype=torch.float64)}, "bias \\[18\\]"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, weight, _, labels = draw_inputs(9, 7, 6, 19, torch.float64, False, 0.0)
    with pytest.raises(ValueError, match=message):
        op(**{"hidden": hidden, "weight": weight, "bias": None, "labels": labels, **change})


def test_chunks_keep_to_their_bytes():
    assert definition.chunk_rows(32768, 4, None) * 32768 * 4 <= definition.CHUNK_BYTES
    assert definition.chunk_rows(10**9, 4, None) == 1
    assert definition.chunk_rows(32768, 4, 7) == 7


def test_no_tensor_of_all_logits_is_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    Largest.largest = max(Largest.largest, tensor.numel())
            return out

    hidden, weight, _, labels = draw_inputs(10, 64, 4, 100, torch.float32, False, 0.0)
    with Largest():
        definition._rows(
            hidden.detach(),
            weight.detach(),
            None,
            labels,
            torch.ones(64),
            torch.ones(()),
            -100,
            0.0,
            None,
            1.0,
            True,
            8,
            [True, True, False],
        )
    assert 8 * 100 <= Largest.largest < 64 * 100

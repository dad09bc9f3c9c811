"""`ftc::fine_linear`: the three products of the reference, what is kept between the passes, and how it stands in graphs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import ftc.dialect  # noqa: F401
from ftc.errors import FtcError
from ftc.float8 import fine

OPS = torch.ops.ftc
SIZES = st.sampled_from([1, 7, 128, 140, 257])
CASES = st.fixed_dictionaries(
    {
        "lead": st.sampled_from([(3,), (2, 5), (130,), ()]), "wide": SIZES, "out": SIZES, "biased": st.booleans(), "seed": st.integers(0, 2**20),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)  # fmt: skip


def case(lead=(2, 65), wide=200, out=140, biased=True, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    tensors = [normal(*lead, wide), normal(out, wide), normal(out) if biased else None]
    return [None if t is None else t.requires_grad_() for t in tensors], normal(*lead, out)


def both_ways(x, weight, bias, grad, **options):
    out = OPS.fine_linear(x, weight, bias, **options)
    tensors = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def by_reference(x, weight, bias, grad, power=False, requantise=False):
    """(out, dx, dW, db) by the functions of `ftc.float8.fine`."""
    rows, upstream, wide = x.reshape(-1, x.shape[-1]).detach(), grad.reshape(-1, grad.shape[-1]), x.shape[-1]
    tiles, blocks = fine.quantise_tiles(rows, power), fine.quantise_blocks(weight.detach(), power)
    turned = fine.turn_tiles(*tiles, wide, power) if requantise else fine.quantise_tiles(rows.t(), power)
    out = fine.product(*tiles, *blocks, None if bias is None else bias.detach(), x.dtype)
    dx = fine.product(*fine.quantise_tiles(upstream, power), *fine.turn_blocks(*blocks, wide), dtype=x.dtype)
    dw = fine.product(*fine.quantise_tiles(upstream.t(), power), *turned, dtype=weight.dtype)
    found = out.reshape(grad.shape), dx.reshape(x.shape), dw
    return found if bias is None else (*found, upstream.sum(0, dtype=torch.float32).to(bias.dtype))


def same(got, expected):
    assert len(got) == len(expected)
    return all(g.dtype == e.dtype and torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@given(CASES, st.booleans(), st.booleans())
def test_both_passes_are_the_references(sizes, power, requantise):
    tensors, grad = case(**sizes)
    got = both_ways(*tensors, grad, power_of_two=power, requantise=requantise)
    assert same(got, by_reference(*tensors, grad, power, requantise))


@given(CASES)
def test_it_is_about_the_linear_layer(sizes):
    tensors, grad = case(**{**sizes, "dtype": torch.float32})
    got = both_ways(*tensors, grad)
    out = torch.nn.functional.linear(*tensors)
    expected = out.detach(), *torch.autograd.grad(out, [t for t in tensors if t is not None], grad)
    x, weight = tensors[0].detach().reshape(-1, sizes["wide"]), tensors[1].detach()
    upstream = grad.reshape(-1, sizes["out"])
    # a number is within 2^-4 of itself or 2^-10 of its tile's largest / 448, so a product within 1/7 of the products of magnitudes
    sizes_of = x.abs() @ weight.abs().t(), upstream.abs() @ weight.abs(), upstream.abs().t() @ x.abs()
    largest = x.abs().max() * weight.abs().max(), upstream.abs().max() * weight.abs().max(), upstream.abs().max() * x.abs().max()
    depths = x.shape[1], weight.shape[0], x.shape[0]
    for g, e, size, most, depth in zip(got, expected, sizes_of, largest, depths, strict=False):
        assert bool(((g - e).reshape(size.shape).abs() <= size / 7 + depth * most * 2**-15).all())


def test_weight_gradients_of_tiles_cast_once_are_closer_than_of_tiles_cast_twice():
    """0.97 and 1.19 of tensorwise FP8's error; with scales that are powers of two the second cast costs little."""
    tensors, grad = case((512,), 256, 384, biased=False)
    exact = torch.nn.functional.linear(*tensors)
    exact = torch.autograd.grad(exact, tensors[1], grad)[0]
    error = lambda **options: (both_ways(*tensors, grad, **options)[2] - exact).norm().item()  # noqa: E731
    once, twice, power = error(), error(requantise=True), error(requantise=True, power_of_two=True)
    assert once < 0.87 * twice and power < 0.87 * twice


def kept(run):
    """Tensors that a forward pass keeps."""
    found = []

    def pack(tensor):
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, found


@pytest.mark.parametrize("requantise", [False, True])
def test_fp8_and_the_weight_itself_are_all_that_is_kept(requantise):
    (x, weight, bias), _ = case((384,), 256, 140, dtype=torch.bfloat16)
    _, found = kept(lambda: OPS.fine_linear(x * 1, weight, bias, requantise=requantise))
    own = [t for t in found if t.data_ptr() != weight.data_ptr()]
    assert sorted(str(t.dtype) for t in own) == ["torch.float32", "torch.float8_e4m3fn"]
    assert sum(t.untyped_storage().nbytes() for t in own) == x.numel() * (1 + 4 / 128)


def test_nothing_of_x_is_kept_for_a_weight_without_gradient():
    (x, weight, _), grad = case(biased=False)
    out, found = kept(lambda: OPS.fine_linear(x, weight.detach()))
    assert len(found) == 1 and found[0].data_ptr() == weight.data_ptr()
    torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], both_ways(x, weight, None, grad)[1], rtol=0, atol=0)
    frozen = OPS.fine_linear(x.detach(), weight)
    torch.testing.assert_close(torch.autograd.grad(frozen, weight, grad)[0], both_ways(x, weight, None, grad)[2], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_gives_the_same_bits(dynamic):
    (x, weight, bias), grad = case()
    run = torch.compile(lambda *t: OPS.fine_linear(*t).sin(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (65, 33, 2):
        tensors = x[:, :rows].detach().requires_grad_(), weight, bias
        pairs = []
        for function in (run, lambda *t: OPS.fine_linear(*t).sin()):
            out = function(*tensors)
            pairs.append((out.detach(), *torch.autograd.grad(out, tensors, grad[:, :rows])))
        assert same(*pairs)


def test_a_captured_graph_holds_one_node():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return OPS.fine_linear(x, weight) * 2

    (x, weight, _), _ = case()
    graph = torch.export.export(Model(), (x.detach(), weight.detach())).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["ftc.fine_linear.default", "aten.mul.Tensor"]


def test_the_gradients_of_input_and_weight_are_products_of_their_own():
    (x, weight, bias), grad = case()

    def step(x, weight, bias, grad):
        return torch.autograd.grad(OPS.fine_linear(x, weight, bias), (x, weight, bias), grad)

    graph = make_fx(step)(x, weight, bias, grad).graph
    dx, dw, _ = next(node for node in graph.nodes if node.op == "output").args[0]

    def product_of(node):
        while node.target is not OPS.fine_product.default:
            (node,) = node.all_input_nodes  # a view of it
        return node

    def before(node):
        return {node}.union(*(before(parent) for parent in node.all_input_nodes))

    first, second = product_of(dx), product_of(dw)
    assert first is not second and first not in before(second) and second not in before(first)


def test_what_does_not_fit_or_is_not_finite_is_an_error():
    (x, weight, bias), _ = case()
    with pytest.raises(FtcError, match=r"x \[2, 65, 200\], weight \[140, 3\]"):
        OPS.fine_linear(x, weight[:, :3], bias)
    with pytest.raises(FtcError, match=r"bias \[3\]"):
        OPS.fine_linear(x, weight, bias[:3])
    with pytest.raises(FtcError, match="infinities or NaN in 1 of 260"):
        OPS.fine_linear(x.detach().index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf)), weight)
    with pytest.raises(FtcError, match="a weight holds infinities or NaN"):
        OPS.fine_linear(x, weight.detach() * math.nan)


def test_no_rows_give_no_rows():
    weight = torch.randn(5, 7, requires_grad=True)
    x = torch.randn(0, 7, requires_grad=True)
    out = OPS.fine_linear(x, weight)
    dx, dw = torch.autograd.grad(out, (x, weight), torch.randn(0, 5))
    assert out.shape == (0, 5) and dx.shape == (0, 7) and torch.equal(dw, torch.zeros(5, 7))


@pytest.mark.parametrize("turned", [False, True])
def test_fakes_have_the_shapes_of_the_operators(turned):
    x, weight = torch.randn(130, 200), torch.randn(300, 200)
    tiles, blocks = OPS.fine_tiles(x), OPS.fine_blocks(weight)
    for operator, arguments in (
        (OPS.fine_tiles, (x, turned)), (OPS.fine_tiles_both, (x, turned)), (OPS.fine_blocks, (weight, turned)), (OPS.fine_turn, (*tiles, 200, turned)),
        (OPS.fine_product, (*tiles, *blocks)),
    ):  # fmt: skip
        options = {"dtype": torch.bfloat16} if operator is OPS.fine_product else {}
        real, fake = operator(*arguments, **options), operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments), **options)
        for r, f in zip(*(made if isinstance(made, tuple) else (made,) for made in (real, fake)), strict=True):
            assert r.shape == f.shape and r.dtype == f.dtype and r.stride() == f.stride()

"""Cutting a backward graph: each half holds what it needs, and products are made once."""

from collections import Counter

import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from split_ranks import model
from torch import fx

from ftc.pipeline.split_backward_trace import trace
from ftc.pipeline.weight_gradients import halve

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention_for_cpu_backward.default}


def traced(function, attributes, inputs):
    return trace(function, attributes, inputs, [[False] * t.dim() for t in inputs], None, "a function")


def of_region(name: str, passes=()):
    """The trace of a preset's last region."""
    program = model(name, 2, passes)
    region = program.regions[-1]
    variant = region.code.all_variants()[0]
    tensors = [torch.zeros(_sizes(spec), dtype=spec.dtype) for spec in variant.captured.inputs]
    tensors[0].requires_grad_()
    attributes = variant.attribute_values(variant.attributes, region.fetch, tensors)
    marks = [[isinstance(size, sympy.Basic) for size in spec.sizes] for spec in variant.captured.inputs]
    return trace(lambda *a: variant.function(None, *a), attributes, tensors, marks, None, "a region")


def _sizes(spec) -> list[int]:
    return [{"batch": 2}.get(str(size), 9 if isinstance(size, sympy.Basic) and dim else 3) if isinstance(size, sympy.Basic) else size for dim, size in enumerate(spec.sizes)]


def count(*graphs: fx.Graph) -> Counter:
    return Counter(node.target for graph in graphs for node in graph.nodes if node.op == "call_function")


def products(*graphs: fx.Graph) -> Counter:
    return Counter({target: n for target, n in count(*graphs).items() if target in PRODUCTS})


def ancestors(nodes) -> set[fx.Node]:
    found, stack = set(), [node for node in nodes if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def results(graph: fx.Graph):
    return next(iter(graph.find_nodes(op="output"))).args[0]


@pytest.mark.slow
@pytest.mark.parametrize("name, passes", [("tiny", ()), ("tiny-mla", ()), ("tiny-moe", ())], ids=["dense", "latent", "experts"])
def test_every_product_is_made_in_one_half_alone(name, passes):
    found = of_region(name, passes)
    whole, first, second = found.backward.__self__.graph, found.halves.input.graph, found.halves.weight.graph
    assert products(first, second) == products(whole)
    assert products(first) and products(second)
    weights = sum(found.is_weight)
    assert sum(node is not None for node in results(second)) == weights
    made, handed = results(first)
    assert {n for n in first.nodes if n.op == "call_function"} == ancestors([*made, *handed]) - set(first.find_nodes(op="placeholder"))
    for node in handed:  # what is handed over is on the way to an input's gradient
        assert any(node in ancestors([m]) for m in made)


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 4), wants=st.lists(st.booleans(), min_size=4, max_size=4))
def test_halves_of_drawn_functions_give_the_whole(seed, depth, wants):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(4, 4, generator=generator, requires_grad=want) for want in wants]
    x = torch.randn(3, 4, generator=generator, requires_grad=bool(seed % 2))
    if not any(wants):
        weights[0].requires_grad_()
    picks = torch.randint(0, 6, (depth,), generator=generator).tolist()

    def function(*arguments):
        *matrices, h = arguments
        for step, pick in enumerate(picks):
            w = matrices[step % len(matrices)]
            h = [lambda h, w: h @ w, lambda h, w: torch.tanh(h @ w) + h, lambda h, w: h * w.sum(0), lambda h, w: torch.softmax(h, -1) @ w,
                 lambda h, w: h.double().mul(w[0].double()).float(), lambda h, w: (h @ w).exp() / 9][pick](h, w)  # fmt: skip
        return (h + sum(m.mean() for m in matrices),)

    found = traced(function, weights, [x])
    outputs = found.forward(*weights, x)
    gradient = torch.randn(3, 4, generator=generator)
    kept = outputs[found.num_results :]
    values = [kept[number] if kind == "saved" else gradient for kind, number in found.placeholders]
    with torch.no_grad():
        whole = found.backward(*values)
        made, handed = found.first(*values)
        later = found.second([*(values[i] for i in found.halves.kept), *handed])
    for w, m, late, is_weight in zip(whole, made, later, found.is_weight, strict=True):
        assert (m if is_weight else late) is None
        one = late if is_weight else m
        assert (one is None) == (w is None) and (w is None or torch.equal(one, w))


def test_an_operator_with_a_mask_serves_each_half_for_its_own():
    weight, bias = torch.randn(5, 4, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    x = torch.randn(2, 4, 8, requires_grad=True)
    found = traced(lambda w, b, x: (torch.conv1d(x, w, b),), [weight, bias], [x])
    masks = [[node.args[-1] for node in graph.nodes if node.target is aten.convolution_backward.default] for graph in (found.halves.input.graph, found.halves.weight.graph)]
    assert masks == [[[True, False, False]], [[False, True, True]]]


def test_experts_gradients_wait_and_their_input_does_not():
    found = of_region("tiny-moe", ("raise", "fuse-moe"))
    halves = found.halves.input.graph, found.halves.weight.graph
    masks = [[node.args[-1] for node in graph.nodes if node.target is torch.ops.ftc.fused_moe_backward.default] for graph in halves]
    assert masks == [[[True, True, False, False, False, False]], [[False, False, True, True, False, False]]]
    assert aten.clone.default not in count(halves[1]), "each gradient of the kernel has memory of its own"


def test_a_norm_gives_both_gradients_at_once():
    weight, bias, x = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found = traced(lambda w, b, x: (torch.layer_norm(x, [4], w, b),), [weight, bias], [x])
    assert aten.native_layer_norm_backward.default in count(found.halves.input.graph)
    assert aten.native_layer_norm_backward.default not in count(found.halves.weight.graph)


def test_a_wider_copy_is_made_again_and_not_kept():
    graph = fx.Graph()
    saved, tangent = graph.placeholder("saved_1"), graph.placeholder("tangents_1")
    saved.meta["val"], tangent.meta["val"] = torch.empty(8, 8, dtype=torch.bfloat16), torch.empty(8, 8)
    wide = graph.call_function(aten._to_copy.default, (saved,), {"dtype": torch.float32})
    wide.meta["val"] = torch.empty(8, 8)
    by_input = graph.call_function(aten.mul.Tensor, (wide, tangent))
    by_weight = graph.call_function(aten.mm.default, (wide, tangent))
    graph.output([by_weight, by_input])
    found = halve(graph, [True, False])
    assert results(found.input.graph)[1] == [] and found.kept == (0, 1)
    assert aten._to_copy.default in count(found.weight.graph) and aten._to_copy.default in count(found.input.graph)


def test_without_an_input_that_needs_a_gradient_all_is_put_off():
    weight = torch.randn(4, 4, requires_grad=True)
    found = traced(lambda w, x: (torch.tanh(x @ w) @ w,), [weight], [torch.randn(3, 4)])
    assert not count(found.halves.input.graph) and products(found.halves.weight.graph)

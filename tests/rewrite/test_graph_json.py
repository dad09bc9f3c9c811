"""Graphs as JSON: there and back changes nothing, the hash sees what is computed and nothing else, and files are not trusted."""

import copy
import json
import math
import operator

import hypothesis.strategies as st
import pytest
import sympy
import torch
from ftc.models.decoder import Decoder, DecoderConfig
from hypothesis import given
from torch import fx, nn
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

import ftc
from ftc.capture.captured import acceptance
from ftc.errors import FtcError
from ftc.rewrite.graph_json import captured_from_dict, captured_to_dict, graph_from_dict, graph_hash, graph_to_dict
from ftc.rewrite.json_values import PYTHON_FUNCTIONS, from_json, read_target, to_json
from ftc.rewrite.probe import random_inputs, random_parameters, run
from ftc.rewrite.size_text import print_size, read_size

CONFIG = DecoderConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def captured():
    """Every captured graph of a tiny decoder: the block's and the shell's."""
    torch.manual_seed(0)
    program = ftc.capture(Decoder(CONFIG).eval(), {"input_ids": torch.randint(31, (2, 7))})
    return [variant.captured for code in program.codes for variant in code.all_variants()]


def through_text(record):
    return json.loads(json.dumps(record, allow_nan=False))


def test_there_and_back_keeps_the_hash_the_text_and_the_values(captured):
    for one in captured:
        text = through_text(captured_to_dict(one))
        back = captured_from_dict(text)
        assert graph_hash(back.graph) == graph_hash(one.graph)
        assert captured_to_dict(back) == text
        for old, new in zip(one.graph.nodes, back.graph.nodes, strict=True):
            if isinstance(old.meta.get("val"), torch.Tensor):
                assert (old.meta["val"].dtype, old.meta["val"].dim()) == (new.meta["val"].dtype, new.meta["val"].dim())
                symbolic = [[isinstance(s, torch.SymInt) for s in n.meta["val"].shape] for n in (old, new)]
                assert symbolic[0] == symbolic[1], old.name


def test_a_region_read_back_computes_the_same_bits(captured):
    graph = captured[0].graph
    back = graph_from_dict(through_text(graph_to_dict(graph)))
    results = []
    for g in (graph, back):
        sizes = {
            s: 5
            for n in g.nodes
            if n.op == "placeholder"
            for d in n.meta["val"].shape
            if isinstance(d, torch.SymInt)
            for s in d.node.expr.free_symbols
        }
        results.append(run(g, random_inputs(g, sizes, 1), random_parameters(g, 1), lifted=False))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_conditions_on_sizes_come_back(captured):
    for one in captured:
        back = captured_from_dict(through_text(captured_to_dict(one)))
        old, new = acceptance(one), acceptance(back)
        rank = [len(spec.sizes) for spec in one.inputs]
        for batch in (1, 2, 3):
            for length in (1, 2, 9):
                shapes = [
                    [
                        int(s) if not isinstance(s, sympy.Basic) else (batch if d == 0 else length)
                        for d, s in enumerate(spec.sizes)
                    ]
                    for spec in one.inputs
                ]
                tensors = [torch.empty(shape, device="meta") for shape in shapes]
                assert [t.dim() for t in tensors] == rank and old(tensors) == new(tensors)


def test_the_hash_is_independent_of_node_names_and_places(captured):
    graph = captured[0].graph
    renamed = graph_from_dict(graph_to_dict(graph))
    for number, node in enumerate(renamed.nodes):
        if node.op == "call_function":
            node.name = f"other_{number}"
        node.meta["stack_trace"] = 'File "elsewhere.py", line 1, in f'
    assert graph_hash(renamed) == graph_hash(graph)


def changed_target(d):
    row = next(r for r in d["nodes"] if r["target"] == "aten.silu.default")
    row["target"] = "aten.relu.default"


def changed_argument(d):
    row = next(r for r in d["nodes"] if r["target"] == "aten.add.Tensor" and "node" in str(r["args"][1]))
    row["args"][1] = row["args"][0]


def changed_parameter_name(d):
    next(r for r in d["nodes"] if r["op"] == "get_attr")["target"] += "_"


def changed_input_size(d):
    for row in d["nodes"]:
        if row["op"] == "placeholder":
            row["val"]["sizes"] = [9 if size == "s1" else size for size in row["val"]["sizes"]]


@pytest.mark.parametrize("change", [changed_target, changed_argument, changed_parameter_name, changed_input_size])
def test_the_hash_depends_on_what_is_computed(captured, change):
    d = through_text(graph_to_dict(captured[0].graph))
    change(d)
    assert graph_hash(graph_from_dict(d)) != graph_hash(captured[0].graph)


def test_the_hash_depends_on_the_contents_of_constants():
    def graph(value):
        g = fx.Graph()
        x = g.placeholder("x")
        c = g.get_attr("_constant_0")
        c.meta["constant"] = torch.tensor([1.0, value])
        g.output((g.call_function(torch.ops.aten.add.Tensor, (x, c)),))
        return g

    assert graph_hash(graph(2.0)) == graph_hash(graph(2.0)) != graph_hash(graph(3.0))
    assert graph_hash(graph(0.0)) != graph_hash(graph(-0.0))
    d = through_text(graph_to_dict(graph(math.inf)))
    assert d["nodes"][1]["constant"] == graph_to_dict(graph(math.inf))["nodes"][1]["constant"]


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.complex_numbers())
torch_values = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.device("cpu"), torch.strided, torch.contiguous_format]
)
values = st.recursive(
    numbers | torch_values,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=8,
)


@given(values)
def test_arguments_come_back_equal_and_of_the_same_type(value):
    back = from_json(through_text(to_json(value, None)), None)
    assert type(back) is type(value)
    assert repr(back) == repr(value)  # repr tells nan, -0.0, True and 1 apart


def test_a_frozen_mask_comes_back():
    from ftc.capture.masks import CausalMask

    mask = CausalMask(16, torch.bfloat16, -math.inf, (1, (0, 1), (0, 1)))
    assert from_json(through_text(to_json(mask, None)), None) == mask


s0, s1 = sympy.symbols("s0 s1", positive=True, integer=True)
sizes = st.recursive(
    st.sampled_from([s0, s1]) | st.integers(2, 9).map(sympy.Integer),
    lambda inner: st.builds(
        lambda f, a, b: f(a, b), st.sampled_from([sympy.Add, sympy.Mul, FloorDiv, PythonMod, Max, Min]), inner, inner
    ),
    max_leaves=5,
)


@given(sizes, sizes, st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Ge]))
def test_conditions_come_back_equal(left, right, relation):
    condition = relation(left, right)
    assert read_size(print_size(condition), {"s0": s0, "s1": s1}) == condition


def test_divisions_and_remainders_stay_apart():
    for function in (FloorDiv, CleanDiv, Mod, PythonMod):
        assert type(read_size(print_size(function(s0 + 1, 4)), {"s0": s0})) is function


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "s0.__class__",
        "s0 + 1",
        "open('x')",
        "s9",
        "Pow(9, Pow(9, 9))",
        "(",
        1.5,
        None,
    ],
)
def test_other_text_is_no_size(text):
    with pytest.raises(FtcError):
        read_size(text, {"s0": s0})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "aten.from_file.default",
        "aten.save.default",
        "aten.nothing.default",
        "builtins.eval",
        "operator.attrgetter",
        "aten",
        None,
    ],
)
def test_other_functions_are_refused(target):
    with pytest.raises(FtcError):
        read_target(target)


def test_every_function_of_the_table_is_found():
    assert all(read_target(name) is function for name, function in PYTHON_FUNCTIONS.items())
    assert read_target("aten.linear.default") is torch.ops.aten.linear.default
    assert read_target("operator.mul") is operator.mul


DAMAGE = {
    "an input that is code": lambda d: d["nodes"][0].update(target="x=exit()"),
    "a name that is code": lambda d: d["nodes"][0].update(name="x\n"),
    "a use before the definition": lambda d: d["nodes"].insert(0, d["nodes"].pop(-2)),
    "no output": lambda d: d["nodes"].pop(),
    "an unknown op": lambda d: d["nodes"][0].update(op="call_method"),
    "an unknown dtype": lambda d: d["nodes"][0]["val"].update(dtype="compile"),
    "another format": lambda d: d.update(format=99),
    "no nodes": lambda d: d.pop("nodes"),
    "a size of one": lambda d: d["symbols"][0].update(hint=1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_graphs_are_refused(captured, damage):
    d = copy.deepcopy(through_text(graph_to_dict(captured[0].graph)))
    damage(d)
    with pytest.raises(FtcError):
        graph_from_dict(d)


def test_what_no_file_can_hold_is_an_error():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(nn.functional.silu, (x,)),))
    with pytest.raises(FtcError, match="torch.ops"):
        graph_to_dict(graph)

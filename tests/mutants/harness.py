"""Mutate a base, raise the mutant, judge the result; a failure names the smallest list of mutators that still fails.

A case is (base, seed, names of mutators). Each mutator draws from a generator of its own, seeded by its place in the list, so that a
case can be shortened without changing what the rest of it does.
"""

import itertools
import random
from dataclasses import dataclass

import bases
import torch
from bases import Base
from builder import argument, aten, copied, is_op, val
from ftc.passes import PIPELINES
from preserving import PRESERVING
from sabotage import SABOTAGE
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers the canonical ops
from ftc.rewrite import probe
from ftc.rewrite.registry import make
from ftc.rewrite.residue import residue

RAISE = [make(name, {}).pass_ for name in PIPELINES["raise"]]
TOLERANCE = 1e-12
CANONICAL = {
    "attention": (aten.scaled_dot_product_attention.default, torch.ops.ftc.softcap_attention.default),
    "norm": (aten.rms_norm.default, aten.layer_norm.default),
    "rope": (torch.ops.ftc.rope.default,),
    "mlp": (torch.ops.ftc.gated.default, aten.gelu.default),
}


@dataclass(frozen=True)
class Case:
    """One mutant: `mutators` are applied in order to a copy of the base."""

    base: str
    seed: int
    mutators: tuple[str, ...]

    def graph(self) -> tuple[fx.Graph, list[str]]:
        """The mutant, and the mutators that found a place."""
        graph, fired = copied(bases.get(self.base).graph), []
        for place, name in enumerate(self.mutators):
            mutate = PRESERVING.get(name) or SABOTAGE[name]
            if mutate(graph, random.Random(f"{self.seed} {place} {name}")):
                fired.append(name)
        graph.lint()
        return graph, fired


def raised(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph after all raise passes."""
    graph = copied(graph)
    for raise_ in RAISE:
        raise_.apply(graph)
        graph.lint()
    return graph


# --------------------------------------------------------------------------------------------------------- evaluation


class Evaluation:
    """Outputs of graphs with one base's inputs and parameters, at one assignment of the sizes that is not the exported one."""

    def __init__(self, base: Base, lifted: bool = True):
        self.lifted, dtype = lifted, torch.float64 if lifted else None
        sizes = probe.symbol_sizes(base.graph)[-1]
        self.inputs = probe.random_inputs(base.graph, sizes, 11, dtype)
        self.parameters = probe.random_parameters(base.graph, 11, dtype=dtype)
        self.reference = self.outputs(base.graph)

    def outputs(self, graph: fx.Graph) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return probe.run(graph, self.inputs, self.parameters, self.lifted)


_EVALUATIONS: dict[tuple[str, bool], Evaluation] = {}


def evaluation(base: str, lifted: bool = True) -> Evaluation:
    key = (base, lifted)
    if key not in _EVALUATIONS:
        _EVALUATIONS[key] = Evaluation(bases.get(base), lifted)
    return _EVALUATIONS[key]


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error over the outputs; infinite where their number or dtype differs."""
    if len(got) != len(expected) or any(a.dtype != b.dtype for a, b in zip(got, expected, strict=True)):
        return float("inf")
    return max(probe.relative_error(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------- judgement


def unrecognised(base: Base, graph: fx.Graph, kinds: tuple[str, ...] = tuple(CANONICAL)) -> list[str]:
    """What is missing from a raised graph of `base`, in words; empty where all of it is recognised and nothing is left over."""
    complaints = []
    for kind in kinds:
        found, expected = sum(is_op(node, *CANONICAL[kind]) for node in graph.nodes), getattr(base, kind)
        if found < expected:
            complaints.append(f"{found} of {expected} {kind} recognised")
    complaints += [
        f"left of {left.kind}: {left.op} at {left.location}" for left in residue(graph) if left.kind in kinds
    ]
    if "attention" in kinds:
        complaints += [
            text for node in graph.nodes if is_op(node, *CANONICAL["attention"]) for text in _loose(base, node)
        ]
    return complaints


def _loose(base: Base, node: fx.Node) -> list[str]:
    """What a canonical attention should have taken in and did not."""
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    heads, texts = (val(key).shape[1], val(value).shape[1]), []
    if base.kv_heads and heads != (base.kv_heads, base.kv_heads):
        texts.append(f"{node.name} has {heads} key and value heads, not {base.kv_heads}")
    if base.causal and not argument(node, "is_causal"):
        texts.append(f"{node.name} is causal by a mask, not by is_causal")
    if is_op(query, aten.mul.Tensor, aten.div.Tensor) and isinstance(query.args[1], float):
        texts.append(f"{node.name} leaves a scale on the queries")
    return texts


def judge_preserving(case: Case, kinds: tuple[str, ...] = tuple(CANONICAL)) -> list[str]:
    """Complaints about a mutant that preserves the function: unrecognised parts, or another function."""
    graph, _ = case.graph()
    try:
        after = raised(graph)
    except Exception as error:
        return [f"raise broke: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    at = evaluation(case.base)
    error = difference(at.outputs(after), at.reference)
    wrong = [f"the raised graph differs from the base by {error:.2g}"] if not error <= TOLERANCE else []
    return wrong + unrecognised(bases.get(case.base), after, kinds)


def judge_sabotage(case: Case) -> list[str]:
    """Complaints about a sabotaged mutant: raise must not change what it computes, whatever it recognises in it."""
    graph, _ = case.graph()
    try:
        after = raised(graph)
    except Exception as error:
        return [f"raise broke: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    at = evaluation(case.base)
    error = difference(at.outputs(after), at.outputs(graph))
    wrong = [f"the raised graph differs from the mutant by {error:.2g}"] if not error <= TOLERANCE else []
    lost = _half_casts(graph) - _half_casts(after)
    return wrong + ([f"{lost} casts to float16 are gone"] if lost > 0 else [])


def _half_casts(graph: fx.Graph) -> int:
    """Casts to float16 are invisible in lifted evaluation, so they are counted: those whose values, not their sizes alone, reach an output."""
    live, stack = set(), [node for node in graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node not in live and not is_op(node, aten.sym_size.int):
            live.add(node)
            stack.extend(node.all_input_nodes)
    casts = [node for node in live if is_op(node, aten.to.dtype) and node.args[1] == torch.float16]
    return sum(val(node.args[0]).dtype != torch.float16 for node in casts)


def changes_function(case: Case) -> bool:
    """Whether a mutant computes something else than its base, in float64 or, for a pinned rounding, in the base's own dtype."""
    graph, _ = case.graph()
    if _half_casts(graph):
        at = evaluation(case.base, lifted=False)
        return difference(at.outputs(graph), at.reference) > 1e-5
    at = evaluation(case.base)
    return difference(at.outputs(graph), at.reference) > 1e-9


def smallest(case: Case, judge) -> Case:
    """The case with every mutator left out that its failure does not need; places keep their seeds through `skip`."""
    names = list(case.mutators)
    for place in reversed(range(len(names))):
        shorter = [*names]
        shorter[place] = "skip"
        if judge(Case(case.base, case.seed, tuple(shorter))):
            names = shorter
    return Case(case.base, case.seed, tuple(names))


PRESERVING_NAMES = tuple(PRESERVING)
PRESERVING["skip"] = lambda graph, rng: False  # keeps a shortened case in step


def explain(case: Case, complaints: list[str], judge) -> str:
    """The failure message: complaints and a case to paste into `harness.Case(...)`."""
    short = smallest(case, judge)
    needed = [name for name in short.mutators if name != "skip"]
    return "\n".join([f"{short!r}", f"needs: {needed}", *itertools.islice(judge(short) or complaints, 8)])

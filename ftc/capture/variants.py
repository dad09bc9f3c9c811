"""Variants: the graphs of one piece of code for inputs of different structure, found by key, captured on first use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from ftc.capture.captured import CapturedGraph, acceptance, compile_graph, tensor_sizes
from ftc.capture.results import extras, pruned
from ftc.errors import FtcError

MAX_VARIANTS = 64


@dataclass(frozen=True)
class Hole:
    """Stands in a structure of arguments or results where tensor number `index` goes."""

    index: int


@dataclass
class Call:
    """Arguments taken apart: the tensors, and a structure in which each tensor is a Hole."""

    tensors: list[torch.Tensor]
    leaves: tuple  # Hole or constant
    spec: TreeSpec

    def fill(self, tensors: Sequence[object]):
        return tree_unflatten([tensors[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.leaves], self.spec)


def take_apart(structure, flatten: Callable, where: str) -> Call:
    """Split nested arguments into tensors and constants. FtcError when a constant is of a kind no graph can hold."""
    flat, spec = flatten(structure)
    tensors: list[torch.Tensor] = []
    leaves: list[object] = []
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            leaves.append(Hole(len(tensors)))
            tensors.append(leaf)
        else:
            try:
                hash(leaf)
            except TypeError:
                leaf = None if not leaf else leaf
            if type(leaf).__module__ != "builtins" and not _is_plain(leaf):
                raise FtcError(
                    f"{where} was given a {type(leaf).__name__}, which a captured graph cannot hold; pass tensors and plain "
                    "values only (a key-value cache is added by a pass: call with use_cache=False)"
                )
            leaves.append(leaf)
    return Call(tensors, tuple(leaves), spec)


_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def shorthand(value: object, tensors: list[torch.Tensor]) -> tuple | None:
    """A cheap hashable description of nested arguments, finer than a variant's key; their tensors go to `tensors`.

    None when something in it is of a kind that only `take_apart` understands.
    """
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        tensors.append(value)
        return (value.dtype, value.device.type, value.dim())
    if kind is tuple or kind is list:
        words = [kind]
        for item in value:
            word = shorthand(item, tensors)
            if word is None:
                return None
            words.append(word)
        return tuple(words)
    if kind is dict:
        words = [kind]
        for key, item in value.items():
            word = shorthand(item, tensors)
            if word is None or type(key) is not str:
                return None
            words += (key, word)
        return tuple(words)
    if kind in _CONSTANTS:
        return (kind, repr(value) if kind is float else value)
    return None


def types_of(leaves: Sequence[object]) -> tuple:
    """What tells constants apart that compare equal, as 1, 1.0 and True do, or 0.0 and -0.0."""
    return tuple(repr(leaf) if type(leaf) is float else type(leaf) for leaf in leaves)


def _is_plain(leaf: object) -> bool:
    return isinstance(leaf, (torch.dtype, torch.device, torch.Size, torch.SymInt)) or getattr(leaf, "ftc_constant", False)


@dataclass
class Variant:
    """One graph with what it needs to run: made from a CapturedGraph, and made anew whenever a pass changed the graph."""

    key: tuple
    captured: CapturedGraph
    outputs: tuple  # leaves: Hole or constant
    out_spec: TreeSpec
    name: str
    call: Call | None = None  # the fake call it was captured from
    function: Callable = field(init=False)
    attributes: list[str] = field(init=False)
    source: str = field(init=False)
    compiled: Callable | None = None
    compile_options: dict | None = None

    def __post_init__(self):
        self.accepts = acceptance(self.captured)
        self._decide = None
        if self.captured.decisions is not None:
            self._decide, self._decide_attributes, _ = compile_graph(
                self.captured.decisions, self.captured.constants, f"{self.name}_decisions"
            )
        self.rebuild()

    def rebuild(self) -> None:
        """Compile the Python function again after the graph or the outputs changed."""
        graph, self._places = pruned(self.captured.graph, [leaf.index for leaf in self.outputs if isinstance(leaf, Hole)])
        self.function, self.attributes, self.source = compile_graph(graph, self.captured.constants, self.name)
        self._whole = None  # the function of all results, made when it is first wanted
        single = self.out_spec.is_leaf() and isinstance(self.outputs[0], Hole)
        self._single = self._places[self.outputs[0].index] if single else None
        self.calls_regions = any(node.op == "call_module" for node in self.captured.graph.nodes)
        self.compiled = None
        if self.compile_options is not None:
            self.compile(self.compile_options)

    def divide_sizes(self, shares: dict) -> None:
        """Let size symbols stand for one share of what they stood for, where `shares` gives the number of equal shares."""
        captured = self.captured
        captured.guards = [guard.xreplace({symbol: n * symbol for symbol, n in shares.items()}) for guard in captured.guards]
        for symbol, n in shares.items():
            if symbol in captured.maximum:
                captured.maximum[symbol] //= n
            if symbol in captured.minimum:
                captured.minimum[symbol] = max(2, -(-captured.minimum[symbol] // n))
        self.accepts = acceptance(captured)

    def follow_inputs(self, graph, from_one: Sequence) -> None:
        """Take the inputs' sizes from a rewritten graph, and let the symbols `from_one` be 1 or more, with no other condition on them."""
        captured = self.captured
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        captured.inputs = [
            replace(spec, sizes=tensor_sizes(node.meta["val"])) for spec, node in zip(captured.inputs, placeholders, strict=True)
        ]
        captured.guards = [guard for guard in captured.guards if not guard.free_symbols & set(from_one)]
        captured.minimum |= dict.fromkeys(from_one, 1)
        self.accepts = acceptance(captured)

    def compile(self, options: dict) -> None:
        """Compile the function with `torch.compile(**options)` on its next call, and again whenever the graph changes.

        Twins share the variant, and their parameters are arguments, so they share one compiled frame.
        """
        self.compile_options = dict(options)
        self.compiled = torch.compile(self.function, **options)

    def holds_for(self, fetch: Callable[[str], torch.Tensor], tensors: Sequence[torch.Tensor]) -> bool:
        if not self.accepts(tensors):
            return False
        if self._decide is None:
            return True
        with torch.no_grad():
            constants = self.captured.constants
            attributes = [constants[name] if name in constants else fetch(name) for name in self._decide_attributes]
            values = self._decide(None, *attributes, *tensors)
        return all(
            (value.tolist() if isinstance(expected, list) else type(expected)(value.item())) == expected
            for value, expected in zip(values, self.captured.decided, strict=True)
        )

    def run(self, root, fetch: Callable[[str], torch.Tensor], tensors: Sequence[torch.Tensor], through: Callable | None = None):
        """What the call returns. `through(attributes, tensors)` gives the function's results in another way, where it is given."""
        attributes = self.attribute_values(self.attributes, fetch, tensors)
        if self.compiled is not None and not self.calls_regions:
            root = None  # a module among the arguments would be guarded on, one twin after the other
        results = through(attributes, tensors) if through is not None else (self.compiled or self.function)(root, *attributes, *tensors)
        if self._single is not None:
            return results[self._single]
        return self.structured({place: results[number] for place, number in self._places.items()})

    def run_whole(self, root, fetch: Callable[[str], torch.Tensor], tensors: Sequence[torch.Tensor]):
        """What `run` gives, and the results that have names, by name."""
        if self._whole is None:
            self._whole = compile_graph(self.captured.graph, self.captured.constants, f"{self.name}_whole")
        function, names, _ = self._whole
        results = function(root, *self.attribute_values(names, fetch, tensors), *tensors)
        named = {name: results[place] for name, place in extras(self.captured.graph).items()}
        return self.structured(results), named

    def structured(self, results):
        """What the model returns, from the graph's results by place."""
        leaves = [results[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in self.outputs]
        return tree_unflatten(leaves, self.out_spec)

    def attribute_values(self, names: Sequence[str], fetch, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a function of this variant's graph takes before its inputs: parameters, buffers and constants by name."""
        constants = self.captured.constants
        device = tensors[0].device if tensors else None
        attributes = []
        for name in names:
            if name in constants:
                value = constants[name]
                if device is not None and value.device != device and value.dim() > 0:
                    value = constants[name] = value.to(device)
                attributes.append(value)
            else:
                attributes.append(fetch(name))
        return attributes

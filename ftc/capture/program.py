"""Program: a captured model. An nn.Module with the same call, outputs and parameter names, whose code is graphs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ftc.capture.code import Code, ShellCode
from ftc.capture.skeleton import Container, adopt, skeleton
from ftc.capture.structure import find_regions, structure_keys
from ftc.errors import FtcError


class Captured(Container):
    """What a Region and a Program share: attributes found by dotted name, and the keys that choose a variant."""

    def __init__(self, kind: str, name: str):
        super().__init__(kind)
        self.ftc_name = name
        self.compute_dtype: torch.dtype | None = None  # of parameters while they run, where they are stored in another
        self.stands_on: torch.device | None = None  # what graphs are captured for where no parameter is in memory here; None: the CPU
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self.state: dict[str, torch.Tensor] = {}  # what graphs read and write that is no part of the model, by whole name
        self.divided: dict[str, tuple[int, int]] = {}  # parameters of which only a rank's part is here: (dim, number of ranks)

    @property
    def name(self) -> str:
        """Dotted name in the model."""
        return self.ftc_name

    def fetch(self, name: str) -> torch.Tensor:
        if name in self.state:
            return self.state[name]
        if name.startswith("ftc_cache."):
            raise FtcError("the program continues texts from a cache, and has none yet: ftc.cache.PagedCache(program, num_blocks)")
        place = self._places.get(name)
        if place is None:
            owner, _, leaf = name.rpartition(".")
            place = self._places[name] = (self.get_submodule(owner), leaf)
        module, leaf = place
        tensor = module._parameters.get(leaf)
        return getattr(module, leaf) if tensor is None else tensor

    def whole_on_meta(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor of the size that all ranks' parts of `name` make up, in the dtype that the graph meets."""
        dtype = self.dtype_of(tensor)
        if name not in self.divided:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
        (dim, degree), shape = self.divided[name], list(tensor.shape)
        shape[dim] *= degree
        return torch.empty(shape, dtype=dtype, device="meta")

    def own_modules(self) -> list[tuple[str, nn.Module]]:
        return list(self.named_modules())

    def named_attributes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers by name, every name of a shared tensor."""
        for prefix, module in self.own_modules():
            dot = f"{prefix}." if prefix else ""
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        yield dot + name, tensor

    def mode_key(self):
        modules = self.__dict__.get("_mode_modules")
        if modules is None:
            modules = self.__dict__["_mode_modules"] = [module for _, module in self.own_modules()]
        modes = [module.training for module in modules]
        return modes[0] if modes.count(modes[0]) == len(modes) else tuple(modes)

    def dtype_key(self):
        stores = self.__dict__.get("_stores")
        if stores is None:
            stores = self.__dict__["_stores"] = [
                (store, name)
                for _, module in self.own_modules()
                for store in (module._parameters, module._buffers)
                for name, tensor in store.items()
                if tensor is not None
            ]
        if self.compute_dtype is not None:
            return tuple([self.dtype_of(store[name]) for store, name in stores])
        return tuple([store[name].dtype for store, name in stores])

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype in which the graph meets a parameter or buffer (sharding with mixed precision stores another)."""
        mixed = self.compute_dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return self.compute_dtype if mixed else tensor.dtype

    def forget(self) -> None:
        """Drop what was remembered of the module tree; called when parameters were added or removed."""
        for name in ("_mode_modules", "_stores"):
            self.__dict__.pop(name, None)
        self._places.clear()


class Region(Captured):
    """One block of the model: its parameters, and the code it shares with its twins.

    `around`, where it is set, is called as `around(run, args, kwargs)` in place of `run(*args, **kwargs)`: for running the
    region in another way (recomputing its activations, timing it) without touching its graphs.
    """

    def __init__(self, name: str, kind: str, code: Code):
        super().__init__(kind, name)
        self.code = code
        self.around: Callable | None = None

    def forward(self, *args, **kwargs):
        return self._run(*args, **kwargs) if self.around is None else self.around(self._run, args, kwargs)

    def _run(self, *args, **kwargs):
        return self.code.run(self, args, kwargs)

    def split_code(self) -> None:
        """Stop sharing: this region runs other operations than its twins for some input."""
        block = self.code.twins.pop(self.ftc_name)
        code = Code(self.ftc_name, block)
        code.twins[self.ftc_name] = block
        code.steps, code.lenses = list(self.code.steps), list(self.code.lenses)
        self.code = code

    def graph_code(self) -> str:
        """Readable Python of every variant captured so far."""
        return "\n".join(variant.source for variant in self.code.all_variants())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Program(Captured):
    """A captured model; see `ftc.capture`. Calls, outputs and state_dict keys are the model's."""

    def __init__(self, kind: str):
        super().__init__(kind, "the model")
        self._regions: dict[str, Region] = {}
        self._added: dict[str, dict] = {}  # regions that passes added: which each was made like, and how it began
        self._applied: list[dict] = []  # the report's entry of each applied pass
        self._graphs: dict[str, dict] = {}  # graphs that certificates name, by hash
        self._signature: inspect.Signature | None = None
        self.bound: dict[str, str] = {}  # axis -> name of the process group, once `ftc.parallel.bind` has bound it

    @property
    def regions(self) -> list[Region]:
        return list(self._regions.values())

    @property
    def codes(self) -> list[Code]:
        """The distinct codes of the regions, then the shell's."""
        return [*dict.fromkeys(region.code for region in self._regions.values()), self.code]

    def own_modules(self) -> list[tuple[str, nn.Module]]:
        inside = tuple(f"{name}." for name in self._regions)
        return [(n, m) for n, m in self.named_modules() if n not in self._regions and not (inside and n.startswith(inside))]

    def forward(self, *args, ftc_extras: bool = False, **kwargs):
        given = self.bind(args, kwargs)
        if self.axes and not self.bound:
            from ftc.parallel.simulate import simulate

            return simulate(self, given, whole=ftc_extras)
        return self.code.run(self, (), given, whole=ftc_extras)

    def with_extras(self, *args, **kwargs) -> tuple:
        """What the call returns, and what passes added to it: a dict of tensors by name (`mtp_logits_1`, ...)."""
        return self(*args, ftc_extras=True, **kwargs)

    @property
    def axes(self) -> dict[str, dict]:
        """The axes of ranks that passes have divided this program over, with the options of the pass."""
        if len(self._applied) != self.__dict__.get("_axes_of"):
            named = [entry for entry in self._applied if "axis" in entry["options"] and entry["matches"] + entry["already"]]
            found = self.__dict__["_axes"] = {}
            for entry in named:
                found.setdefault(entry["options"]["axis"], entry["options"] | {"pass": entry["pass"]})
            self.__dict__["_axes_of"] = len(self._applied)
        return self.__dict__["_axes"]

    def whole_call(self, call):
        """A call of the size that all ranks' shares of the tokens make up, for capture: the model's own code reads lengths, never a share's."""
        times = math.prod(o["degree"] for axis, o in self.axes.items() if "balanced" in o and axis in self.bound)
        if times == 1:
            return call
        tensors = [t.repeat(1, times, *[1] * (t.dim() - 2)) if t.dim() > 1 else t for t in call.tensors]
        return dataclasses.replace(call, tensors=tensors)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """Arguments by name, those equal to their default left out. FtcError when they do not fit the signature."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(p for p in self._signature.parameters)
            raise FtcError(f"the inputs do not fit {self.kind}.forward: {error}; it takes {names}") from None
        given: dict = {}
        for name, value in bound.arguments.items():
            parameter = self._signature.parameters[name]
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                raise FtcError(f"{self.kind}.forward takes *{name}, which capture cannot name; pass keyword inputs")
            elif value is not parameter.default:
                given[name] = value
        return given

    def run_example(self, example) -> None:
        """Capture the variants that `example` needs, without running the model."""
        args, kwargs = as_arguments(example)
        given = self.bind(args, kwargs)
        from ftc.capture.variants import take_apart

        call = take_apart(((), given), tree_flatten, self.ftc_name)
        key = self.code.key(self, call)
        if not any(variant.holds_for(self.fetch, call.tensors) for variant in self.code.variants.get(key, ())):
            self.code.capture(self, key, call)

    def fork(self) -> Program:
        """A program of its own with the same parameters (the same objects) and copies of the graphs."""
        from ftc.capture.fork import fork

        return fork(self)

    @property
    def report(self):
        from ftc.rewrite.report import Report

        return Report.of(self)

    def compile(self, **options):
        """Compile one graph for all regions of equal structure with torch.compile; in place, returns the program.

        Each variant's function is compiled on its first call; `options` go to torch.compile.
        """
        self._compile_options = options
        for code in dict.fromkeys(region.code for region in self.regions) or [self.code]:
            code.compile_options = options
            for variant in code.all_variants():
                variant.compile(options)
        return self

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights in the original model's names and shapes, through the inverse lenses.

        Raises FtcError when a lens applied has no inverse.
        """
        from ftc.rewrite.weights import original_state_dict

        return original_state_dict(self)

    def save(self, folder) -> None:
        """Write weights (safetensors), graphs, certificates and configuration to `folder`, in one step."""
        from ftc.rewrite.store import save

        save(self, folder)

    def describe(self) -> dict:
        """JSON-ready: regions, the graphs they share, and sizes."""
        codes = self.codes
        return {
            "model": self.kind,
            "parameters": sum(p.numel() for p in self.parameters()),
            "regions": [
                {"name": r.ftc_name, "kind": r.kind, "parameters": r.num_parameters, "graph": codes.index(r.code)}
                for r in self.regions
            ],
            "graphs": [
                {
                    "name": code.name,
                    "variants": [
                        {
                            "inputs": [
                                {"name": s.name, "dtype": str(s.dtype), "sizes": [str(x) for x in s.sizes]}
                                for s in variant.captured.inputs
                            ],
                            "nodes": len(variant.captured.graph.nodes),
                        }
                        for variant in code.all_variants()
                    ],
                }
                for code in codes
            ],
            "note": None if self.regions else "no repeated blocks were found: captured as one region",
        }


def as_arguments(example) -> tuple[tuple, dict]:
    """An example as (args, kwargs): a dict of keyword inputs, a tuple, or one tensor."""
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, torch.Tensor):
        return (example,), {}
    raise FtcError(f"example must be a dict of keyword inputs or a tuple of inputs, not {type(example).__name__}")


def capture(model: nn.Module, example=None, *, inplace: bool = False) -> Program:
    """Capture a plain PyTorch model as graphs.

    `example` is a dict of keyword inputs or a tuple; its sizes are only an example: batch and sequence are symbols, and an
    input of another structure is captured on first use. With `inplace` the model's own modules hold the regions and its
    calls run the program; otherwise the program is a tree of its own that shares every parameter with the model.
    Raises FtcError when the model cannot be captured, with the place in its source.
    """
    if not isinstance(model, nn.Module):
        raise FtcError(f"ftc.capture takes an nn.Module, not {type(model).__name__}")
    names = find_regions(model)
    bare = skeleton(model)
    bare_blocks = {name: bare.get_submodule(name) for name in names}
    program = Program(type(model).__name__)
    program._signature = inspect.signature(model.forward)
    if hasattr(model, "config"):
        program.config = model.config
    codes: dict[tuple, Code] = {}
    for name, key in structure_keys({name: model.get_submodule(name) for name in names}).items():
        block = model.get_submodule(name)
        code = codes.setdefault(key, Code(name, bare_blocks[name]))
        code.twins[name] = bare_blocks[name]
        program._regions[name] = Region(name, type(block).__name__, code)
    _build_tree(program, model, inplace)
    program.code = ShellCode("shell", bare, bare_blocks, program._regions)
    program.code.twins[program.ftc_name] = bare
    if inplace:
        model.forward = program.forward
    if example is not None:
        program.run_example(example)
    return program


def _build_tree(program: Program, model: nn.Module, inplace: bool) -> None:
    replaced: dict[int, nn.Module] = {}
    memo: dict[int, nn.Module] = {}
    for name, region in program._regions.items():
        block = model.get_submodule(name)
        if inplace:
            region._parameters, region._buffers, region._modules = block._parameters, block._buffers, block._modules
            region._non_persistent_buffers_set = block._non_persistent_buffers_set
            region.training = block.training
        else:
            adopt(region, block, {}, memo)
        replaced[id(block)] = region
    if not inplace:
        adopt(program, model, replaced, memo)
        return
    for name, region in program._regions.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = region
    program._parameters, program._buffers, program._modules = model._parameters, model._buffers, model._modules
    program._non_persistent_buffers_set = model._non_persistent_buffers_set
    program.training = model.training



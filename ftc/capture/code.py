"""Code: what twins share. The original code of a block (or of the shell), its variants, and the passes applied to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    fetch_sym_proxy,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from ftc.capture.blame import Root, explained
from ftc.capture.captured import CapturedGraph, finish, tidy
from ftc.capture.fingerprint import fingerprint
from ftc.capture.hits_check import check_hits
from ftc.capture.masks import build_masks, declare_masks, plain_call
from ftc.capture.skeleton import state_restored
from ftc.capture.trace import World, trace
from ftc.capture.twins import differing, watched
from ftc.capture.variants import MAX_VARIANTS, Call, Hole, Variant, shorthand, take_apart, types_of
from ftc.errors import FtcError, FtcFailure


class Code:
    """The code of one structure: shared by every region that has it. `module` is a skeleton block without weights.

    `steps` are the passes applied so far, in order; a variant captured later goes through them again. `lenses` map the
    original parameters of a region, by names relative to it, to those it holds now.
    """

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self.module = module
        self.twins: dict[str, nn.Module] = {}  # region name -> its skeleton block
        self.variants: dict[tuple, list[Variant]] = {}
        self.steps: list = []
        self.lenses: list = []
        self.checked: set = set()
        self.compile_options: dict | None = None
        self.shortcuts: dict[tuple, list[Variant]] = {}  # lists of `variants`, by the shorthand of a call

    def all_variants(self) -> list[Variant]:
        return list(itertools.chain.from_iterable(self.variants.values()))

    def keep_variants(self, kept: set[int]) -> None:
        """Forget the variants whose id is not in `kept`."""
        for key in list(self.variants):
            self.variants[key] = [variant for variant in self.variants[key] if id(variant) in kept]
            if not self.variants[key]:
                del self.variants[key]
        self.shortcuts.clear()

    def run(self, region, args: tuple, kwargs: dict, whole: bool = False):
        """Run the variant that fits, capturing it first when there is none; with `whole` also the results with names."""
        variant, tensors = self.find(region, args, kwargs)
        return (variant.run_whole if whole else variant.run)(region, region.fetch, tensors)

    def find(self, region, args: tuple, kwargs: dict) -> tuple[Variant, list[torch.Tensor]]:
        """The variant that fits a call, captured where there is none yet, and the call's tensors in its order."""
        tensors: list[torch.Tensor] = []
        short = shorthand((args, kwargs), tensors)
        if short is not None:
            short = (short, region.mode_key(), region.dtype_key())
            for variant in self.shortcuts.get(short, ()):
                if variant.holds_for(region.fetch, tensors):
                    return variant, tensors
        call = take_apart((args, kwargs), tree_flatten, region.ftc_name)
        key = self.key(region, call)
        variant = self.variant_for(region, key, call)
        if short is not None and list(map(id, tensors)) == list(map(id, call.tensors)):
            self.shortcuts[short] = self.variants[key]
        return variant, call.tensors

    def variant_for(self, region, key: tuple, call: Call, whole: Call | None = None) -> Variant:
        """The variant that fits a call, captured first when there is none: from `whole`, where the call is one rank's share of it."""
        variant = next((v for v in self.variants.get(key, ()) if v.holds_for(region.fetch, call.tensors)), None)
        if variant is None:
            with _disable_current_modes():  # what traces or simulates the call does not see the tracing of the model
                variant = self.capture(region, key, whole or call)
            if not variant.holds_for(region.fetch, call.tensors):
                raise FtcFailure(f"{region.ftc_name}: the graph captured for this input does not hold for it; report the model")
        return variant

    def key(self, region, call: Call) -> tuple:
        tensors = tuple((t.dtype, t.device.type, t.dim()) for t in call.tensors)
        return (call.leaves, call.spec, tensors, region.mode_key(), region.dtype_key(), types_of(call.leaves))

    def original_attributes(self, region) -> dict[str, torch.Tensor]:
        """Meta tensors of the parameters and buffers that the original code expects, whole, in the dtypes of today.

        A model that has no memory yet (the meta device, before sharding) is traced and proved for the CPU.
        """
        tensors = {name: region.whole_on_meta(name, t) for name, t in region.named_attributes()}
        devices = [t.device for _, t in region.named_attributes() if t.device.type != "meta"]
        for lens in reversed(self.lenses):
            tensors = lens.backward(tensors)
        self.device = devices[0] if devices else region.stands_on or torch.device("cpu")
        return tensors

    def capture(self, region, key: tuple, call: Call, dynamic: Sequence[Sequence[bool]] | None = None) -> Variant:
        """Capture the variant for `call` (real or fake tensors), run it through the passes, and keep it."""
        if sum(map(len, self.variants.values())) >= MAX_VARIANTS:
            raise FtcError(
                f"{region.ftc_name} met more than {MAX_VARIANTS} structures of inputs; a plain Python value that changes with "
                "every call makes each call a structure of its own: pass it as a tensor"
            )
        set_modes(self.module, region)
        captured, outputs, out_spec, fake_call = self._trace(region, call, dynamic)
        if captured.assumed and not getattr(self, "blocks", None):  # loops within blocks are checked where the blocks are captured
            check_hits(self, region, captured, call)
        variant = Variant(key, captured, outputs, out_spec, _identifier(region.ftc_name), fake_call)
        for step in self.steps:
            step.replay(self, variant)
        if self.compile_options is not None:
            variant.compile(self.compile_options)
        self.variants.setdefault(key, []).append(variant)
        return variant

    def _trace(self, region, call: Call, dynamic):
        dynamic = dynamic or [[True] * t.dim() for t in call.tensors]
        given = call
        call, dynamic, declared = plain_call(call, dynamic)
        world = World.new(duck=not _square(call.tensors))
        originals = self.original_attributes(region)
        names = list(originals)
        fakes = [world.fake(t.shape, t.dtype, self.device) for t in originals.values()]
        sizes = [[int(s) for s in t.shape] for t in call.tensors]
        inputs = [
            world.fake(s, t.dtype, _device(t, self.device), d) for s, t, d in zip(sizes, call.tensors, dynamic, strict=True)
        ]
        outcome: dict = {}

        def function(*flat, tracer):
            with state_restored(self.module):
                with torch.nn.utils.stateless._reparametrize_module(self.module, dict(zip(names, flat, strict=False))):
                    args, kwargs = call.fill(flat[len(names) :])
                    result = self._call(world, tracer, args, kwargs)
            out = take_apart(result, tree_flatten, f"the result of {region.ftc_name}")
            outcome["leaves"], outcome["spec"] = out.leaves, out.spec
            return out.tensors

        buffers = dict(region.named_attributes())
        real_attributes = [
            buffers[n] if n in buffers and not isinstance(buffers[n], nn.Parameter) and buffers[n].shape == originals[n].shape else None
            for n in names
        ]
        real = [None if _is_fake(t) else t for t in call.tensors]
        traced = trace(function, world, [*fakes, *inputs], [*real_attributes, *real], self.root(region))
        input_names = _input_names(self.module, call)
        captured = finish(traced, world, input_names, len(names), names)
        if declared:
            build_masks(captured, declared)
        fake_call = Call(inputs[: len(given.tensors)], given.leaves, given.spec)
        return captured, outcome["leaves"], outcome["spec"], fake_call

    def root(self, region) -> Root:
        """What error messages name: the code's own module by the name of the region."""
        return Root(self.module, region.ftc_name)

    def _call(self, world: World, tracer, args: tuple, kwargs: dict):
        return self.module(*args, **kwargs)

    def check_twin(self, region, key: tuple, call: Call) -> bool:
        """Whether the skeleton of `region` runs the same operations as the code's own for this call (static sizes)."""
        mark = (region.ftc_name, key)
        if mark in self.checked or self.twins.get(region.ftc_name) is self.module:
            return True
        block = self.twins[region.ftc_name]
        places = differing(self.module, block)
        if places == frozenset():
            self.checked.add(mark)
            return True
        prints = self.__dict__.setdefault("_prints", {})
        world = self.__dict__.setdefault("_static_world", World.new())
        call, _, _ = plain_call(call, [[False] * t.dim() for t in call.tensors])
        signature = (key, tuple(tuple(int(s) for s in t.shape) for t in call.tensors))
        if signature not in prints:
            originals = self.original_attributes(region)
            fakes = {n: world.fake(t.shape, t.dtype, self.device) for n, t in originals.items()}
            inputs = [world.fake([int(s) for s in t.shape], t.dtype, _device(t, self.device)) for t in call.tensors]
            set_modes(self.module, region)
            prints[signature] = (fakes, inputs, self._print(self.root(region), world, fakes, call, inputs))
        fakes, inputs, expected = prints[signature]
        if places is not None:
            watch = (signature, places)
            if watch not in prints:  # whether the run reads what the twins differ in
                set_modes(self.module, region)
                with watched(self.module, places) as reads:
                    prints[watch] = self._print(self.root(region), world, fakes, call, inputs) == expected and not reads
            if prints[watch]:
                self.checked.add(mark)
                return True
        set_modes(block, region)
        same = self._print(Root(block, region.ftc_name), world, fakes, call, inputs) == expected
        if same:
            self.checked.add(mark)
        return same

    def _print(self, root: Root, world, fakes, call, inputs) -> str:
        def invoke(module):
            args, kwargs = call.fill(inputs)
            return module(*args, **kwargs)

        try:
            return fingerprint(root.module, world.mode, fakes, invoke)
        except Exception as error:
            raise explained(error, root) from error


class ShellCode(Code):
    """The code around the regions. Its graphs call the regions as `call_module` nodes."""

    def __init__(self, name: str, module: nn.Module, blocks: dict[str, nn.Module], regions: dict[str, nn.Module]):
        super().__init__(name, module)
        self.blocks = blocks  # region name -> skeleton block inside `module`
        self.regions = regions

    def root(self, region) -> Root:
        return Root(self.module)

    def original_attributes(self, region) -> dict[str, torch.Tensor]:
        own = super().original_attributes(region)
        inside = tuple(name + "." for name in self.blocks)
        return {name: t for name, t in own.items() if not name.startswith(inside)} if inside else own

    def _call(self, world: World, tracer, args: tuple, kwargs: dict):
        results: dict = {}
        with _stubbed(self.blocks, lambda name: self._stub(name, world, tracer, results)):
            return self.module(*args, **kwargs)

    def _stub(self, name: str, world: World, tracer, results: dict) -> Callable:
        region = self.regions[name]
        original = self.blocks[name].forward

        def forward(*args, **kwargs):
            call = take_apart((args, kwargs), tree_flatten, name)
            shapes = tuple((tuple(str(s) for s in t.shape), t.dtype) for t in call.tensors)
            signature = (id(region.code), call.leaves, call.spec, shapes, region.mode_key())
            with disable_proxy_modes_tracing(), torch.no_grad():
                if signature not in results:
                    results[signature] = self._fake_result(region, original, world, args, kwargs)
                out = tree_map(lambda t: world_copy(t, world) if isinstance(t, torch.Tensor) else t, results[signature])
            proxies = tree_map(lambda leaf: _proxy(leaf, tracer), (args, kwargs))
            proxy = tracer.create_proxy("call_function", _region_call, (name, *proxies[0]), proxies[1])
            return track_tensor_tree(out, proxy, constant=None, tracer=tracer)

        return forward

    def _fake_result(self, region, original: Callable, world: World, args: tuple, kwargs: dict):
        block = self.blocks[region.ftc_name]
        attributes = {
            n: world.fake(t.shape, t.dtype, region.code.device)
            for n, t in region.code.original_attributes(region).items()
        }
        with state_restored(block), torch.nn.utils.stateless._reparametrize_module(block, attributes):
            block.forward = original
            with world.env.ignore_fresh_unbacked_symbols():  # sizes within the block alone
                return block(*args, **kwargs)

    def capture(self, region, key: tuple, call: Call, dynamic=None) -> Variant:
        for name, block in self.blocks.items():
            set_modes(block, self.regions[name])
        variant = super().capture(region, key, region.whole_call(call), dynamic)
        if self.steps:
            self.ensure_regions(variant.captured)
        return variant

    def _trace(self, region, call: Call, dynamic):
        captured, leaves, spec, fake_call = super()._trace(region, call, dynamic)
        for node in captured.graph.nodes:
            if node.op == "call_function" and node.target is _region_call:
                node.op, node.target, node.args = "call_module", node.args[0], node.args[1:]
        tidy(captured.graph)
        if declare_masks(captured):
            tidy(captured.graph)
        self.ensure_regions(captured)
        return captured, leaves, spec, fake_call

    def ensure_regions(self, captured: CapturedGraph) -> None:
        """Capture the region variants that the graph's calls need, and check that twins may share them."""
        for node in captured.graph.nodes:
            if node.op != "call_module":
                continue
            region = self.regions[node.target]
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), _value)
            call = take_apart((tuple(args), dict(kwargs)), tree_flatten, node.target)
            key = region.code.key(region, call)
            hinted = Call([_hinted(t) for t in call.tensors], call.leaves, call.spec)
            if not any(variant.accepts(hinted.tensors) for variant in region.code.variants.get(key, ())):
                dynamic = [[isinstance(s, torch.SymInt) and not s.node.expr.is_number for s in t.shape] for t in call.tensors]
                region.code.capture(region, key, hinted, dynamic)
            if not region.code.check_twin(region, key, hinted):
                region.split_code()
                self.ensure_regions(captured)
                return


def _value(item):
    return item.meta["val"] if isinstance(item, fx.Node) else item


def _hinted(t: torch.Tensor) -> torch.Tensor:
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else int(s) for s in t.shape]
    return torch.empty(sizes, dtype=t.dtype, device="meta").to("meta") if t.device.type == "meta" else _Described(sizes, t)


class _Described(torch.Tensor):
    """A tensor of given sizes without data that answers for the device of another."""

    @staticmethod
    def __new__(cls, sizes, like):
        return torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise FtcFailure(f"a description of a tensor has no data ({func})")


def _device(t: torch.Tensor, default: torch.device) -> torch.device:
    return default if t.device.type == "meta" else t.device


def _is_fake(t: torch.Tensor) -> bool:
    return isinstance(t, (torch._subclasses.fake_tensor.FakeTensor, _Described)) or t.device.type == "meta"


def world_copy(t: torch.Tensor, world: World) -> torch.Tensor:
    """A fresh fake tensor with the (symbolic) sizes and strides of `t`."""
    with world.mode:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)


def _region_call(name: str, *args, **kwargs):
    raise FtcFailure(f"the call of region {name} was traced, not run")


def _proxy(leaf, tracer):
    if isinstance(leaf, torch.Tensor):
        slot = get_proxy_slot(leaf, tracer, None)
        if slot is None:
            return leaf
        return slot.proxy
    if isinstance(leaf, torch.SymInt):
        return fetch_sym_proxy(tracer)(leaf)
    return leaf


class _stubbed:
    """Puts stand-ins for the forward of the blocks, and takes them away again."""

    def __init__(self, blocks: dict[str, nn.Module], make: Callable[[str], Callable]):
        self.blocks, self.make = blocks, make

    def __enter__(self):
        for name, block in self.blocks.items():
            block.__dict__["forward"] = self.make(name)

    def __exit__(self, *exc):
        for block in self.blocks.values():
            block.__dict__.pop("forward", None)


def set_modes(module: nn.Module, region: nn.Module) -> None:
    """Give each submodule of a skeleton the train or eval mode of its counterpart in the live region."""
    live = dict(region.named_modules())
    for name, submodule in module.named_modules():
        submodule.training = live[name].training if name in live else region.training


def _square(tensors: Sequence[torch.Tensor]) -> bool:
    return any(len(set(sizes := [int(s) for s in t.shape if int(s) > 1])) < len(sizes) for t in tensors if t.dim() == 2)


def _identifier(name: str) -> str:
    word = "".join(c if c.isalnum() else "_" for c in name) or "shell"
    return f"region_{word}" if word[0].isdigit() else word


def _input_names(module: nn.Module, call: Call) -> list[str]:
    """Readable, unique names of the tensor inputs, from the arguments that hold them."""
    import inspect

    args, kwargs = call.fill([Hole(i) for i in range(len(call.tensors))])
    try:
        parameters = [p.name for p in inspect.signature(type(module).forward).parameters.values()][1:]
    except (TypeError, ValueError):
        parameters = []
    named = list(zip(parameters + [f"input_{i}" for i in range(len(args))], args, strict=False)) + list(kwargs.items())
    names = [f"input_{i}" for i in range(len(call.tensors))]
    for name, value in named:
        holes = [leaf.index for leaf in tree_flatten(value)[0] if isinstance(leaf, Hole)]
        for position, index in enumerate(holes):
            names[index] = name if len(holes) == 1 else f"{name}_{position}"
    return names

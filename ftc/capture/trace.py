"""Tracing a function of fake tensors into a graph, with the decisions it took on sizes and on data.

The graph is pre-dispatch ATen (`aten.linear`, `aten.scaled_dot_product_attention`, ... stay whole) and differentiable.
Sizes are symbols of one ShapeEnv, whose guards say for which sizes the graph holds. A decision on data (a Python `if` on
a tensor) is taken on the real inputs where the tensor depends on them alone, and is kept as a guard of its own.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from ftc.capture.blame import DataReads, Root, explained, here, refusal
from ftc.capture.disguise import tracing_hidden
from ftc.capture.fakes import WiderFakes
from ftc.capture.hits import Hits
from ftc.errors import FtcError

_SCALAR_READS = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
    torch.Tensor.item: lambda t: t.item(),
    torch.Tensor.tolist: lambda t: t.tolist(),
    torch.is_nonzero: bool,
}


@dataclass
class World:
    """One ShapeEnv and fake mode: the sizes of a trace and what was assumed of them."""

    env: ShapeEnv
    mode: FakeTensorMode

    @classmethod
    def new(cls, duck: bool = True) -> "World":
        env = ShapeEnv(duck_shape=duck, specialize_zero_one=True)
        return cls(env, FakeTensorMode(shape_env=env, allow_non_fake_inputs=True))

    def fake(self, shape: Sequence[int], dtype: torch.dtype, device, dynamic: Sequence[bool] | None = None) -> FakeTensor:
        """A fake tensor of `shape` whose dims marked in `dynamic` are symbols (size 1 is never one)."""
        dynamic = dynamic if dynamic is not None else [False] * len(shape)
        kinds = [DimDynamic.DUCK if flag else DimDynamic.STATIC for flag in dynamic]
        source = torch.empty(tuple(shape), dtype=dtype, device="meta")
        fake = self.mode.from_tensor(source, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
        if torch.device(device).type == "meta":
            return fake
        with self.mode:
            return torch.empty_strided(fake.size(), fake.stride(), dtype=dtype, device=device)


@dataclass
class Trace:
    """What tracing gives: the raw graph with its constants, the scalar reads with the values they had, and whether a choice
    that the data makes was taken as hitting everything (see `ftc.capture.hits`)."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    decisions: list[tuple[fx.Node, object]] = field(default_factory=list)
    assumed: bool = False


class _Decisions(TorchFunctionMode):
    """Answers reads of scalars from fake tensors by evaluating what was traced so far on the real inputs."""

    def __init__(self, real_inputs: Sequence[torch.Tensor] | None, root: Root | None):
        self.real_inputs, self.root = real_inputs, root
        self.tracer = None
        self.taken: list[tuple[fx.Node, object]] = []
        self.values: dict[fx.Node, object] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        read = _SCALAR_READS.get(func)
        if read is None or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        slot = get_proxy_slot(args[0], self.tracer, None) if self.tracer is not None else None
        if slot is None:
            return func(*args, **(kwargs or {}))
        node = slot.proxy.node if hasattr(slot, "proxy") else slot.node
        with disable_proxy_modes_tracing(), torch.utils._python_dispatch._disable_current_modes():
            value = read(self._evaluate(node))
        self.taken.append((node, value))
        return value

    def _evaluate(self, node: fx.Node):
        if node in self.values:
            return self.values[node]
        if node.op == "placeholder":
            position = list(n for n in node.graph.nodes if n.op == "placeholder").index(node)
            if self.real_inputs is None or position >= len(self.real_inputs) or self.real_inputs[position] is None:
                raise refusal(here(), self.root)
            value = self.real_inputs[position]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), self._argument)
            value = node.target(*args, **kwargs)
        else:
            raise refusal(here(), self.root)
        self.values[node] = value
        return value

    def _argument(self, item):
        return self._evaluate(item) if isinstance(item, fx.Node) else item


def location(node: fx.Node) -> str:
    """`file:line, in function` of the source that made `node`, as far as tracing kept it."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    if not lines:
        return "source unknown"
    parts = lines[-1].removeprefix("File ").split(", ")
    return f"{parts[0].strip(chr(34))}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else lines[-1]


def trace(
    function: Callable,
    world: World,
    fakes: Sequence[torch.Tensor],
    real_inputs: Sequence[torch.Tensor | None] | None = None,
    root: Root | None = None,
) -> Trace:
    """Trace `function(*fakes, tracer)` -> list of tensors; `real_inputs[i]` backs placeholder i for decisions on data.
    `root` is the module that the function runs, for error messages.

    The function gets, besides the fakes, a callable that returns the tracer, for those who add nodes of their own.
    Raises FtcError with the place in the source where the model does what cannot be traced.
    """
    decisions, data_reads, hits = _Decisions(real_inputs, root), DataReads(), Hits()

    def traced(*inputs):
        decisions.tracer = torch.fx.experimental.proxy_tensor.get_proxy_mode().tracer
        with decisions, hits, torch.enable_grad():
            return function(*inputs, tracer=decisions.tracer)

    try:
        with tracing_hidden(), _autocast_off(), world.mode, WiderFakes(), data_reads:
            module = make_fx(
                traced, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True, record_stack_traces=True
            )(*fakes)
    except FtcError:
        raise
    except Exception as error:
        raise explained(error, root, data_reads.places) from error
    constants = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node.target] = getattr(module, node.target)
    module.graph.owning_module = None  # attributes are names in the model, not in a GraphModule
    return Trace(module.graph, constants, _renewed(decisions.taken, module.graph), hits.assumed)


def _renewed(taken: list[tuple[fx.Node, object]], graph: fx.Graph) -> list[tuple[fx.Node, object]]:
    by_name = {node.name: node for node in graph.nodes}
    seen, out = set(), []
    for node, value in taken:
        if node.name not in by_name:
            raise FtcError(f"a decision on {node.name} was lost in tracing; report the model")
        if node.name not in seen:
            seen.add(node.name)
            out.append((by_name[node.name], value))
    return out


@contextlib.contextmanager
def _autocast_off() -> Iterator[None]:
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise FtcError("capture under torch.autocast is not supported; convert the model instead, e.g. model.to(torch.bfloat16)")
    yield

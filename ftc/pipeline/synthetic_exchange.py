"""`ftc::synthetic_exchange`: a transfer that takes time and changes nothing, for measuring overlap on one device.

    y = x       after `units` journeys of x from the device to pinned host memory and back, on a stream of its own (CUDA);
                after `units` milliseconds in a thread of its own (CPU)

The gradient makes the same journey. In a graph of two halves the operator is a start and a wait, like an exchange with other ranks, but it needs
none, takes no part of the processors that compute, and is as long as wanted. Not meant for Inductor: what waits returns the tensor that it was given.
"""

from __future__ import annotations

import concurrent.futures
import time

import torch
from torch import Tensor, fx

from ftc.dialect.library import LIBRARY
from ftc.pipeline.communication import BLOCKING, STARTS, Transfer, Writer

CHANNEL = "copies"
LIBRARY.define("synthetic_exchange(Tensor x, int units) -> Tensor")
LIBRARY.define("synthetic_start(Tensor x, int units) -> Tensor")
LIBRARY.define("synthetic_wait(Tensor pending) -> Tensor")

_PENDING: dict[int, object] = {}  # by the address of a pending tensor: an event (CUDA) or a future (CPU), with what must live until then
_STREAMS: dict[int, torch.cuda.Stream] = {}
_PINNED: dict[tuple, Tensor] = {}
_THREAD: list[concurrent.futures.ThreadPoolExecutor] = []


def start(x: Tensor, units: int) -> Tensor:
    """Begin the journey of x; the result may be read after `wait`. ValueError for a number of journeys below 0."""
    if units < 0:
        raise ValueError(f"synthetic_exchange: units {units} must be at least 0")
    x = x.contiguous()
    out = torch.empty_like(x)
    _PENDING[out.data_ptr()] = (_start_cuda if x.is_cuda else _start_cpu)(x, out, units)
    return out


def wait(pending: Tensor) -> Tensor:
    """The value that came; the current stream (CUDA) or the caller (CPU) waits for it."""
    handle, _ = _PENDING.pop(pending.data_ptr())
    if pending.is_cuda:
        torch.cuda.current_stream(pending.device).wait_event(handle)
    else:
        handle.result()
    return pending


def _start_cpu(x: Tensor, out: Tensor, units: int) -> tuple:
    if not _THREAD:
        _THREAD.append(concurrent.futures.ThreadPoolExecutor(1, "synthetic-exchange"))  # one at a time, as on a link

    def journey():
        time.sleep(units * 1e-3)
        out.copy_(x)

    return _THREAD[0].submit(journey), (x, out)


def _start_cuda(x: Tensor, out: Tensor, units: int) -> tuple:
    index = x.device.index
    stream = _STREAMS.setdefault(index, torch.cuda.Stream(x.device))
    host = _PINNED.get((index, x.nbytes))
    if host is None:
        host = _PINNED[index, x.nbytes] = torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=True)
    staged = host.view(x.dtype).view(x.shape)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        if units == 0:
            out.copy_(x)
        for _ in range(units):
            staged.copy_(x, non_blocking=True)
            out.copy_(staged, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    for tensor in (x, out):
        tensor.record_stream(stream)
    return event, (out,)


def exchange(x: Tensor, units: int) -> Tensor:
    return wait(start(x, units))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, units):
        ctx.units = units
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ftc.synthetic_exchange(x, units)

    @staticmethod
    def backward(ctx, grad):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ftc.synthetic_exchange(grad, ctx.units), None


def _like(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name, _function in (("synthetic_exchange", exchange), ("synthetic_start", start), ("synthetic_wait", wait)):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ftc::{_name}", _like)
LIBRARY.impl("synthetic_exchange", lambda x, units: _Function.apply(x, units), "Autograd")


def _pair(graph: fx.Graph, node: fx.Node) -> None:
    write, value = Writer(graph, node), node.meta["val"]
    write.replace(write(torch.ops.ftc.synthetic_wait.default, write(torch.ops.ftc.synthetic_start.default, *node.args, like=value), like=value))


BLOCKING[torch.ops.ftc.synthetic_exchange.default] = _pair
STARTS[torch.ops.ftc.synthetic_start.default] = Transfer(lambda node: CHANNEL, torch.ops.ftc.synthetic_wait.default)

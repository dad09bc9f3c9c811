"""A prefill chunk and a decode step of a cached program on fake tensors: the bytes that PyTorch's CPU allocator would hand out.

    weights, cache -> fake tensors; block table and counts stay real, because the operators read their values

The operators over a paged cache run their own CPU code on the fakes, so that what they take meanwhile is counted as well.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from ftc.cache.paged import PagedCache
from ftc.capture.program import Program
from ftc.dialect import paged_attention, paged_latent_attention
from ftc.kernels import cpu_decode
from ftc.train.allocator import allocator_events, peak_bytes
from ftc.train.ledger import Ledger

aten = torch.ops.aten
_KERNELS = {
    torch.ops.ftc.paged_attention.default: paged_attention._cpu,
    torch.ops.ftc.paged_latent_attention.default: paged_latent_attention._cpu,
}


def simulate(program: Program, plan) -> dict[str, int]:
    """The most bytes that the last prefill chunk and the last decode step take beside weights and cache: {"prefill", "decode"}."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _faked(program, mode)
    with mode:
        cache = PagedCache(fake, plan.num_blocks)
    return {name: _peak(fake, cache, mode, plan, tokens) for name, tokens in (("prefill", plan.chunk), ("decode", 1))}


def _peak(program: Program, cache: PagedCache, mode: FakeTensorMode, plan, tokens: int) -> int:
    place(cache, plan, tokens)
    for host in cache._hosts:
        host.state |= {name: _Known.of(value) for name, value in host.state.items() if not isinstance(value, FakeTensor)}
    with torch.no_grad(), mode, _fake_decode(), CallLedger("cpu") as ledger:
        for tensor in [*program.parameters(), *program.buffers(), *cache.tensors().values()]:
            ledger.note(tensor)
        ids = torch.zeros(plan.batch, tokens, dtype=torch.int64)
        ledger.note(ids)
        ledger.reset_peak()
        before, known = ledger.current_bytes, {}
        for region in program.regions:
            region.around = functools.partial(_once, region.code, ledger, known)
        result = program(input_ids=ids)
        del result
    return ledger.peak_bytes - before


def _once(code: Any, ledger: CallLedger, known: dict, run: Callable, args: tuple, kwargs: dict) -> Any:
    """`run`, or where a twin has run on such inputs already, what it took: the same peak above what is there now, and results of the same sizes."""
    leaves, _ = tree_flatten((args, kwargs))
    signature = (id(code), *((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves))
    if signature in known:
        above, result = known[signature]
        ledger.peak_bytes = max(ledger.peak_bytes, ledger.current_bytes + above)
        return tree_map_only(_Size, _Size.empty, result)
    before, peak = ledger.current_bytes, ledger.peak_bytes
    ledger.peak_bytes = before
    result = run(*args, **kwargs)
    known[signature] = ledger.peak_bytes - before, tree_map_only(Tensor, _Size.of, result)
    ledger.peak_bytes = max(peak, ledger.peak_bytes)
    return result


@dataclass(frozen=True)
class _Size:
    """A result's sizes, without its memory."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Size:
        return cls(tensor.shape, tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def place(cache: PagedCache, plan, tokens: int) -> None:
    """Let the program read a cache in which every sequence has `context - tokens` tokens and `tokens` come."""
    sequences = sorted(cache.lengths) or [cache.add() for _ in range(plan.batch)]
    for sequence in sequences:  # one after the other, so that each one's blocks follow one another
        cache.reserve({sequence: plan.context})
    had, new = (torch.full((plan.batch,), n, dtype=torch.int32) for n in (plan.context - tokens, tokens))
    device = cache.device
    cache.device = torch.device("cpu")
    table = cache.table(sequences)
    cache.device = device
    cache.place(*(t.to(device) for t in (table, had, new)))


class CallLedger(Ledger):
    """A ledger that looks into the operators over a paged cache, and knows what fused attention takes meanwhile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _KERNELS:
            with self:
                return _KERNELS[func](*args, **(kwargs or {}))
        args, kwargs = tree_map_only(_Known, lambda known: known.plain, (args, kwargs or {}))
        if func.namespace != "prim" and func._can_decompose():  # inside those operators autograd, which takes composite ones apart, is behind us
            with self:
                return func.decompose(*args, **kwargs)
        result = super().__torch_dispatch__(func, (), args, kwargs)
        if func is aten.view.default:
            result = _plainly_laid(result)
        if func in _MEANWHILE:
            self.peak_bytes = max(self.peak_bytes, self.current_bytes + _MEANWHILE[func](*args))
        return result


def _plainly_laid(tensor: Tensor) -> Tensor:
    """A contiguous fake tensor with the strides that a view of real ones gives it: those of dims of one entry differ, and products look at them."""
    strides = tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))
    if isinstance(tensor, FakeTensor) and tensor.is_contiguous() and tensor.stride() != strides:
        return tensor.as_strided(tensor.shape, strides)
    return tensor


class _Known(Tensor):
    """A block table or count, whose values are read outside of the modes that make tensors fake."""

    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, value: Tensor) -> _Known:
        known = value.as_subclass(cls)
        known.plain = value
        return known

    def tolist(self) -> list:
        with _disable_current_modes():
            return Tensor.tolist(self)

    def numpy(self, *, force: bool = False) -> Any:
        with _disable_current_modes():
            return Tensor.numpy(self, force=force)


def _flash_bytes(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """For each thread a tile of scores, two rows of sums and a tile of results, in float32 at least, and in half precision a copy of the scores
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
    queries, slots = query.shape[2], key.shape[2]
    tile = min(256 if queries >= 768 else 64 if queries >= 192 else 32, queries)
    across = min(512, slots)
    size = 8 if query.dtype == torch.float64 else 4
    scratch = size * (tile * across + 2 * tile + tile * value.shape[3])
    return torch.get_num_threads() * (scratch + (query.dtype.itemsize * tile * across if query.dtype in _HALF else 0))


def _safe_softmax_bytes(scores: Tensor, dim: int, *_: Any) -> int:
    """Which scores are -inf, which rows have nothing else, and the zero that these get."""
    return scores.numel() + scores.numel() // max(scores.shape[dim], 1) + scores.itemsize


def _product_bytes(*operands: Any) -> int:
    """oneDNN packs tiles of what it multiplies in half precision, as many as the processor's matrix unit asks for, and copies what lies in
    an order that it cannot read: measured on this machine."""
    left, right = [t for t in operands if isinstance(t, Tensor)][-2:]
    if left.dtype not in _HALF:
        return 0
    return _measured_product(*(part for t in (left, right) for part in _layout(t)), left.dtype)


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes and strides to measure with: the tensor's own, or where it is large, no more than tiles of it in the same order."""
    sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
    if 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) <= _EXACT:
        return sizes, strides
    limits = (4, _TILE, _TILE)[-len(sizes) :]
    clipped, packed, step = tuple(map(min, sizes, limits)), [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda d: (strides[d], -d)):
        packed[dim] = step
        step *= clipped[dim]
    return clipped, tuple(packed)


@functools.lru_cache
def _measured_product(sizes: tuple, strides: tuple, right_sizes: tuple, right_strides: tuple, dtype: torch.dtype) -> int:
    with _disable_current_modes():
        left, right = (torch.empty_strided(n, s, dtype=dtype).zero_() for n, s in ((sizes, strides), (right_sizes, right_strides)))
        out, events = allocator_events(lambda: torch.matmul(left, right))
        return max(0, peak_bytes(events) - out.nbytes)


_HALF = (torch.bfloat16, torch.float16)
_EXACT = 1 << 22  # elements
_TILE = 1024  # rows and columns: a tile's memory does not grow with more
# What kernels take beside their results, which fake tensors do not show.
_MEANWHILE = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_bytes,
    aten._safe_softmax.default: _safe_softmax_bytes,
    aten.mm.default: _product_bytes,
    aten.addmm.default: _product_bytes,
    aten.bmm.default: _product_bytes,
}


def _faked(program: Program, mode: FakeTensorMode) -> Program:
    """A fork with fake tensors on the CPU in the place of all parameters and buffers; shared ones stay shared."""
    fork, made = program.fork(), {}
    with mode:
        for module in fork.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
                    store[name] = made[id(tensor)]
    for host in [*fork.regions, fork]:
        host.forget()
    for variant in (variant for code in fork.codes for variant in code.all_variants()):
        variant._decide = None  # what the model decided on by values at capture holds: fakes have none to decide by
    return fork


@contextlib.contextmanager
def _fake_decode() -> Iterator[None]:
    """The compiled decode kernel without what it computes: there is no memory to read here. What it takes is as in `cpu_decode.decode`."""
    real = cpu_decode.decode

    def decode(query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, *_: Any, value_width: int | None = None, **options: Any) -> Tensor:
        wide, _ = query.float().contiguous(), block_table.to(torch.int32).contiguous()
        return wide.new_empty(*wide.shape[:3], value_width or values.shape[-1]).to(query.dtype)

    cpu_decode.decode = decode
    try:
        yield
    finally:
        cpu_decode.decode = real

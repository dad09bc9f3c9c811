"""What a simulated step would allocate and compute: storages of fake tensors, and the FLOPs of the operators that make them.

    with FakeTensorMode(allow_non_fake_inputs=True), Ledger("cuda") as ledger:
        trainer.train_step(batches)
    ledger.peak_bytes, ledger.flops["backward"]

The same quantities in a run: `ftc.train.allocator` (CPU) and torch.cuda.max_memory_allocated.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftc.dialect import chunk_cross_entropy
from ftc.flops import operator_flops
from ftc.parallel.weights import local

aten = torch.ops.aten
_BLOCK_BYTES = {"cuda": 512}  # torch's CUDA allocator rounds up to blocks of this size
PHASES = ("forward", "backward", "recomputation", "optimizer", "between")


def _log_softmax_out(x: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor) -> Tensor:
    return aten._log_softmax.out(x if dtype is None else x.to(dtype), dim, False, out=out)


# Operators whose kernels are written in ATen operators themselves: these are what takes memory and time.
_WRITTEN_OUT: dict[Any, Callable] = {
    torch.ops.ftc.chunk_cross_entropy_rows.default: chunk_cross_entropy._rows,
    aten.log_softmax.int_out: _log_softmax_out,
}


class Ledger(TorchDispatchMode):
    """Counts bytes of live storages on one kind of device, and FLOPs by phase, of all operators that run inside.

    Entered after a FakeTensorMode. A scalar that is read from a fake tensor is False, 1 or 1.0. FLOPs are those of matrix
    products and attention (2 for a multiplication with its addition), as torch.utils.flop_counter has them.
    """

    def __init__(self, device_type: str = "cpu"):
        super().__init__()
        self.device_type, self._block = device_type, _BLOCK_BYTES.get(device_type, 1)
        self.current_bytes = self.peak_bytes = 0
        self.peak_phase = "between"
        self.phase = "between"  # of what runs outside of autograd's backward
        self.flops: Counter[str] = Counter()
        self.activation_bytes = 0  # most that a forward pass left for its backward pass
        self._before_forward: int | None = None
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}
        self._depth = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Ledger":
        self._depth += 1
        if self._depth > 1:  # it enters itself for operators that are written out
            return super().__enter__()
        resize, ledger = self._resize, self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in ledger._sizes:
                ledger._note(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # sharding frees and takes back storages without an operator
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def begin_forward(self) -> None:
        """What is alive from here to the first operator of the backward pass are activations."""
        self.phase, self._before_forward = "forward", self.current_bytes

    def reset_peak(self) -> None:
        """Forget the highest mark, and FLOPs, so far."""
        self.peak_bytes, self.peak_phase = self.current_bytes, self.phase
        self.flops.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it runs operators on its local tensors, which come here again
        phase = self._phase()
        if func in _WRITTEN_OUT:
            with self:
                return _WRITTEN_OUT[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        result = func(*args, **kwargs)
        self.flops[phase] += operator_flops(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._note(tensor.untyped_storage())
        return result

    def note(self, tensor: Tensor) -> None:
        """Take a tensor into account that no operator made."""
        self._note(tensor.untyped_storage())

    def _phase(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return self.phase
        if self._before_forward is not None:
            self.activation_bytes = max(self.activation_bytes, self.current_bytes - self._before_forward)
            self._before_forward = None
        return "recomputation" if torch.is_grad_enabled() else "backward"  # gradients of gradients are never asked for

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Take a storage into account, or its new size."""
        key, size = id(storage), math.ceil(storage.nbytes() / self._block) * self._block
        known = self._sizes.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
            self._sizes[key] = reference, size
            self.current_bytes += size
        elif known[1] != size:
            self._sizes[key] = known[0], size
            self.current_bytes += size - known[1]
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.current_bytes, self._phase()

    def _forget(self, key: int) -> None:
        self.current_bytes -= self._sizes.pop(key)[1]


def num_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages under `tensors`; of a DTensor its local part's."""
    storages = {id(s): s for s in (local(t).untyped_storage() for t in tensors if isinstance(t, Tensor))}
    return sum(s.nbytes() for s in storages.values())

"""Which operations a block runs, as a hash: the proof that two blocks of equal structure may share one graph."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftc.capture.disguise import tracing_hidden
from ftc.capture.fakes import WiderFakes
from ftc.capture.hits import Hits
from ftc.capture.skeleton import state_restored


class _Recorder(TorchDispatchMode):
    def __init__(self, known: Sequence[torch.Tensor]):
        super().__init__()
        self.digest = hashlib.sha256()
        self.numbers = {id(t): i for i, t in enumerate(known)}
        self.alive = list(known)  # ids stay unique while their tensors live

    def _number(self, tensor: torch.Tensor) -> str:
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.numbers)
            self.alive.append(tensor)
            if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
                self.digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
                self.digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"%{number}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        words = [str(func)]
        for leaf in tree_leaves((args, kwargs)):
            words.append(self._number(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf))
        words.append(",".join(kwargs))
        self.digest.update("|".join(words).encode())
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.digest.update(self._number(leaf).encode())
        return out


def fingerprint(
    block: nn.Module, mode: FakeTensorMode, attributes: dict[str, torch.Tensor], call: Callable[[nn.Module], object]
) -> str:
    """Hash of the operations, constants and data flow of `call(block)` run on fake `attributes` (static sizes)."""
    recorder = _Recorder(list(attributes.values()))
    with state_restored(block), torch.nn.utils.stateless._reparametrize_module(block, attributes):
        with tracing_hidden(), mode, WiderFakes(), recorder, Hits(), torch.no_grad():
            out = call(block)
        for leaf in tree_leaves(out):
            recorder.digest.update(
                recorder._number(leaf).encode() if isinstance(leaf, torch.Tensor) else repr(leaf).encode()
            )
    return recorder.digest.hexdigest()

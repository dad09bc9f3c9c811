"""Lenses of attention that becomes latent: linear maps of stacked rows, given by matrices (those of the queries are `ftc.rewrite.lens_heads`).

    latent      a = E [x_1; x_2; ...],  b = D      a down-projection, and an up-projection that begins as D
    shift       c = c + W s                        the bias of the product that follows

A matrix acts on the rows of a weight [rows, D] and on the entries of a bias [rows] alike. Moments begin anew. The latent goes back by [x] = K a_rope + (rows
of b) a_latent, with b as it is by then; gradients by the transposed map (`pull_back`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.rewrite.lens import Lens, Tensors, _check_size, _exchange


class _Resetting(Lens):
    """Moments of what a lens makes begin at zero."""

    moments = "reset"

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return tuple(
            {n: torch.zeros_like(v) if n in self.targets else v for n, v in self.forward(moment).items()} for moment in (exp_avg, exp_avg_sq)
        )

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return tuple(
            {n: torch.zeros_like(v) if n in self.sources else v for n, v in self.backward(moment).items()} for moment in (exp_avg, exp_avg_sq)
        )


def _matrix_entry(lens: Lens, name: str, tensors: Tensors | None) -> object:
    """A matrix in a lens's JSON: its name among `tensors`, to which it is added; without them its shape and digest."""
    value = getattr(lens, name)
    if tensors is not None:
        key = f"{lens.kind}.{name}.{len(tensors)}.{lens.targets[0]}"
        tensors[key] = value
        return key
    data = value.detach().double().contiguous()
    return {"shape": list(value.shape), "sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest()}


def _product(matrix: Tensor, value: Tensor) -> Tensor:
    """matrix [m, n] times value [n, D] or [n], in float64, rounded once to the dtype of `value`."""
    return (matrix.double().to(value.device) @ value.double()).to(value.dtype)


@dataclass(frozen=True, eq=False)
class ToLatent(_Resetting):
    """a = encode @ [keys; values], for weights and, where there are any, biases; b = decode, which is a parameter from then on.

    `sources`: weights of keys and values, then their biases or nothing; `targets`: the weights a and b, then a's bias. encode [L + E, G (K + M)]:
    first the latent, then the rotated key part. decode [G (N + M), L], group by group. `keep` [G K, E]: what the rotated part contributes to the
    keys, for the way back. `exact`: nothing is lost. Matrices are on the CPU.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    encode: Tensor = field(hash=False)
    decode: Tensor = field(hash=False)
    keep: Tensor = field(hash=False)
    groups: int
    exact: bool

    kind = "to_latent"

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "targets", tuple(self.targets))
        if (len(self.sources), len(self.targets)) not in ((2, 2), (4, 3)):
            raise FtcError(f"a to_latent lens from {self.sources} to {self.targets}: two weights, with both biases or none")

    @property
    def has_inverse(self) -> bool:
        return self.exact

    def __eq__(self, other):
        return type(other) is type(self) and self.as_dict() == other.as_dict()

    def with_prefix(self, prefix: str) -> ToLatent:
        return replace(self, sources=tuple(prefix + n for n in self.sources), targets=tuple(prefix + n for n in self.targets))

    def as_dict(self, tensors: Tensors | None = None) -> dict:
        plain = {"groups": self.groups, "exact": self.exact, "sources": list(self.sources), "targets": list(self.targets)}
        return {"kind": self.kind, **plain, **{name: _matrix_entry(self, name, tensors) for name in ("encode", "decode", "keep")}}

    def pull_back(self, gradients: Tensors) -> Tensors:
        def transposed(values):
            down = [values[0], *values[2:]]
            return [part for value in down for part in self._parts(_product(self.encode.mT, value))]

        return _exchange(self, gradients, self.targets, self.sources, transposed)

    def _apply(self, values):
        made = [self._encoded(torch.cat(pair, 0)) for pair in (values[:2], values[2:]) if pair]
        return [made[0], self.decode.to(made[0].dtype).to(made[0].device).clone(), *made[1:]]

    def _encoded(self, stacked: Tensor) -> Tensor:
        _check_size(self, self.sources[0], stacked, 0, self.encode.shape[1])
        if stacked.device.type == "meta":
            return stacked.new_empty(self.encode.shape[0], *stacked.shape[1:])
        return _product(self.encode, stacked)

    def _undo(self, values):
        back = None if values[0].device.type == "meta" else self._back(values[1])
        made = []
        for down in (values[0], *values[2:]):
            _check_size(self, self.targets[0], down, 0, self.encode.shape[0])
            if back is None:
                made += self._parts(down.new_empty(self.encode.shape[1], *down.shape[1:]))
            else:
                made += self._parts(_product(back, down))
        return made

    def _back(self, up: Tensor) -> Tensor:
        """[G (K + M), L + E]: keys and values from the latent and the rotated part, with the up-projection as it is."""
        blocks = up.detach().double().unflatten(0, (self.groups, -1)).cpu()
        num_keys, width = self.keep.shape[0], (self.encode.shape[1] - self.keep.shape[0]) // self.groups
        keys, values = blocks[:, : blocks.shape[1] - width].flatten(0, 1), blocks[:, blocks.shape[1] - width :].flatten(0, 1)
        keys = keys if len(keys) else keys.new_zeros(num_keys, self.decode.shape[1])  # nothing of the keys is in the latent
        none = self.keep.new_zeros(len(values), self.keep.shape[1]).double()
        return torch.cat([torch.cat([keys, values]), torch.cat([self.keep.double(), none])], 1)

    def _parts(self, stacked: Tensor) -> list[Tensor]:
        keys = self.keep.shape[0]
        return [part.contiguous().clone() for part in stacked.split([keys, stacked.shape[0] - keys])]


@dataclass(frozen=True, eq=False)
class Shift(Lens):
    """bias + weight @ shift: a constant that was left out before a product, given back after it. A bias is made where there was none."""

    weight: str
    bias: str
    shift: Tensor = field(hash=False)  # [columns of the weight], on the CPU
    made: bool

    kind = "shift"
    moments = "reset"

    def __eq__(self, other):
        return type(other) is type(self) and self.as_dict() == other.as_dict()

    @property
    def sources(self) -> tuple[str, ...]:
        return () if self.made else (self.bias,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.bias,)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.weight,)

    def with_prefix(self, prefix: str) -> Shift:
        return replace(self, weight=prefix + self.weight, bias=prefix + self.bias)

    def as_dict(self, tensors: Tensors | None = None) -> dict:
        plain = {"weight": self.weight, "bias": self.bias, "made": self.made}
        return {"kind": self.kind, **plain, "shift": _matrix_entry(self, "shift", tensors)}

    def forward(self, tensors: Tensors) -> Tensors:
        added = self._added(tensors[self.weight])
        return {**tensors, self.bias: added if self.made else tensors[self.bias] + added}

    def backward(self, tensors: Tensors) -> Tensors:
        if self.made:
            return {name: value for name, value in tensors.items() if name != self.bias}
        return {**tensors, self.bias: tensors[self.bias] - self._added(tensors[self.weight])}

    def pull_back(self, gradients: Tensors) -> Tensors:
        return _exchange(self, gradients, (self.bias,), (), lambda values: []) if self.made else gradients

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return dict(exp_avg), dict(exp_avg_sq)

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return self.pull_back(exp_avg), self.pull_back(exp_avg_sq)

    def _added(self, weight: Tensor) -> Tensor:
        if weight.device.type == "meta":
            return weight.new_empty(weight.shape[0])
        return _product(weight.detach().double(), self.shift.double().to(weight.device)).to(weight.dtype)

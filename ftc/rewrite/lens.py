"""Lenses: maps of named tensors, forward into a rewritten model's parameters and backward into the original's.

A lens consumes its `sources` and produces its `targets`; every other tensor passes through untouched and uncopied.
It carries Adam moments along, and says how faithfully (`moments`):

    stack, permute, rename   y = P x        m' = P m       v' = P v           bitwise
    rotate                   y = R x        m' = R m       v' = (R*R) v       approximate: v is a variance, and the
                                                                              covariances that R mixes in are not kept
    factor                   x ~ left right m' = 0         v' = 0             reset
    add, drop                see ftc.rewrite.lens_add

Lenses are differentiable functions; wrap calls in `torch.no_grad()` to map parameters. Nothing is changed in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from ftc.errors import FtcError, nearest

Tensors = dict[str, torch.Tensor]
MOMENT_WORDS = ("bitwise", "approximate", "reset")  # from most to least faithful


class Lens:
    """One map of named tensors; see the module's docstring. Subclasses are frozen dataclasses."""

    kind: str
    moments = "bitwise"
    has_inverse = True
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reads: tuple[str, ...] = ()  # tensors that it needs and leaves as they are
    makes_buffers = False  # of dtypes of their own (`own_dtypes`), which no optimizer sees

    def own_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the buffers that it makes."""
        return set()

    def at(self, region: str) -> Lens:
        """The lens as it acts in one region: that of a plan made region by region has values of its own in each."""
        return self

    def forward(self, tensors: Tensors) -> Tensors:
        """A new dict in which `targets` stand in the place of `sources`. Raises FtcError when a source is missing."""
        return _exchange(self, tensors, self.sources, self.targets, self._apply)

    def backward(self, tensors: Tensors) -> Tensors:
        """A new dict in which `sources` stand in the place of `targets`; the best fit where there is no inverse."""
        return _exchange(self, tensors, self.targets, self.sources, self._undo)

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        """Both Adam moments, from the original's names to the rewritten model's."""
        return self.forward(exp_avg), self.forward(exp_avg_sq)

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        """Both Adam moments, from the rewritten model's names to the original's."""
        return self.backward(exp_avg), self.backward(exp_avg_sq)

    def pull_back(self, gradients: Tensors) -> Tensors:
        """Gradients of the targets as gradients of the sources. For a lens that is no orthogonal map this is not `backward`."""
        return self.backward(gradients)

    def with_prefix(self, prefix: str) -> Lens:
        """The same lens with `prefix` put before every name ("model.layers.0.")."""
        raise NotImplementedError

    def as_dict(self, tensors: Tensors | None = None) -> dict:
        """JSON-ready. Matrices are added to `tensors` and named in the dict, or written as lists when it is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"kind": self.kind, **listed}

    def steps(self) -> tuple[Lens, ...]:
        """The elementary lenses in the order in which forward applies them."""
        return (self,)

    def _apply(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError

    def _undo(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Stack(Lens):
    """`target = cat(sources, dim)`, where source i has `sizes[i]` entries along `dim`."""

    sources: tuple[str, ...]
    target: str
    sizes: tuple[int, ...]
    dim: int = 0

    kind = "stack"

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        if len(self.sources) != len(self.sizes) or not self.sources:
            raise FtcError(f"a stack into {self.target!r} has {len(self.sources)} sources and {len(self.sizes)} sizes")

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def with_prefix(self, prefix: str) -> Stack:
        return replace(self, sources=tuple(prefix + name for name in self.sources), target=prefix + self.target)

    def _apply(self, values):
        for name, value, size in zip(self.sources, values, self.sizes, strict=True):
            _check_size(self, name, value, self.dim, size)
        return [torch.cat(values, self.dim)]

    def _undo(self, values):
        _check_size(self, self.target, values[0], self.dim, sum(self.sizes))
        # Clones: a view would keep the stacked storage alive and tie the parts to each other.
        return [part.clone(memory_format=torch.contiguous_format) for part in values[0].split(self.sizes, self.dim)]


class _OneToOne(Lens):
    """What lenses with one source and one target share."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def with_prefix(self, prefix: str) -> Lens:
        return replace(self, source=prefix + self.source, target=prefix + self.target)


@dataclass(frozen=True)
class Permute(_OneToOne):
    """`target[i] = source[permutation[i]]` along `dim`."""

    source: str
    target: str
    permutation: tuple[int, ...]
    dim: int = 0

    kind = "permute"

    def __post_init__(self):
        permutation = self.permutation.tolist() if isinstance(self.permutation, torch.Tensor) else self.permutation
        object.__setattr__(self, "permutation", tuple(int(index) for index in permutation))
        if sorted(self.permutation) != list(range(len(self.permutation))):
            raise FtcError(f"the indices of {self.source!r} are not a permutation of 0..{len(self.permutation) - 1}")

    def _apply(self, values):
        _check_size(self, self.source, values[0], self.dim, len(self.permutation))
        return [values[0].index_select(self.dim, torch.tensor(self.permutation, device=values[0].device))]

    def _undo(self, values):
        _check_size(self, self.target, values[0], self.dim, len(self.permutation))
        inverse = torch.tensor(self.permutation, device=values[0].device).argsort()
        return [values[0].index_select(self.dim, inverse)]


@dataclass(frozen=True)
class Rename(_OneToOne):
    """`target = source`: the same tensor object under another name."""

    source: str
    target: str

    kind = "rename"

    def _apply(self, values):
        return values

    _undo = _apply


@dataclass(frozen=True)
class Rotate(_OneToOne):
    """`target = R source` along `dim`, R orthogonal.

    `matrix` is [n, n], or [blocks, n, n] for a block-diagonal R of `blocks * n` entries (one rotation a head).
    Computed in float64 and rounded once to the source's dtype, so that there and back is exact to that rounding.
    """

    source: str
    target: str
    matrix: torch.Tensor = field(hash=False)
    dim: int = 0

    kind = "rotate"
    moments = "approximate"

    def __post_init__(self):
        matrix = torch.as_tensor(self.matrix).detach()
        if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
            raise FtcError(f"the matrix that rotates {self.source!r} has shape {list(matrix.shape)}, not [n, n]")
        object.__setattr__(self, "matrix", matrix)
        blocks = matrix.double()
        error = (blocks @ blocks.mT - torch.eye(blocks.shape[-1], dtype=torch.float64)).abs().max().item()
        if not error <= 1e-5:
            raise FtcError(f"the matrix that rotates {self.source!r} is not orthogonal: max|R R' - 1| is {error:.1e}")

    def __eq__(self, other):
        if not isinstance(other, Rotate):
            return NotImplemented
        same = (self.source, self.target, self.dim) == (other.source, other.target, other.dim)
        return same and torch.equal(self.matrix, other.matrix)

    def as_dict(self, tensors: Tensors | None = None) -> dict:
        if tensors is None:
            matrix = {"values": self.matrix.tolist(), "dtype": str(self.matrix.dtype).removeprefix("torch.")}
        else:
            matrix = f"rotate.{len(tensors)}.{self.target}"
            tensors[matrix] = self.matrix
        return {**super().as_dict(), "matrix": matrix}

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        def squared(values):
            return [self._multiply(self.matrix.double().square(), self.source, values[0])]

        return self.forward(exp_avg), _exchange(self, exp_avg_sq, self.sources, self.targets, squared)

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        def squared(values):
            return [self._multiply(self.matrix.double().square().mT, self.target, values[0])]

        return self.backward(exp_avg), _exchange(self, exp_avg_sq, self.targets, self.sources, squared)

    def _apply(self, values):
        return [self._multiply(self.matrix.double(), self.source, values[0])]

    def _undo(self, values):
        return [self._multiply(self.matrix.double().mT, self.target, values[0])]

    def _multiply(self, matrix: torch.Tensor, name: str, value: torch.Tensor) -> torch.Tensor:
        blocks = matrix if matrix.ndim == 3 else matrix[None]
        _check_size(self, name, value, self.dim, blocks.shape[0] * blocks.shape[1])
        rows = value.movedim(self.dim, 0)
        product = blocks.to(value.device) @ rows.double().reshape(blocks.shape[0], blocks.shape[1], -1)
        return product.reshape(rows.shape).movedim(0, self.dim).to(value.dtype).contiguous()


@dataclass(frozen=True)
class Factor(Lens):
    """`source [m, n] ~ left [m, rank] @ right [rank, n]`, the best such product by SVD (Eckart and Young, 1936).

    Both factors get the square roots of the singular values. There is an inverse (to rounding) only at full rank;
    `backward` always gives the product.
    """

    source: str
    targets: tuple[str, str]  # (left, right)
    rank: int
    shape: tuple[int, int]  # (m, n)

    kind = "factor"
    moments = "reset"

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 1 <= self.rank <= min(self.shape):
            raise FtcError(f"rank {self.rank} does not fit {self.source!r} {list(self.shape)}: 1 to {min(self.shape)}")

    @property
    def has_inverse(self) -> bool:
        return self.rank == min(self.shape)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def with_prefix(self, prefix: str) -> Factor:
        return replace(self, source=prefix + self.source, targets=tuple(prefix + name for name in self.targets))

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        def zeros(values):
            m, n = self.shape
            return [values[0].new_zeros(m, self.rank), values[0].new_zeros(self.rank, n)]

        return tuple(_exchange(self, moment, self.sources, self.targets, zeros) for moment in (exp_avg, exp_avg_sq))

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        def zeros(values):
            return [values[0].new_zeros(self.shape)]

        return tuple(_exchange(self, moment, self.targets, self.sources, zeros) for moment in (exp_avg, exp_avg_sq))

    def _apply(self, values):
        if tuple(values[0].shape) != self.shape:
            raise FtcError(f"{self.source!r} has shape {list(values[0].shape)}, the factor lens expects {self.shape}")
        u, s, vh = torch.linalg.svd(values[0].double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        left, right = u[:, : self.rank] * root, root[:, None] * vh[: self.rank]
        return [left.to(values[0].dtype), right.to(values[0].dtype).contiguous()]

    def _undo(self, values):
        left, right = values
        return [(left.double() @ right.double()).to(left.dtype)]


@dataclass(frozen=True)
class Compose(Lens):
    """The lenses one after the other; backward runs them in reverse. `Compose(())` is the identity."""

    lenses: tuple[Lens, ...]

    kind = "compose"

    def __post_init__(self):
        object.__setattr__(self, "lenses", tuple(self.lenses))

    @property
    def has_inverse(self) -> bool:
        return all(lens.has_inverse for lens in self.lenses)

    @property
    def moments(self) -> str:
        return max((lens.moments for lens in self.lenses), key=MOMENT_WORDS.index, default="bitwise")

    @property
    def sources(self) -> tuple[str, ...]:
        return _outer_names((lens.sources, lens.targets) for lens in self.lenses)

    @property
    def targets(self) -> tuple[str, ...]:
        return _outer_names((lens.targets, lens.sources) for lens in reversed(self.lenses))

    def with_prefix(self, prefix: str) -> Compose:
        return Compose(tuple(lens.with_prefix(prefix) for lens in self.lenses))

    def as_dict(self, tensors: Tensors | None = None) -> dict:
        return {"kind": self.kind, "lenses": [lens.as_dict(tensors) for lens in self.lenses]}

    def steps(self) -> tuple[Lens, ...]:
        return tuple(step for lens in self.lenses for step in lens.steps())

    def forward(self, tensors: Tensors) -> Tensors:
        tensors = dict(tensors)
        for lens in self.lenses:
            tensors = lens.forward(tensors)
        return tensors

    def backward(self, tensors: Tensors) -> Tensors:
        tensors = dict(tensors)
        for lens in reversed(self.lenses):
            tensors = lens.backward(tensors)
        return tensors

    def pull_back(self, gradients: Tensors) -> Tensors:
        for lens in reversed(self.lenses):
            gradients = lens.pull_back(gradients)
        return gradients

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        for lens in self.lenses:
            exp_avg, exp_avg_sq = lens.forward_moments(exp_avg, exp_avg_sq)
        return exp_avg, exp_avg_sq

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        for lens in reversed(self.lenses):
            exp_avg, exp_avg_sq = lens.backward_moments(exp_avg, exp_avg_sq)
        return exp_avg, exp_avg_sq


def lens_from_dict(data: dict, tensors: Tensors | None = None) -> Lens:
    """The lens that `as_dict(tensors)` described. Raises FtcError for an unknown kind, field or missing matrix."""
    from ftc.quantize.lens import InputScale, Quantize
    from ftc.rewrite.lens_add import Add, AddBuffer, Drop
    from ftc.rewrite.lens_experts import Experts
    from ftc.rewrite.lens_heads import HeadMap
    from ftc.rewrite.lens_latent import Shift, ToLatent
    from ftc.rewrite.lens_upcycle import Upcycle
    from ftc.rewrite.shard import Shard, Unstack

    kinds = (Stack, Unstack, Permute, Rename, Rotate, Factor, Shard, Compose, Add, AddBuffer, Drop, ToLatent, Shift, HeadMap, Experts, Upcycle, Quantize, InputScale)
    kinds = {cls.kind: cls for cls in kinds}
    if data.get("kind") not in kinds:
        raise FtcError(f"unknown kind of lens {data.get('kind')!r}; {nearest(str(data.get('kind')), kinds)}")
    values = {key: value for key, value in data.items() if key != "kind"}
    if data["kind"] == "compose":
        values["lenses"] = tuple(lens_from_dict(lens, tensors) for lens in values["lenses"])
    if data["kind"] == "rotate":
        matrix = values["matrix"]
        if isinstance(matrix, str):
            if tensors is None or matrix not in tensors:
                raise FtcError(f"the matrix {matrix!r} of a rotate lens is missing from the tensors beside it")
            values["matrix"] = tensors[matrix]
        else:
            values["matrix"] = torch.tensor(matrix["values"], dtype=getattr(torch, matrix["dtype"]))
    for key in ("matrix", "back", "encode", "decode", "keep", "shift") if data["kind"] in ("head_map", "to_latent", "shift") else ():
        if isinstance(values.get(key), str):
            if tensors is None or values[key] not in tensors:
                raise FtcError(f"the matrix {values[key]!r} of a {data['kind']} lens is missing from the tensors beside it")
            values[key] = tensors[values[key]]
    try:
        return kinds[data["kind"]](**values)
    except TypeError as error:
        raise FtcError(f"a {data['kind']} lens cannot be read from {sorted(values)}: {error}") from error


def map_optimizer_state(lens: Lens, state: dict[str, dict], backward: bool = False) -> dict[str, dict]:
    """Optimizer state, `{parameter name: {"exp_avg", "exp_avg_sq", "step"}}` (Adam, AdamW) or `{..: {"momentum"}}` (Muon),
    carried through a lens.

    Parameters that a lens does not touch keep their state dict, uncopied. A lens whose parameters have no state at all
    (nothing trained yet) is passed over. After a reset the step is 0, so that Adam's bias correction starts again.
    Raises FtcError when some of one lens's parameters have state and others have none, of another kind or with another step
    count, and for other optimizers' state.
    """
    for step in reversed(lens.steps()) if backward else lens.steps():
        consumed = step.targets if backward else step.sources
        produced = step.sources if backward else step.targets
        present = [name for name in consumed if name in state]
        if not present:
            continue
        if len(present) < len(consumed):
            missing = ", ".join(name for name in consumed if name not in state)
            raise FtcError(f"optimizer state for {missing} is missing, but {present[0]} has some; map a complete state")
        carried = step.backward_moments if backward else step.forward_moments
        new = {}
        if all(set(state[name]) == {"momentum"} for name in consumed):
            first = {name: state[name]["momentum"] for name in consumed}
            first, _ = carried(first, {name: value.square() for name, value in first.items()})
            new = {name: {"momentum": first[name]} for name in produced}
        else:
            count = _common_step(state, consumed)
            moments = [{name: state[name][key] for name in consumed} for key in ("exp_avg", "exp_avg_sq")]
            exp_avg, exp_avg_sq = carried(*moments)
            for name in produced:
                fresh = torch.zeros_like(count) if step.moments == "reset" else count.clone()
                new[name] = {"step": fresh, "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
        state = _exchange(step, state, consumed, produced, lambda _, new=new, names=produced: [new[n] for n in names])
    return dict(state)


def _common_step(state: dict[str, dict], names: Iterable[str]) -> torch.Tensor:
    """The step count that all `names` share, as a tensor."""
    for name in names:
        if set(state[name]) != {"step", "exp_avg", "exp_avg_sq"}:
            raise FtcError(
                f"the optimizer state of {name} holds {sorted(state[name])}; a lens carries Adam's step, exp_avg and "
                "exp_avg_sq, or for all of its parameters Muon's momentum"
            )
    counts = {name: float(state[name]["step"]) for name in names}
    if len(set(counts.values())) > 1:
        raise FtcError(f"these parameters stand at different optimizer steps and cannot be merged: {counts}")
    return torch.as_tensor(state[next(iter(counts))]["step"])


class Exchanged(Mapping):
    """Values, which are read one at a time (from a file), with some of them exchanged for others."""

    def __init__(self, values: Mapping, consumed: tuple, produced: dict):
        self._values, self._consumed, self._produced = values, set(consumed), produced

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._produced:
            return self._produced[name]
        if name in self._consumed:
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._produced, (name for name in self._values if name not in self._consumed))

    def __len__(self) -> int:
        return len(self._produced) + len(self._values) - len(self._consumed)


def _exchange(lens: Lens, values: Mapping, consumed: tuple, produced: tuple, function: Callable[[list], list]) -> Mapping:
    """A copy of `values` (of a dict; else a view of it) in which `produced` = function(consumed) stand where the first consumed name stood."""
    missing = [name for name in consumed if name not in values]
    if missing:
        raise FtcError(f"a {lens.kind} lens misses {', '.join(missing)}; {nearest(missing[0], list(values)[:12])}")
    taken = [name for name in produced if name in values and name not in consumed]
    if taken:
        raise FtcError(f"a {lens.kind} lens would overwrite {', '.join(taken)}")
    results = dict(zip(produced, function([values[name] for name in consumed]), strict=True))
    if not isinstance(values, dict):
        return Exchanged(values, consumed, results)
    out = {}
    for name, value in values.items():
        if name == consumed[0]:
            out.update(results)
        if name not in consumed:
            out[name] = value
    return out


def _check_size(lens: Lens, name: str, value: torch.Tensor, dim: int, size: int) -> None:
    if not -value.ndim <= dim < value.ndim or value.shape[dim] != size:
        raise FtcError(
            f"{name!r} has shape {list(value.shape)}, but its {lens.kind} lens expects {size} entries along dim {dim}"
        )


def _outer_names(pairs: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> tuple[str, ...]:
    """What a chain needs from outside: names that are consumed before anything in the chain produced them."""
    needed, produced = [], set()
    for consumed, made in pairs:
        needed += [name for name in consumed if name not in produced and name not in needed]
        produced = (produced - set(consumed)) | set(made)
    return tuple(needed)

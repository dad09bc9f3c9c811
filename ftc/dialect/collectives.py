"""What ranks say to each other, as operators with gradients. Each is defined in plain PyTorch on the list of all ranks' tensors.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053) computes every rank's own copy of the loss; a gradient is the derivative of
that copy. So f and g of the paper's figure 3 are conjugates:

    copy_to_ranks      f   y_r = x_r            dx_r = sum_s dy_s      from what all ranks hold alike into what each holds a part of
    reduce_from_ranks  g   y_r = sum_s x_s      dx_r = dy_r            and back
    gather_from_ranks      y_r = [x_0, x_1...]  dx_r = dy_r[own part]  the same, where the parts stand side by side
    max_over_ranks         y_r = max_s x_s      no gradient
    rank_slice             the rank's own part of what all hold; after copy_to_ranks its gradient is whole on every rank
    rank_offset            y_r = x_r - r size   ids counted from the first that the rank holds

`DEFINITIONS` holds the plain forms. On real ranks they are functional collectives (`_c10d_functional`), which torch.compile keeps.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ftc.dialect.library import composite
from ftc.dialect.ranks import Place, place_on
from ftc.errors import FtcError

_c10d = torch.ops._c10d_functional
DEFINITIONS: dict[str, Callable] = {}  # name of the operator -> function of (list of the ranks' tensors, *arguments without axis and degree)
JOINT_DEFINITIONS: dict[str, Callable] = {}  # the same for operators of which ranks give several tensors: function of (list of the ranks' arguments by name)


def collective(schema: str, definition: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as `ftc::schema`, and what it means for all ranks at once."""
    name = schema.split("(")[0]
    DEFINITIONS[name] = definition
    return composite(schema)


def standing(x: Tensor, axis: str, degree: int) -> Place:
    """The place on `axis` for an operator on `x`, real or fake."""
    return place_on(axis, degree, sizes_only=isinstance(x, FakeTensor) or x.device.type == "meta")


def all_reduce(x: Tensor, place: Place, operation: str = "sum") -> Tensor:
    """The sum (or max) over the group; x itself, copied, where there are only sizes."""
    if place.group is None:
        _check_no_data(x)
        return x.clone()
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), operation, place.group))


def all_gather(x: Tensor, place: Place, dim: int) -> Tensor:
    """All ranks' tensors, in order, along `dim`."""
    if place.group is None:
        _check_no_data(x)
        return torch.cat([x] * place.degree, dim)
    flat = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), place.degree, place.group))
    return flat if dim % x.dim() == 0 else torch.cat(flat.chunk(place.degree), dim)


def reduce_scatter(x: Tensor, place: Place, dim: int) -> Tensor:
    """The sum over the group of the rank's own part along `dim`."""
    if place.group is None:
        _check_no_data(x)
        return x.chunk(place.degree, dim)[place.rank].clone()
    rows = x if dim % x.dim() == 0 else torch.cat(x.chunk(place.degree, dim))
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(rows.contiguous(), "sum", place.degree, place.group))


def _check_no_data(x: Tensor) -> None:
    if not (isinstance(x, FakeTensor) or x.device.type == "meta"):
        raise FtcError("a collective was run on one simulated rank alone; run the graph with ftc.rewrite.lockstep")


# ------------------------------------------------------------------------------------------------------------ plain forms


class _SummedGradient(torch.autograd.Function):
    """The ranks' tensors as they are; each gets the sum of all gradients."""

    @staticmethod
    def forward(ctx, *xs):
        return tuple(x.clone() for x in xs)

    @staticmethod
    def backward(ctx, *grads):
        total = sum(grads[1:], grads[0])
        return (total,) * len(grads)


def copied(xs: list[Tensor]) -> list[Tensor]:
    """copy_to_ranks of all ranks."""
    return list(_SummedGradient.apply(*xs)) if xs[0].is_floating_point() else [x.clone() for x in xs]


def reduced(xs: list[Tensor]) -> list[Tensor]:
    """reduce_from_ranks of all ranks: the others' terms are constants to a rank's own copy of the loss."""
    return [sum((y.detach() for s, y in enumerate(xs) if s != r), x) for r, x in enumerate(xs)]


def gathered(xs: list[Tensor], dim: int) -> list[Tensor]:
    """gather_from_ranks of all ranks."""
    return [torch.cat([y if s == r else y.detach() for s, y in enumerate(xs)], dim) for r in range(len(xs))]


def maximum(xs: list[Tensor]) -> list[Tensor]:
    """max_over_ranks of all ranks."""
    return [torch.stack([x.detach() for x in xs]).amax(0)] * len(xs)


# -------------------------------------------------------------------------------------------------------------- operators


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.place), None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        return all_reduce(x, place)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, place):
        ctx.dim, ctx.place = dim, place
        return all_gather(x, place, dim)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.place.degree, ctx.dim)[ctx.place.rank].contiguous(), None, None


@collective("copy_to_ranks(Tensor x, str axis, int degree) -> Tensor", copied)
def copy_to_ranks(x: Tensor, axis: str, degree: int) -> Tensor:
    """x, alike on all ranks; its gradient is summed over them (f)."""
    return _CopyToRanks.apply(x, standing(x, axis, degree))


@collective("reduce_from_ranks(Tensor x, str axis, int degree) -> Tensor", reduced)
def reduce_from_ranks(x: Tensor, axis: str, degree: int) -> Tensor:
    """The sum of all ranks' x; the gradient passes (g)."""
    return _ReduceFromRanks.apply(x, standing(x, axis, degree))


@collective("gather_from_ranks(Tensor x, int dim, str axis, int degree) -> Tensor", gathered)
def gather_from_ranks(x: Tensor, dim: int, axis: str, degree: int) -> Tensor:
    """All ranks' x side by side along `dim`; a rank gets the gradient of its own part."""
    return _GatherFromRanks.apply(x, dim, standing(x, axis, degree))


@collective("max_over_ranks(Tensor x, str axis, int degree) -> Tensor", maximum)
def max_over_ranks(x: Tensor, axis: str, degree: int) -> Tensor:
    """The elementwise maximum over the ranks, without a gradient."""
    return all_reduce(x.detach(), standing(x, axis, degree), "max")


@composite("rank_slice(Tensor x, int dim, int parts, str axis, int degree) -> Tensor")
def rank_slice(x: Tensor, dim: int, parts: int, axis: str, degree: int) -> Tensor:
    """The rank's part of `parts` equal ones along `dim`. With fewer parts than ranks, degree/parts neighbours have the same one."""
    place = standing(x, axis, degree)
    size = x.shape[dim] // parts
    return x.narrow(dim, place.rank * parts // degree * size, size)


@composite("rank_offset(Tensor x, int size, str axis, int degree) -> Tensor")
def rank_offset(x: Tensor, size: int, axis: str, degree: int) -> Tensor:
    """x - rank * size, for ids of rows that are divided over the ranks."""
    return x - standing(x, axis, degree).rank * size

"""A small net of two blocks with canonical mixtures of experts, and what ranks with batches of their own compute with it."""

import torch
import torch.distributed as dist
from torch import nn

import ftc
from ftc import parallel
from ftc.parallel.weights import whole_tensors
from ftc.rewrite import probe

D, E, F, K = 8, 8, 6, 3
KINDS = {
    "gated": {},
    "biases": dict(bias=True, activation="clamped_swish", constants=[1.7, 7.0]),
    "on input": dict(weight_on_input=True, top_k=1),
    "plain": dict(gated=False, activation="gelu"),
    "all experts": dict(top_k=E),
    "dropping": dict(dropping=True),
}


class Experts(nn.Module):
    """A softmax router and `ftc::moe`. With `dropping`, choices of little weight are no choices, and tokens without any occur."""

    def __init__(self, gated=True, bias=False, top_k=K, dropping=False, **options):
        super().__init__()
        self.top_k, self.dropping, self.options = top_k, dropping, options
        width = 2 * F if gated else F
        self.router = nn.Linear(D, E)
        self.gate_up = nn.Parameter(torch.randn(E, width, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(E, D, F) / F**0.5)
        self.gate_up_bias = nn.Parameter(torch.randn(E, width)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(E, D)) if bias else None

    def forward(self, x):
        rows = x.flatten(0, -2)
        weights, indices = self.router(rows).softmax(-1).topk(self.top_k, -1)
        if self.dropping:
            indices = torch.where(weights > 0.2, indices, E)
        out = torch.ops.ftc.moe(rows, indices, weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias, **self.options)
        return out.view(x.shape)


class Block(nn.Module):
    """A product and a mixture."""

    def __init__(self, **kind):
        super().__init__()
        self.first, self.experts = nn.Linear(D, D), Experts(**kind)

    def forward(self, x):
        return x + self.experts(torch.tanh(self.first(x)))


class Net(nn.Module):
    """Two blocks, of which one may be frozen."""

    def __init__(self, **kind):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**kind), Block(**kind)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net(kind: str, dtype: torch.dtype = torch.float64) -> Net:
    """The same weights everywhere."""
    torch.manual_seed(0)
    return Net(**KINDS[kind]).to(dtype)


def batches(sizes: list[int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A batch for each rank, of so many tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, size, D, generator=generator, dtype=dtype) for size in sizes]


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    """A sum over tokens, so that the ranks' losses add up."""
    return outputs.pow(3).sum()


def alone(kind: str, sizes: list[int], dtype: torch.dtype, frozen: bool = False) -> tuple[float, dict, list]:
    """One process on all batches: loss, gradients, and the gradient of each batch."""
    model, given = net(kind, dtype), [x.requires_grad_() for x in batches(sizes, dtype)]
    if frozen:
        freeze(model)
    loss = sum(loss_of(model(x)) for x in given)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, [x.grad for x in given]


def freeze(model: nn.Module) -> None:
    """The first block's router, and the second block's experts."""
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.0.experts.router", "blocks.1.experts.down", "blocks.1.experts.gate_up")):
            parameter.requires_grad_(False)


def on_ranks(kind: str, sizes: list[int], dtype: torch.dtype, frozen: bool = False, backend: str | None = None) -> tuple[float, dict, torch.Tensor]:
    """This rank's share of the same, on its own batch: the loss of all, whole gradients, and the gradient of its batch."""
    model, x = net(kind, dtype), batches(sizes, dtype)[dist.get_rank()].requires_grad_()
    if frozen:
        freeze(model)
    passes = [("expert-parallel", {"degree": dist.get_world_size()})]
    program = parallel.bind(ftc.rewrite(model, passes, example=(torch.randn(1, 5, D, dtype=dtype),), check=False))
    assert program.blocks[0].experts.down.shape[0] == E // dist.get_world_size()
    if backend:
        program.compile(backend=backend)
    loss = loss_of(program(x))
    loss.backward()
    parallel.sum_gradients(program, "expert")
    total = loss.detach().clone()
    dist.all_reduce(total)
    grads = dict(whole_tensors(program, {n: p.grad for n, p in program.named_parameters() if p.requires_grad}))
    return total.item(), grads, x.grad


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of all gradients, as certificates measure it."""
    assert set(found) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(probe.relative_error(found[name], expected[name], largest) for name in expected)

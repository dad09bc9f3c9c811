"""Small hand-written blocks in the spellings people use, for the raise passes: no model library needed.

B batch, T tokens, D model, H heads, G key-value heads, K head dim.
"""

import torch
import torch.nn.functional as F
from helpers_export import region_graph
from torch import Tensor, fx, nn

from ftc.rewrite import probe

B, T, D, H, G, K = 2, 7, 24, 4, 2, 6


def export(module: nn.Module, *inputs: Tensor) -> fx.Graph:
    """The region graph of a module, batch and tokens dynamic."""
    return region_graph(module, inputs, dynamic=(B, T))


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy with its meta."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def calls(graph: fx.Graph, *targets) -> list[fx.Node]:
    """The nodes with one of these targets."""
    return [node for node in graph.nodes if node.target in targets]


def largest_error(before: fx.Graph, after: fx.Graph, lifted: bool = True) -> float:
    """The largest relative error of outputs and of gradients of inputs and parameters, at all probed sizes."""
    worst, dtype = 0.0, torch.float64 if lifted else None
    for sizes in probe.symbol_sizes(before):
        results = []
        for graph in (before, after):
            inputs = [x.requires_grad_(x.is_floating_point()) for x in probe.random_inputs(before, sizes, 5, dtype)]
            parameters = probe.random_parameters(before, 5, dtype=dtype)
            leaves = [x for x in [*inputs, *parameters.values()] if x.is_floating_point() or x.is_complex()]
            for leaf in leaves:
                leaf.requires_grad_()
            outputs = probe.run(graph, inputs, parameters, lifted)
            generator = torch.Generator().manual_seed(3)
            total = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
            gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
            results.append((outputs, gradients))
        scale = float(max(g.abs().max() for g in results[0][1] if g.numel()))
        for reference, value in zip(results[0][0], results[1][0], strict=True):
            assert reference.dtype == value.dtype
            worst = max(worst, probe.relative_error(value, reference))
        for reference, value in zip(results[0][1], results[1][1], strict=True):
            worst = max(worst, probe.relative_error(value, reference, scale))
    return worst


class Heads(nn.Module):
    """Projections to q [B, H, T, K], k and v [B, G, T, K], and back; `attend` is the spelling under test."""

    def __init__(self, attend, groups: int = G, heads: int = H):
        super().__init__()
        self.q, self.k = (
            nn.Linear(D, heads * K, bias=False),
            nn.Linear(D, groups * K, bias=False),
        )  # a bias of keys has no gradient
        self.v, self.o = nn.Linear(D, groups * K), nn.Linear(heads * K, D)
        self.heads, self.groups, self.attend = heads, groups, attend

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, K).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.groups, K).transpose(1, 2) for f in (self.k, self.v))
        out = self.attend(q, k, v, *others)
        return self.o(out.transpose(1, 2).reshape(batch, length, self.heads * K))


def repeat(x: Tensor, times: int = H // G) -> Tensor:
    """Key-value heads repeated, neighbours alike."""
    return x.repeat_interleave(times, dim=1)


def causal_bias(scores: Tensor) -> Tensor:
    """An additive causal mask [T, S]."""
    full = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device)
    return full.triu(1)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    """x over its root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def gelu_written_out(x: Tensor) -> Tensor:
    """The tanh form of GELU in elementary operations."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu_written_out(x: Tensor) -> Tensor:
    """x over one plus exp(-x)."""
    return x / (1 + torch.exp(-x))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The library's attention."""
    return F.scaled_dot_product_attention(q, k, v, **options)

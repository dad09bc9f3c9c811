"""A model of two mixtures of experts, and the work of the ranks of test_balance_run.py: one step of it, each rank with its part of the tokens."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftc
from ftc.dialect.balance import share_of_batch
from ftc.train.balance import ExpertBalance

EXPERTS, WIDTH, CHOSEN = 6, 8, 2


class Mixture(nn.Module):
    """[B, T, D] to [B, T, D]; `skew` pulls all tokens to the last experts."""

    def __init__(self, skew: float):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.gate_up, self.down = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH) / 3), nn.Parameter(torch.randn(EXPERTS, WIDTH, 4) / 3)
        with torch.no_grad():
            self.router.bias.copy_(skew * torch.arange(EXPERTS))

    def forward(self, x_BTD):
        x = x_BTD.flatten(0, 1)
        scores = self.router(x).sigmoid()
        indices = scores.topk(CHOSEN).indices
        return x_BTD + torch.ops.ftc.moe(x, indices, scores.gather(1, indices), self.gate_up, self.down).view_as(x_BTD)


def balanced(skew: float = 0.5, sequences: int = 12, tokens: int = 5, **options):
    """The program in float64 with the pass applied, and inputs [B, T, D]."""
    torch.manual_seed(3)
    model = nn.Sequential(Mixture(skew), Mixture(skew)).double()
    x = torch.randn(sequences, tokens, WIDTH, dtype=torch.float64)
    return ftc.rewrite(model, [("balance", options)], (x,), check=False), x


def add_ranks(tally):
    if dist.is_initialized():
        dist.all_reduce(tally)


def one_step(program, x, microbatches: int = 1, recompute: bool = False, rank: int = 0, ranks: int = 1, rate: float = 0.1):
    """One optimizer step on a rank's part of `x`; gradients summed over ranks, the report, and all buffers after it."""
    optimizer = torch.optim.SGD(program.parameters(), lr=rate)
    watch = ExpertBalance(program, add_ranks)
    watch.follow(optimizer, lambda: 1)
    for part in x.chunk(ranks)[rank].chunk(microbatches):
        with share_of_batch(1 / (microbatches * ranks)):
            out = checkpoint(program, part, use_reentrant=False) if recompute else program(part)
            (out.square().sum() / x.shape[0]).backward()
    if ranks > 1:
        for parameter in program.parameters():
            dist.all_reduce(parameter.grad)
    optimizer.step()
    gradients = {name: p.grad for name, p in program.named_parameters()}
    return gradients, watch.report(), {name: b.clone() for name, b in program.named_buffers()}


def on_this_rank(options: dict, microbatches: int, recompute: bool):
    program, x = balanced(**options)
    return one_step(program, x, microbatches, recompute, dist.get_rank(), dist.get_world_size())

"""absorb-mla: few tokens read the latents themselves, many read keys and values expanded from them.

    q_nope (W_UK c) = (W_UK' q_nope) c                sum_s p_s W_UV c_s = W_UV (sum_s p_s c_s)

Expanded (right for prefill), every cached latent is multiplied by [W_UK; W_UV] once a call: S L G (N + M). Absorbed (right for decode), the query and
the output are, T H L (N + M), and the attention between them is over L + E numbers for each head. Which costs less hangs on the number of tokens T
alone, because both grow with the context: where they cross is measured on this machine. W_UQ W_UK is never formed: it would be H D L numbers
where the two factors are H N (D + L). DeepSeek-V2 report (2024), section 2.1.2 and appendix C.
"""

import functools
import statistics
import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::paged_latent_attention
from ftc.rewrite import continuation
from ftc.rewrite.lockstep import arguments
from ftc.rewrite.outcome import Match, Miss, Outcome, location
from ftc.rewrite.passes import Pass

PAGED, PLAIN = torch.ops.ftc.paged_latent_attention.default, torch.ops.ftc.latent_attention.default
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BLOCK = 16


@dataclass(frozen=True)
class AbsorbMla(Pass):
    """Sets `absorb_up_to` of every cached latent attention."""

    up_to: int | None = field(default=None, metadata={"help": "absorb in calls of at most so many tokens; left out: where the two forms cross, measured"})
    context: int = field(default=1024, metadata={"help": "cached tokens while measuring"})

    name: ClassVar[str] = "absorb-mla"
    summary: ClassVar[str] = "latent attention of few tokens reads the latents themselves: W_UK to the query's side, W_UV to the output's"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True

    def __post_init__(self):
        if self.up_to is not None and self.up_to < 1:
            raise ValueError(f"up_to = {self.up_to} absorbs nothing; use 1 or more tokens, or leave it out to have it measured")
        if self.context < 1:
            raise ValueError(f"context = {self.context} is not a number of cached tokens; use 1 or more")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        for node in graph.nodes:
            if node.target is PLAIN:
                outcome.misses.append(Miss(node.name, "it has no cache yet; put insert-kv-cache before absorb-mla", node.name, location(node)))
            if node.target is not PAGED:
                continue
            bound = arguments(node)
            if bound.get("absorb_up_to"):
                outcome.already += 1
                continue
            sizes = _sizes(bound)
            up_to, detail = (self.up_to, {}) if self.up_to is not None else _crossover(*sizes, self.context)
            node.kwargs = dict(node.kwargs) | {"absorb_up_to": up_to}
            outcome.matches.append(Match("latent attention", (node.name,), {"up_to": up_to} | detail, location(node)))
        return outcome

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """The same chunks of tokens through both graphs, each with a cache of its own."""
        return continuation.prove_cached(before, after)


def _sizes(bound: dict) -> tuple:
    q_nope, q_pe, kv_b, cache = (bound[name].meta["val"] for name in ("q_nope", "q_pe", "kv_b", "cache"))
    heads, nope, rope, groups = int(q_pe.shape[1]), int(q_nope.shape[3]), int(q_pe.shape[3]), int(bound["groups"])
    return heads, groups, nope, rope, tuple(map(int, kv_b.shape)), cache.dtype, int(cache.shape[2]), q_pe.dtype, q_pe.device.type


@functools.lru_cache
def _crossover(heads, groups, nope, rope, kv_b, stored, row, dtype, device, context) -> tuple[int, dict]:
    """The most tokens for which the absorbed form was the faster one, and the milliseconds measured, by tokens."""
    times = {}
    for tokens in _COUNTS:
        absorbed, expanded = (_time(heads, groups, nope, rope, kv_b, stored, row, dtype, device, context, tokens, up_to) for up_to in (tokens, 0))
        times[tokens] = f"{absorbed:.2f} / {expanded:.2f}"
        if absorbed > expanded:
            break
    faster = [t for t in times if float(times[t].split(" / ")[0]) <= float(times[t].split(" / ")[1])]
    return max(faster, default=1), {f"ms at {t} absorbed / expanded": text for t, text in times.items()}


def _time(heads, groups, nope, rope, kv_b, stored, row, dtype, device, context, tokens, up_to) -> float:
    """Milliseconds of one call for one sequence, the median of 5."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    blocks = -(-(context + tokens) // _BLOCK)
    cache = torch.zeros(blocks, _BLOCK, row, dtype=stored, device=device)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    counts = [torch.tensor([n], dtype=torch.int32, device=device) for n in (context, tokens)]
    given = drawn(1, heads, tokens, nope), drawn(1, heads, tokens, rope), drawn(1, tokens, kv_b[1]), drawn(1, tokens, rope), drawn(*kv_b)
    elapsed = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            PAGED(*given, cache, table, *counts, groups=groups, scale=1.0, absorb_up_to=up_to)
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed.append((time.perf_counter() - start) * 1e3)
    return statistics.median(elapsed[1:])

"""Memory that is really taken: weights loaded, the cache's blocks allocated, a prefill chunk and a decode step run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftc.cache.paged import PagedCache
from ftc.errors import FtcError
from ftc.memory.predict import Memory, weights_of, with_cache
from ftc.memory.simulate import place
from ftc.train.allocator import allocator_events, peak_bytes
from ftc.train.ledger import num_bytes


def measure(model: nn.Module, predicted: Memory) -> dict[str, dict[str, float]]:
    """{"weights", "cache", "prefill", "decode"}, each with bytes `predicted` and `measured` and their `ratio`, predicted over measured.

    The model must have its weights; it runs where they are. Weights and cache are sizes of storages. Activations are the highest sum of what the allocator
    handed out during a call: on the CPU by its own events in the profiler, on CUDA torch.cuda.max_memory_allocated. Raises FtcError where there is
    less free memory than the prediction.
    """
    plan, device = predicted.plan, next(model.parameters()).device
    if device.type == "meta":
        raise FtcError("the model has no weights in memory (the meta device); load them to measure")
    _check_free(predicted, device)
    program, _ = with_cache(model, plan)
    cache = PagedCache(program, plan.num_blocks)
    found = {"weights": num_bytes(weights_of(program)), "cache": num_bytes(cache.tensors().values())}
    ids = torch.zeros(plan.batch, plan.chunk, dtype=torch.int64, device=device)
    for name, tokens in (("prefill", plan.chunk), ("decode", 1)):
        place(cache, plan, tokens)
        given = ids[:, :tokens].clone()
        found[name] = _peak(lambda given=given: program(input_ids=given), device)
    expected = {"weights": predicted.weight_bytes, "cache": predicted.cache_bytes(predicted.stored), **predicted.activations[predicted.stored]}
    return {name: {"predicted": expected[name], "measured": n, "ratio": expected[name] / n} for name, n in found.items()}


@torch.no_grad()
def _peak(call: Callable[[], Any], device: torch.device) -> int:
    call()  # what is made once (a compiled kernel, a table) is no part of a step
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _, events = allocator_events(call)
    return peak_bytes(events)


def _check_free(predicted: Memory, device: torch.device) -> None:
    runs = predicted.activations.get(predicted.stored, {})
    needed = predicted.cache_bytes(predicted.stored) + max(runs.values(), default=0)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    if free is not None and needed > free:
        raise FtcError(
            f"measuring takes {needed / 2**30:,.2f} GiB beside the weights and {free / 2**30:,.2f} GiB are free; use a smaller --context or --batch"
        )


def _available() -> int | None:
    """Bytes that Linux says a process may still take; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

"""Text drawn from a model itself, which is what healing and calibration use where no text is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_TOGETHER = 128  # sequences drawn side by side


@torch.no_grad()
def sample(
    model: nn.Module, start: int, count: int, length: int, *, seed: int = 0, temperature: float = 1.0, tell: Callable[[str], None] = lambda text: None
) -> Tensor:
    """`count` sequences [count, length] of token ids that begin with `start`, each token drawn from the model's distribution at `temperature`.

    Through a paged cache where the model can have one, else by computing the whole text for each token.
    """
    from ftc.cache.generation import with_cache
    from ftc.errors import FtcError

    generator = torch.Generator().manual_seed(seed)
    try:
        program = with_cache(model.fork() if hasattr(model, "fork") else model)
    except FtcError:
        program = None
    rows = []
    for first in range(0, count, _TOGETHER):
        tell(f"drawing text: {first} of {count} sequences")
        ids = torch.full((min(_TOGETHER, count - first), 1), start, dtype=torch.long)
        step = _whole(model) if program is None else _cached(program, len(ids), length)
        while ids.shape[1] < length:
            probabilities = torch.softmax(step(ids).float() / temperature, -1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        rows.append(ids)
    return torch.cat(rows)


def _whole(model: nn.Module):
    from ftc.evaluate import logits_of

    return lambda ids: logits_of(model(input_ids=ids))[:, -1]


def _cached(program, batch: int, length: int):
    from ftc.cache.paged import PagedCache, cached_by

    size = int(cached_by(program)["options"].get("block_size", 16))
    cache = PagedCache(program, batch * -(-length // size) + 1)
    sequences = [cache.add() for _ in range(batch)]

    def step(ids: Tensor) -> Tensor:
        found = cache.forward({s: ids[row, -1:] for row, s in enumerate(sequences)})
        return torch.stack([found[s][-1] for s in sequences])

    return step

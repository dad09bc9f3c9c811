"""What merging key-value heads weighs its losses by, from calibration text: keys and values, and the gradients that the model's answer sends to them.

With g the gradient of -log p(y), y drawn from the model's own distribution, E[(g . e)^2] / 2 is to second order the KL divergence that an error e
causes (see `ftc.rewrite.latent_statistics`). Keys are taken before RoPE, and so are their gradients: RoPE is orthogonal, so the gradient of the key of
token s is that of the rotated key turned back by the angles of s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ftc.rewrite.calibration import Batches, Kept, pieces
from ftc.rewrite.latent_statistics import HeadSizes, answer_gradients, complex_tables, write_pairs

# Shapes: B batch, T queries, S keys, G groups, R query heads of a group, F frequencies, K key head, M value head.


@dataclass
class HeadStatistics:
    """Means over calibration tokens, float64: second moments of keys [G K, G K] and values [G M, G M], and of their gradients."""

    sizes: HeadSizes
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> None:
        """Add the second moments of `rows` [tokens, heads width]."""
        self.sums[name] = self.sums.get(name, 0) + rows.mT @ rows

    def moment(self, name: str, rows: list[int]) -> Tensor:
        """Of "key", "value", "d_key" or "d_value": the second moments of these rows with each other."""
        return self.sums[name][rows][:, rows] / self.tokens


def collect_heads(
    program: nn.Module, regions: Mapping[str, HeadSizes], batches: Batches, seed: int = 0, tell: Callable[[str], None] = lambda text: None
) -> dict[str, HeadStatistics]:
    """The statistics of the one attention in each of `regions`; the program's parameters and modes are left as they are.

    One sequence at a time for a large model, and kept in a folder on the way, as in `ftc.rewrite.latent_statistics.collect`.
    """
    batches = pieces(program, batches)
    kept = Kept.of(program, regions, batches, seed)
    stored = kept.read()
    found = {name: HeadStatistics(sizes, **stored["layers"].get(name, {})) for name, sizes in regions.items()}
    for at in range(stored["done"], len(batches)):
        tell(f"calibrating: batch {at + 1} of {len(batches)}")
        for name, (site, values, gradients) in answer_gradients(program, regions, batches[at], seed + at).items():
            layer = found[name]
            d_key = _key_gradient(layer.sizes, values, gradients["scores"].double() * site.scale)
            layer.tokens += d_key.shape[0] * d_key.shape[2]
            for word, heads in (("key", values["key"]), ("value", values["value"]), ("d_key", d_key), ("d_value", gradients["value"])):
                layer.add(word, heads.double().transpose(1, 2).flatten(2).flatten(0, 1))
        kept.write(at + 1, {name: {"tokens": layer.tokens, "sums": layer.sums} for name, layer in found.items()})
    return found


def _key_gradient(sizes: HeadSizes, values: dict[str, Tensor], d_scores: Tensor) -> Tensor:
    """[B, G, S, K]: gradients of the keys before RoPE from those of the scores [B, G, R, T, S]."""
    query = values["query_read"].double().unflatten(1, (sizes.groups, -1))
    d_key = torch.einsum("bgrts,bgrtk->bgsk", d_scores, query)
    if sizes.frequencies:
        u = complex_tables(sizes, values)
        write_pairs(sizes, d_key, sizes.pairs(d_key) * u.conj()[:, None])
    return d_key

"""The lens that makes experts of one MLP: copies of its shards, in part drawn anew.

    target[e] = rows of shard e // (E / g)          of a matrix whose middle is cut into g shards; E / g copies of each

Back: the mean of the copies, which is the original until training tells the copies apart. A gradient of the original is the sum of its copies'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ftc.capture.growth import normal
from ftc.errors import FtcError
from ftc.rewrite.lens import Lens, Tensors


@dataclass(frozen=True)
class Upcycle(Lens):
    """`sources`: matrices [F, D] (or vectors [F]) whose shards stand one under the other in the target [E, len(sources) F / g, D]; with
    `along_columns` one matrix [D, F], the target [E, D, F / g]; with `whole` a vector [D] that every shard gets a g-th of, the target [E, D].

    `drop` of each expert's middle, which places is drawn from `seed` and the expert's number alone, is drawn anew with the mean and spread of its
    source (Nakamura et al. 2025, arXiv:2502.19261, section 3); the same places in all lenses of one MLP.
    """

    sources: tuple[str, ...]
    target: str
    num_experts: int
    shards: int
    along_columns: bool = False
    whole: bool = False
    drop: float = 0.0
    seed: int = 0

    kind = "upcycle"
    moments = "reset"
    has_inverse = False

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.num_experts % self.shards:
            raise FtcError(f"{self.num_experts} experts are not so many copies of each of {self.shards} shards")

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def with_prefix(self, prefix: str) -> Upcycle:
        return replace(self, sources=tuple(prefix + name for name in self.sources), target=prefix + self.target)

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return tuple({**self.forward(m), self.target: torch.zeros_like(self.forward(m)[self.target])} for m in (exp_avg, exp_avg_sq))

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        zeros = [{n: torch.zeros_like(v) if n in self.sources else v for n, v in self.backward(m).items()} for m in (exp_avg, exp_avg_sq)]
        return zeros[0], zeros[1]

    def pull_back(self, gradients: Tensors) -> Tensors:
        """The sum over copies; of a shared vector the sum over all experts' shares."""
        factor = 1.0 / self.shards if self.whole else self.num_experts / self.shards
        if self.whole:
            summed = gradients[self.target].sum(0) * factor
            return {**{n: g for n, g in gradients.items() if n != self.target}, self.sources[0]: summed}
        back = self.backward(gradients)
        return {name: value * factor if name in self.sources else value for name, value in back.items()}

    def kept(self, middle: int) -> torch.Tensor:
        """bool [E, middle]: which places of each expert keep what they copy."""
        number = round(self.drop * middle)
        kept = torch.ones(self.num_experts, middle, dtype=torch.bool)
        for expert in range(self.num_experts):
            order = torch.randperm(middle, generator=torch.Generator().manual_seed(1_000_003 * self.seed + expert))
            kept[expert, order[:number]] = False
        return kept

    def _apply(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        copies = self.num_experts // self.shards
        if self.whole:
            return [(values[0] / self.shards).expand(self.num_experts, -1).contiguous()]
        parts = []
        for name, value in zip(self.sources, values, strict=True):
            dim = 1 if self.along_columns else 0
            if value.shape[dim] % self.shards:
                raise FtcError(f"{name!r} {list(value.shape)} cannot be cut into {self.shards} shards along dim {dim}")
            part = torch.stack(value.chunk(self.shards, dim)).repeat_interleave(copies, 0)
            parts.append(self._drawn_anew(part, value, f"{self.target} {name}"))
        return [torch.cat(parts, 1) if not self.along_columns else parts[0].contiguous()]

    def _drawn_anew(self, part: torch.Tensor, source: torch.Tensor, name: str) -> torch.Tensor:
        if not self.drop:
            return part
        kept = self.kept(part.shape[2 if self.along_columns else 1]).to(part.device)
        kept = kept[:, None, :] if self.along_columns else kept if part.dim() == 2 else kept[:, :, None]
        drawn = normal(tuple(part.shape), name, self.seed).to(part.device) * source.float().std() + source.float().mean()
        return torch.where(kept, part, drawn.to(part.dtype))

    def _undo(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        copies = self.num_experts // self.shards
        mean = values[0].unflatten(0, (self.shards, copies)).mean(1)
        if self.whole:
            return [mean.sum(0)]
        parts = [mean] if self.along_columns else mean.chunk(len(self.sources), 1)
        return [torch.cat(list(part.unbind(0)), 1 if self.along_columns else 0).contiguous() for part in parts]

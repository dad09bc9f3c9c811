"""From statistics to plans: which RoPE pairs each layer keeps and how wide its latent is, for a cache budget or for ranks that are given.

Of every frequency f the key components j are those of the weighted covariance D^(1/2) E[k k^H] D^(1/2), D what a key without RoPE loses: its
Hermitian eigenvectors ("complex"), the eigenvectors of its real part ("real": TransMLA's choice, Meng et al. 2025), or the groups as they are ("none"). The
eigenvalue is what is lost when a component goes without RoPE. The latent is the principal part of A z, z = [rest; values], A^2 the Fisher information of z: what
is lost are the eigenvalues of A C A that are left out. With `weigh = "size"` D and A only balance keys against values, and RoPE stays on the first
components of all frequencies: the published algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.rewrite.latent_plan import Latent, LatentPlan, kept_parts, make_plan
from ftc.rewrite.latent_statistics import LayerStatistics
from ftc.rewrite.spill import give_back

# What keys lose without RoPE adds up over the keys that a query reads, which the sum of single losses does not see. On stories260k a weight of 2 picks the
# share with RoPE that is best on other text, at cuts from 1.6x to 4x.
_PAIR_WEIGHT = 2.0
_FISHER_FLOOR = 1e-4  # of its largest eigenvalue: no direction is taken to be worth nothing
_SHARES = 24  # numbers of pairs tried for a budget


@dataclass
class LayerSpectrum:
    """What one layer has to give: `pairs` [F, G] lost with each component's RoPE, `mix` [F, G, G]; spectra of latents by number of kept pairs."""

    statistics: LayerStatistics
    weigh: str
    centred: bool
    mix: Tensor
    pairs: Tensor
    metric: Tensor  # A, symmetric
    latents: dict[int, Tensor] = field(default_factory=dict)  # spectra alone: vectors of all layers would be more than a model

    @classmethod
    def of(cls, statistics: LayerStatistics, rotation: str, weigh: str, centred: bool) -> LayerSpectrum:
        """The Fisher information is taken out of `statistics`: its root stands for it from then on, and both of all layers are much."""
        mix, pairs = _components(statistics, rotation, weigh)
        metric = _metric(statistics, weigh)
        del statistics.sums["fisher"]
        return cls(statistics, weigh, centred, mix, pairs, metric)

    def order(self) -> list[tuple[int, int]]:
        """All pairs (f, j), those that lose most without RoPE first."""
        frequencies, groups = self.pairs.shape
        if self.weigh == "size":
            return [(f, j) for j in range(groups) for f in range(frequencies)]
        return [divmod(i, groups) for i in self.pairs.flatten().argsort(descending=True, stable=True).tolist()]

    def kept(self, count: int) -> list[tuple[int, int]]:
        """The `count` first, by component and frequency."""
        return sorted(self.order()[:count], key=lambda pair: (pair[1], pair[0]))

    def rest_rank(self, count: int) -> int:
        """Dimensions of what `count` kept pairs leave of keys and values."""
        return self.statistics.sizes.keys + self.statistics.sizes.values - 2 * count

    def weighed(self, count: int) -> Tensor:
        """A C A, C the covariance of what `count` kept pairs leave of keys and values."""
        sizes = self.statistics.sizes
        into, back, _ = kept_parts(sizes, self.mix, self.kept(count))
        rest = torch.eye(sizes.keys + sizes.values, dtype=torch.float64)
        rest[: sizes.keys, : sizes.keys] -= back @ into
        return self.metric @ (rest @ self.statistics.covariance(self.centred) @ rest.mT) @ self.metric

    def latent_spectrum(self, count: int) -> Tensor:
        """Eigenvalues of A C A, largest first."""
        if count not in self.latents:
            self.latents[count] = torch.linalg.eigvalsh(self.weighed(count)).flip(0).clamp_min(0)
        return self.latents[count]

    def plan(self, count: int, rank: int) -> LatentPlan:
        """The plan with `count` pairs and a latent of `rank`."""
        sizes = self.statistics.sizes
        vectors = torch.linalg.eigh(self.weighed(count))[1].flip(1)[:, :rank]
        mean = self.statistics.mean() if self.centred else None
        if mean is not None:
            into, back, _ = kept_parts(sizes, self.mix, self.kept(count))
            mean = torch.cat([mean[: sizes.keys] - back @ (into @ mean[: sizes.keys]), mean[sizes.keys :]])
        latent = Latent(vectors.mT @ self.metric, torch.linalg.solve(self.metric, vectors), mean)
        ones = torch.ones(sizes.heads, sizes.frequencies, dtype=torch.complex128)
        return make_plan(sizes, self.mix, self.kept(count), ones if self.weigh == "size" else self.statistics.constants, latent)


def _components(statistics: LayerStatistics, rotation: str, weigh: str) -> tuple[Tensor, Tensor]:
    sizes = statistics.sizes
    mix = torch.zeros(sizes.frequencies, sizes.groups, sizes.groups, dtype=torch.complex128)
    lost = torch.zeros(sizes.frequencies, sizes.groups, dtype=torch.float64)
    if not sizes.frequencies:
        return mix, lost
    covariance = statistics.key_covariance()
    weight = statistics.unrotated_weight() if weigh == "answer" else torch.ones(sizes.groups, sizes.frequencies, dtype=torch.float64)
    for f in range(sizes.frequencies):
        d = weight[:, f].clamp_min(max(float(weight.max()) * 1e-9, 1e-300)).sqrt()
        weighted = d[:, None] * covariance[f] * d
        if rotation == "none":
            values, vectors = weighted.diagonal().real, torch.eye(sizes.groups, dtype=torch.complex128)
        else:
            values, vectors = torch.linalg.eigh(weighted.real if rotation == "real" else weighted)
            values, vectors = values.flip(0), vectors.flip(1).to(torch.complex128)
        mix[f], lost[f] = vectors.mH * d, values.clamp_min(0)
    return mix, lost


def _metric(statistics: LayerStatistics, weigh: str) -> Tensor:
    sizes = statistics.sizes
    if weigh == "size":
        sizes_of = statistics.covariance(centred=False).diagonal().split([sizes.keys, sizes.values])
        scale = torch.cat([part.sum().sqrt().clamp_min(1e-300).expand(len(part)) for part in sizes_of])
        return torch.diag(1 / scale)
    values, vectors = torch.linalg.eigh(statistics.fisher())
    root = values.clamp_min(max(float(values[-1]) * _FISHER_FLOOR, 1e-300)).sqrt()
    return vectors * root @ vectors.mT


def plans_for_ranks(spectra: Mapping[str, LayerSpectrum], rank: int, rope: int) -> dict[str, LatentPlan]:
    """Every layer with `rope` rotated elements and a latent of `rank`. FtcError where that is more than there is."""
    for name, spectrum in spectra.items():
        sizes = spectrum.statistics.sizes
        most = 2 * sizes.frequencies * sizes.groups
        if rope % 2 or not 0 <= rope <= most or (rope == 0) != (most == 0):
            raise FtcError(f"rope = {rope} is not possible in {name}; its keys have an even number of rotated elements up to {most}, and 2 are the least")
        if not 1 <= rank <= spectrum.rest_rank(rope // 2):
            raise FtcError(f"rank = {rank} is not possible in {name} with rope = {rope}; 1 to {spectrum.rest_rank(rope // 2)} are, the last losing nothing more")
    return {name: spectrum.plan(rope // 2, rank) for name, spectrum in spectra.items()}


def plans_for_budget(spectra: Mapping[str, LayerSpectrum], share: float) -> dict[str, LatentPlan]:
    """A cache of `share` times the elements that keys and values take, divided over layers, RoPE and latents so that least is lost."""
    total = sum(s.statistics.sizes.keys + s.statistics.sizes.values for s in spectra.values())
    budget = int(share * total + 1e-9)
    least = sum(3 if s.pairs.numel() else 1 for s in spectra.values())
    if budget < least:
        raise FtcError(
            f"a cache of {share:g} of {total} elements leaves {budget} for {len(spectra)} layers; each needs a RoPE pair and one element of latent, so "
            f"at least {least / total:.3g} is needed"
        )
    most = min((budget - len(spectra)) // 2, sum(s.pairs.numel() for s in spectra.values()))
    fewest = sum(bool(s.pairs.numel()) for s in spectra.values())
    steps = torch.linspace(fewest, most, _SHARES).round().int().unique().tolist()
    found = []
    for count in steps:
        found.append(_divided(spectra, budget, count))
        give_back()
    best = min(found, key=lambda each: each[0])
    return {name: spectra[name].plan(*best[1][name]) for name in spectra}


def _divided(spectra: Mapping[str, LayerSpectrum], budget: int, count: int) -> tuple[float, dict[str, tuple[int, int]]]:
    """What is lost with `count` pairs in all layers together, and the pairs and the rank of each layer."""
    pairs = _spread({name: s.pairs.flatten().sort(descending=True).values for name, s in spectra.items()}, count)
    latents = {name: s.latent_spectrum(pairs[name])[: s.rest_rank(pairs[name])] for name, s in spectra.items()}
    ranks = _spread(latents, budget - 2 * count)
    lost = sum(float(latents[name][ranks[name] :].sum()) for name in spectra)
    lost += sum(_PAIR_WEIGHT * float(s.pairs.flatten().sort(descending=True).values[pairs[name] :].sum()) for name, s in spectra.items())
    return lost, {name: (pairs[name], ranks[name]) for name in spectra}


def _spread(values: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """How many of each layer's values, largest first, are among the `count` largest of all; at least one of each layer that has any."""
    first = {name: v[:1] for name, v in values.items()}
    others = sorted(((float(x), name) for name, v in values.items() for x in v[1:]), reverse=True)
    found = {name: len(v) for name, v in first.items()}
    for _, name in others[: max(count - sum(found.values()), 0)]:
        found[name] += 1
    return found

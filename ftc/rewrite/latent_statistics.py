"""What a conversion to latent attention weighs its losses by, from calibration text: keys, values, and how much the model's answer hangs on them.

With g the gradient of -log p(y), y drawn from the model's own distribution, E[(g . e)^2] / 2 is to second order the KL divergence that an error e
causes (the Fisher information; Amari 1998). A RoPE pair of a key of group g is one complex number k_gf, a query's q_hf, and the score is

    a_hts = scale sum_f Re(q_hf(t) u_f(t) conj(k_gf(s) u_f(s))),   u_f(t) = exp(i t theta_f)

First pass, with w = (da)^2 the squared gradients of the scores, for head h and frequency f (sums over t, s):

    A = sum w |q|^2      B = sum w |q|^2 u(t) conj(u(s))      W0, W1: the same with |k|^2

so that c = W1 / W0 is the constant that replaces the rotation best, and (1 + |c|^2) A - 2 Re(conj(c) B) = sum w |q|^2 |u(t) conj(u(s)) - c|^2 what
a key without RoPE loses for each unit of |k|^2. Second pass: the second moment of the gradients of keys (through unrotated scores) and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.rewrite.attention_site import AttentionSite, attention_nodes, pair_places, read_site
from ftc.rewrite.calibration import Batches, Kept, pieces
from ftc.rewrite.observe import no_trained_parameters, observing

# Shapes: B batch, T queries, S keys, H heads, G groups, R heads of a group, F frequencies, K head, M value.


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of an attention: heads, groups, width K of queries and keys, width M of values, and how RoPE pairs its first `rotary` elements."""

    heads: int
    groups: int
    width: int
    value: int
    rotary: int
    interleaved: bool

    @classmethod
    def of(cls, site: AttentionSite) -> HeadSizes:
        return cls(site.num_heads, site.groups, site.key.width, site.value.width, site.rotary, site.interleaved)

    @property
    def frequencies(self) -> int:
        return self.rotary // 2

    @property
    def keys(self) -> int:
        return self.groups * self.width

    @property
    def values(self) -> int:
        return self.groups * self.value

    def pairs(self, x: Tensor) -> Tensor:
        """The RoPE pairs of [..., K] (or of tables [..., rotary]) as complex numbers [..., F]."""
        places, _ = pair_places(self.rotary, self.width, self.interleaved)
        real, imaginary = ([p[i] for p in places] for i in (0, 1))
        return torch.complex(x[..., real], x[..., imaginary])


@dataclass
class LayerStatistics:
    """Sums over calibration tokens, float64 or complex128. `second` and `fisher` [G (K + M)] squared, keys before values; see the module's docstring."""

    sizes: HeadSizes
    scale: float
    has_out: bool  # whether a product follows whose bias can take a constant
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = value

    @property
    def constants(self) -> Tensor:
        """c [H, F]."""
        if not self.sizes.frequencies:
            return torch.ones(self.sizes.heads, 0, dtype=torch.complex128)
        return self.sums["W1"] / self.sums["W0"].clamp_min(1e-300)

    def unrotated_weight(self) -> Tensor:
        """[G, F]: what each unit of |k|^2 loses without RoPE, a token."""
        c = self.constants
        lost = (1 + c.abs().square()) * self.sums["A"] - 2 * (c.conj() * self.sums["B"]).real
        return lost.clamp_min(0).unflatten(0, (self.sizes.groups, -1)).sum(1) * self.scale**2 / 2 / self.tokens

    def key_covariance(self) -> Tensor:
        """E[k_f k_f^H] [F, G, G], Hermitian."""
        return self.sums["keys"] / self.tokens

    def mean(self) -> Tensor:
        """Of keys and values, [G (K + M)]."""
        return self.sums["mean"] / self.tokens

    def covariance(self, centred: bool) -> Tensor:
        """Of keys and values."""
        second = self.sums["second"] / self.tokens
        return second - torch.outer(self.mean(), self.mean()) if centred else second

    def fisher(self) -> Tensor:
        """Second moment of the gradients of keys and values, a token."""
        return self.sums["fisher"] / self.tokens


def collect(
    program: nn.Module, regions: Mapping[str, HeadSizes], batches: Batches, seed: int = 0, tell: Callable[[str], None] = lambda text: None
) -> dict[str, LayerStatistics]:
    """The statistics of the one attention in each of `regions`; the program's parameters and modes are left as they are.

    A large model takes its text one sequence at a time. Within `ftc.rewrite.calibration.working_in(folder)` the sums so far are kept there now and then, and a
    repeated call with the same model and text goes on from them.
    """
    batches = pieces(program, batches)
    kept = Kept.of(program, regions, batches, seed)
    stored = kept.read()
    found = {n: LayerStatistics(regions[n], r["scale"], r["has_out"], r["tokens"], r["sums"]) for n, r in stored["layers"].items()}
    for number in range(stored["done"], 2 * len(batches)):
        second, at = divmod(number, len(batches))
        tell(f"calibrating: pass {second + 1} of 2, batch {at + 1} of {len(batches)}")
        for name, (site, values, gradients) in answer_gradients(program, regions, batches[at], seed + at).items():
            layer = found.setdefault(name, LayerStatistics(regions[name], site.scale, site.out is not None))
            (_second_pass if second else _first_pass)(layer, values, gradients)
        kept.write(number + 1, {n: {"scale": s.scale, "has_out": s.has_out, "tokens": s.tokens, "sums": s.sums} for n, s in found.items()})
    return found


def _nodes(site: AttentionSite) -> dict[str, str]:
    nodes = {"query": site.query.heads, "key": site.key.heads, "value": site.value.read, "out": site.attention}
    nodes |= {"query_read": site.query.read, "key_read": site.key.read}
    if site.key.rope is not None:
        nodes |= {"cos": site.key.rope.args[1], "sin": site.key.rope.args[2]}
    if site.mask is not None:
        nodes["mask"] = site.mask
    return {word: node.name for word, node in nodes.items()}


def answer_gradients(program: nn.Module, regions: Mapping[str, HeadSizes], batch: dict, seed: int) -> dict[str, tuple]:
    """For each region its site, the values of its nodes, and the gradients of the attention's result and the scores."""
    sites: dict[str, AttentionSite] = {}
    seen: dict[str, dict[str, Tensor]] = {}

    def names(region: str):
        def of(variant) -> list[str]:
            sites[region] = next(read_site(node) for node in attention_nodes(variant.captured.graph))
            return list(_nodes(sites[region]).values())

        return of

    def watch(region: str, values: list[Tensor]) -> None:
        seen[region] = dict(zip(_nodes(sites[region]), values, strict=True))

    with no_trained_parameters(program), torch.enable_grad(), _embedding_trained(program):
        with observing(program, {name: names(name) for name in regions}, watch):
            logits = logits_of(program(**batch)).float()
        labels = _drawn(logits.detach(), seed)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        outs = torch.autograd.grad(loss, [seen[name]["out"] for name in regions])
    found = {}
    with torch.no_grad():
        for name, gradient in zip(regions, outs, strict=True):
            values = {word: value.detach() for word, value in seen.pop(name).items()}
            found[name] = sites[name], values, _through_softmax(sites[name], values, gradient)
    return found


class _embedding_trained:
    """One parameter takes gradients, so that everything after it is part of autograd's graph; nothing is added to its `grad`."""

    def __init__(self, program: nn.Module):
        self.parameter = next(p for p in program.parameters() if p.is_floating_point() and p.dim() == 2)

    def __enter__(self):
        self.parameter.requires_grad_(True)

    def __exit__(self, *exc):
        self.parameter.requires_grad_(False)


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """One token for each position from the model's own distribution [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device).clamp_min(1e-20)
    return (logits - (-noise.log()).log()).argmax(-1)


def _through_softmax(site: AttentionSite, values: dict[str, Tensor], d_out: Tensor) -> dict[str, Tensor]:
    """Gradients of the scores [B, G, R, T, S] (before `scale`) and of the values [B, G, S, M]; the softmax is computed anew."""
    q, k, v, out = (values[word].float() for word in ("query_read", "key_read", "value", "out"))
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    d_out, out = (x.float().reshape(batch, groups, heads // groups, length, -1) for x in (d_out, out))
    scores = torch.einsum("bgrtk,bgsk->bgrts", q.reshape(batch, groups, heads // groups, length, -1), k) * site.scale
    if site.is_causal:
        scores = scores.masked_fill(~torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(), -math.inf)
    if site.mask is not None:
        mask = values["mask"].expand(batch, heads if values["mask"].dim() > 3 and values["mask"].shape[1] > 1 else 1, length, k.shape[2])
        mask = mask.reshape(batch, -1, 1, length, k.shape[2]) if mask.shape[1] == 1 else mask.reshape(scores.shape)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1)
    d_value = torch.einsum("bgrts,bgrtm->bgsm", p, d_out)
    d_scores = p * (torch.einsum("bgrtm,bgsm->bgrts", d_out, v) - (d_out * out).sum(-1, keepdim=True))
    return {"scores": d_scores, "value": d_value}


def _first_pass(layer: LayerStatistics, values: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    sizes = layer.sizes
    key, value = values["key"].double(), values["value"].double()
    rows = torch.cat([key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], -1).flatten(0, 1)
    layer.tokens += len(rows)
    layer.add(second=rows.mT @ rows, mean=rows.sum(0))
    if not sizes.frequencies:
        return
    k = sizes.pairs(key)
    layer.add(keys=torch.einsum("bgsf,bhsf->fgh", k, k.conj()))
    u = complex_tables(sizes, values)
    w = gradients["scores"].double().square()
    heads = w.flatten(1, 2).to(u.dtype)  # [B, H, T, S]
    q2 = sizes.pairs(values["query"].double()).abs().square()  # [B, H, T, F]
    k2 = k.abs().square().repeat_interleave(heads.shape[1] // sizes.groups, 1)
    left, right = q2 * u[:, None], u.conj()[:, None]
    layer.add(
        A=(q2 * w.flatten(1, 2).sum(-1, keepdim=True)).sum((0, 2)),
        B=(left * (heads @ right.expand(heads.shape[0], heads.shape[1], -1, -1))).sum((0, 2)),
        W0=(q2 * (w.flatten(1, 2) @ k2)).sum((0, 2)),
        W1=(left * (heads @ (k2 * right))).sum((0, 2)),
    )


def complex_tables(sizes: HeadSizes, values: Mapping[str, Tensor]) -> Tensor:
    """exp(i t theta_f) of the tables of cos and sin, [1 or B, T, F]. FtcError where a pair is not turned as one complex number."""
    table = torch.complex(values["cos"].double(), values["sin"].double())
    theirs, _ = pair_places(sizes.rotary, sizes.width, sizes.interleaved)
    u = table[..., [p[0] for p in theirs]]
    if not torch.equal(u, table[..., [p[1] for p in theirs]]):
        raise FtcError("the tables of cos and sin differ within a pair, so RoPE turns no complex numbers here, and heads cannot be mixed")
    return u.reshape(-1, u.shape[-2], u.shape[-1]) if u.dim() > 2 else u[None]


def _second_pass(layer: LayerStatistics, values: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    sizes = layer.sizes
    query = values["query"].double().clone()
    if sizes.frequencies:
        write_pairs(sizes, query, sizes.pairs(query) * layer.constants[:, None])
    w = gradients["scores"].double()
    d_key = torch.einsum("bgrts,bgrtk->bgsk", w, query.unflatten(1, (sizes.groups, -1))) * layer.scale
    rows = torch.cat([d_key.transpose(1, 2).flatten(2), gradients["value"].double().transpose(1, 2).flatten(2)], -1).flatten(0, 1)
    layer.add(fisher=rows.mT @ rows)


def write_pairs(sizes: HeadSizes, x: Tensor, pairs: Tensor) -> None:
    """Write complex pairs [..., F] into their places of x [..., K]."""
    places, _ = pair_places(sizes.rotary, sizes.width, sizes.interleaved)
    x[..., [p[0] for p in places]] = pairs.real
    x[..., [p[1] for p in places]] = pairs.imag

"""What each attention of a cached program keeps of a token, and what it would keep in other forms: read off the graphs.

    mha       every query head its own key and value          H (K + M); of a latent attention 2 H M, as DeepSeek-V2 (2024, table 1) counts
    model     as insert-kv-cache stores it                    G (K + M), or L + E of a latent attention
    fp8       e4m3 with float32 scales                        G (K + M + 8) bytes, or L + 4 ceil(L / 128) + 2 E
    int8      int8 with float32 scales                        G (K + M + 8) bytes; latents have no such form
    latent    as gqa-to-mla with `rank` and `rope` makes it   rank + rope; latent-fp8: in the bytes of fp8

Legend: H heads, G key-value heads, K key width, M value width, L latent, E rotated part of latent attention, N its other part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ftc.cache.flat import flatten
from ftc.dialect import fp8_latent
from ftc.errors import FtcError
from ftc.rewrite.attention_site import AttentionSite, attention_nodes, read_site
from ftc.rewrite.continuation import STATE
from ftc.rewrite.edit import linear_operands
from ftc.rewrite.lockstep import arguments
from ftc.rewrite.outcome import Declined

KEYS_VALUES, LATENT = torch.ops.ftc.paged_attention.default, torch.ops.ftc.paged_latent_attention.default
FORMS = ("mha", "model", "fp8", "int8", "latent", "latent-fp8")
_SCALE_BYTES = 4  # float32, one a token and head for keys and one for values


@dataclass(frozen=True)
class LayerCache:
    """One attention. Sizes in elements, `stored_bytes` what the program's own cache takes for a token; `latent` 0 where keys and values are cached.

    `site` says what gqa-to-mla would start from, or, as text, why it would not.
    """

    region: str
    heads: int
    groups: int
    key: int
    value: int
    latent: int
    rope: int
    window: int | None
    dtype: torch.dtype
    stored_bytes: int
    site: ConvertibleSite | str

    @property
    def kind(self) -> str:
        """MLA, MHA, GQA or MQA, and its window."""
        shared = "MHA" if self.groups == self.heads else "MQA" if self.groups == 1 else "GQA"
        return ("MLA" if self.latent else shared) + ("" if self.window is None else f", window {self.window}")

    def bytes_per_token(self, form: str, rank: int | None = None, rope: int | None = None) -> int | None:
        """Bytes that a token takes in a form (see the module's docstring); None where the attention has no such form."""
        size, heads = self.dtype.itemsize, self.groups * (self.key + self.value)
        if form == "mha":
            return size * self.heads * (2 * self.value if self.latent else self.key + self.value)
        if form == "model":
            return size * (self.latent + self.rope if self.latent else heads)
        if form in ("fp8", "int8"):
            if self.latent:
                return fp8_latent.row_bytes(self.latent, self.rope) if form == "fp8" else None
            return heads + 2 * self.groups * _SCALE_BYTES
        if rank is None or rope is None or isinstance(self.site, str):
            return None
        return size * (rank + rope) if form == "latent" else fp8_latent.row_bytes(rank, rope)


@dataclass(frozen=True)
class ConvertibleSite:
    """What gqa-to-mla needs to know of an attention to say what it would make: `rotary` elements of a head turn, `inputs` is D."""

    heads: int
    groups: int
    key: int
    value: int
    rotary: int
    inputs: int
    outputs: int
    has_bias: tuple[bool, bool, bool]  # query, keys and values, output
    has_out: bool

    @classmethod
    def of(cls, site: AttentionSite) -> ConvertibleSite:
        out_bias = site.out is not None and linear_operands(site.out)[2] is not None
        return cls(
            site.num_heads, site.groups, site.key.width, site.value.width, site.rotary,
            int(site.key.weight.meta["val"].shape[1]), 0 if site.out is None else int(linear_operands(site.out)[1].meta["val"].shape[0]),
            (site.query.bias is not None, site.key.bias is not None, out_bias), site.out is not None,
        )  # fmt: skip

    def check(self, region: str, rank: int, rope: int) -> None:
        """FtcError for sizes that the attention cannot have."""
        most = self.rotary * self.groups
        if rope % 2 or not 0 <= rope <= most or (rope == 0) != (most == 0):
            raise FtcError(f"--rope {rope} is not possible in {region}; its keys have an even number of rotated elements up to {most}, and 2 are the least")
        highest = self.groups * (self.key + self.value) - rope
        if not 1 <= rank <= highest:
            raise FtcError(f"--rank {rank} is not possible in {region} with --rope {rope}; use 1 to {highest}")

    def parameters_added(self, rank: int, rope: int) -> int:
        """Parameters that gqa-to-mla with `rank` and `rope` adds (negative: takes away)."""
        all_kept = rope == self.rotary * self.groups and self.rotary == self.key
        nope = 0 if all_kept else self.key
        query = self.heads * (nope + rope - self.key)
        down = rank + rope - self.groups * (self.key + self.value)
        biases = (query if self.has_bias[0] else 0) + (down if self.has_bias[1] else 0)
        shift = self.outputs if self.has_out and not self.has_bias[2] else 0  # the mean that the latent leaves out
        return self.inputs * (query + down) + self.groups * (nope + self.value) * rank + biases + shift


def layers_of(program, before=None) -> list[LayerCache]:
    """The attentions of a program rewritten by insert-kv-cache, in order; `before` is the raised program that it was made from, where there is one."""
    ids = torch.ones(1, 2, dtype=torch.int64)
    shell, _ = program.code.find(program, (), program.bind((), {"input_ids": ids}))
    by_region: dict[str, list[fx.Node]] = {}
    for node in flatten(program, shell).graph.nodes:  # the graphs that run: others may be there, for texts within a window
        if node.target in (KEYS_VALUES, LATENT):
            cache = arguments(node)["cache" if node.target is LATENT else "key_cache"]
            by_region.setdefault(str(cache.target).rpartition(STATE)[0].rstrip("."), []).append(node)
    found = []
    for name, nodes in by_region.items():
        sites = _sites(before, name, len(nodes))
        found += [_layer(name or program.ftc_name, node, site) for node, site in zip(nodes, sites, strict=True)]
    return found


def _layer(region: str, node: fx.Node, site) -> LayerCache:
    bound = arguments(node)
    names = ("cache",) if node.target is LATENT else ("key_cache", "value_cache", "key_scale", "value_scale")
    caches = [bound[name].meta["val"] for name in names if isinstance(bound.get(name), fx.Node)]
    stored = sum(cache.itemsize * int(torch.Size(map(int, cache.shape[2:])).numel()) for cache in caches)
    if node.target is LATENT:
        nope, pe, latent, kv_b = (bound[name].meta["val"] for name in ("q_nope", "q_pe", "latent", "kv_b"))
        groups, width, rope = int(bound["groups"]), int(nope.shape[3]), int(pe.shape[3])
        sizes = int(pe.shape[1]), groups, width + rope, int(kv_b.shape[0]) // groups - width, int(latent.shape[-1]), rope
        return LayerCache(region, *sizes, None, latent.dtype, stored, "it is latent already")
    query, key, value = (bound[name].meta["val"] for name in ("query", "key", "value"))
    sizes = int(query.shape[1]), int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), 0, 0
    window = bound.get("window")
    if window is not None:
        site = "attention over a window is not cached as latents"
    return LayerCache(region, *sizes, None if window is None else int(window), key.dtype, stored, site)


def _sites(before, region: str, count: int) -> list[ConvertibleSite | str]:
    if before is None:
        return ["the program has a cache already; name the model that it was made from"] * count
    earlier = before._regions.get(region, before).code
    graphs = [variant.captured.graph for variant in earlier.all_variants()]
    nodes = next((n for n in map(attention_nodes, graphs) if len(n) == count), [])
    found: list[ConvertibleSite | str] = []
    for node in nodes:
        try:
            found.append(ConvertibleSite.of(read_site(node)))
        except Declined as declined:
            found.append(str(declined))
    return found or ["its attention is not known"] * count

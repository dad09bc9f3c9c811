"""raise-mla: attention whose keys and values are expanded from one latent becomes `ftc.latent_attention`.

    k = [W_UK c ; r] per head,  v = W_UV c,  r shared by all heads      ->      latent_attention(q_nope, q_pe, c, r, [W_UK; W_UV])

Read off the flow of data alone: where each element of keys and values comes from (`ftc.rewrite.movement`). Part of every key and all values are outputs
of one product with a parameter, in the order group by group [W_UK; W_UV], of the token that they belong to; the other part of the keys is the same
for all heads. DeepSeek-V2 report (2024), equations 9 to 19.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::latent_attention
from ftc.rewrite.lockstep import arguments
from ftc.rewrite.movement import Cone, cone, index_maps, realise
from ftc.rewrite.outcome import Declined, Match, location
from ftc.rewrite.probe import aten
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import Analysis, Builder, Trial, replace

SDPA = aten.scaled_dot_product_attention.default
LATENT = torch.ops.ftc.latent_attention.default


@dataclass(frozen=True)
class RaiseMla(RaisePass):
    """The pass. Runs after raise-attention and raise-rope."""

    name: ClassVar[str] = "raise-mla"
    summary: ClassVar[str] = "attention with keys and values expanded from a latent becomes ftc.latent_attention"
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention")
    canonical: ClassVar[frozenset] = frozenset({LATENT})

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        return node.target is SDPA

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> Match | None:
        """The latent attention around a fused call; None where its values come from no product that its keys come from too."""
        bound = arguments(anchor)
        query, key, value = bound["query"], bound["key"], bound["value"]
        above_key, above_value = cone(analysis, key, casts=False), cone(analysis, value, casts=False)
        up = [root for root in above_key.roots if root in above_value.roots and root.target is aten.linear.default]
        if len(up) != 1 or len(_read(analysis, above_value)) != 1 or len(_read(analysis, above_key)) < 2:
            return None  # no part of the keys beside what they share with the values: grouped-query attention
        return _Site(analysis, anchor, up[0], above_key, above_value, cone(analysis, query, casts=False)).rewrite(bound)


def _read(analysis: Analysis, above: Cone) -> list[fx.Node]:
    """The roots of which an element is left in the end: memory that is written over holds none."""
    maps = index_maps(analysis, above, analysis.trials[0])
    used = maps[above.node].unique()
    return [root for root in above.roots if torch.isin(used, maps[root]).any()]


def _by_tokens(elements: Tensor) -> Tensor:
    return elements.reshape(elements.shape[0], -1, elements.shape[-1])


class _Site:
    """One attention over a latent: which columns of a key come from the product `up`, and which are shared."""

    def __init__(self, analysis: Analysis, anchor: fx.Node, up: fx.Node, key: Cone, value: Cone, query: Cone):
        self.analysis, self.anchor, self.up = analysis, anchor, up
        self.key, self.value, self.query = key, value, query
        self.build = Builder(analysis, anchor)
        self.weight = up.args[1]
        if len([a for a in up.args if a is not None]) > 2 or self.weight.op != "get_attr":
            raise Declined("what expands the latent has a bias or is no parameter", up)
        self.columns = self._columns()

    def _columns(self) -> Tensor:
        """Whether each column of a key comes from the product; Declined where keys and values are not [W_UK; W_UV] of their token, group by group."""
        found = None
        for trial in self.analysis.trials[::2]:
            keys, values = self._sources(self.key, trial), self._sources(self.value, trial)
            up = keys >= 0
            columns = up[0, 0, 0]
            if not bool((up == columns).all()):
                raise Declined("some heads or tokens have another share of the product in their keys than others", self.anchor)
            if found is not None and not torch.equal(found, columns):
                raise Declined("which part of a key comes from the product hangs on the sizes", self.anchor)
            found = columns
            batch, groups, tokens, _ = keys.shape
            nope, width = int(columns.sum()), values.shape[-1]
            rows = torch.arange(groups * (nope + width)).view(groups, nope + width)
            token = torch.arange(batch * tokens).view(batch, 1, tokens, 1) * rows.numel()
            if self.weight.meta["val"].shape[0] != rows.numel():
                raise Declined(f"the product has {self.weight.meta['val'].shape[0]} outputs, keys and values hold {rows.numel()}", self.up)
            expected = token + rows[None, :, None]
            if not (torch.equal(keys[..., columns], expected[..., :nope]) and torch.equal(values, expected[..., nope:])):
                raise Declined("its outputs do not stand group by group as the key's part and the value", self.up)
            shared = index_maps(self.analysis, self.key, trial)[self.key.node][..., ~columns]
            if not bool((shared == shared[:, :1]).all()):
                raise Declined("the part of the keys that is not expanded differs from head to head", self.anchor)
        return found

    def _sources(self, above: Cone, trial: Trial) -> Tensor:
        """For every place of a cone's end the number of the product's output that is there, from 0; -1 where it is something else."""
        maps = index_maps(self.analysis, above, trial)
        first, count = int(maps[self.up].flatten()[0]), maps[self.up].numel()
        end = maps[above.node] - first
        return torch.where((end >= 0) & (end < count), end, -1)

    def rewrite(self, bound: dict) -> Match:
        build, up, columns = self.build, self.columns, ~self.columns
        key = self.key.node
        batch, tokens, width = build.size(key, 0), build.size(key, 2), int(columns.sum())
        if not width:
            raise Declined("no part of the keys is shared by the heads", self.anchor)
        latent_width = int(self.weight.meta["val"].shape[1])
        source = cone(self.analysis, self.up.args[0], casts=False)
        # Its first dim is the batch whatever stands between: the outputs of the product count tokens sequence by sequence.
        latent = self._realised(lambda maps: _by_tokens(maps[source.node]), source, [batch, tokens, latent_width], "the latent")
        k_pe = self._realised(lambda maps: maps[key][:, 0][..., columns], self.key, [batch, tokens, width], "the keys' shared part")
        q_nope, q_pe = (self._query(picked) for picked in (up, columns))
        given = (q_nope, q_pe, latent, k_pe, self.weight, bound.get("attn_mask"), bound.get("dropout_p", 0.0), bound.get("is_causal", False))
        groups = int(key.meta["val"].shape[1])
        scale = bound.get("scale")
        scale = float(self.query.node.meta["val"].shape[-1]) ** -0.5 if scale is None else scale
        new = build(LATENT, *given, groups=groups, scale=scale)
        replace(self.analysis, self.anchor, new)
        detail = {"latent": latent_width, "rope": width, "nope": int(up.sum()), "groups": groups}
        return Match("latent attention", (new.name,), detail, location(self.anchor))

    def _query(self, columns: Tensor) -> fx.Node:
        query = self.query.node
        moved = realise(self.build, lambda maps: maps[query][..., columns], self.query)
        if moved is not None:
            return moved
        picked = columns.nonzero().flatten().tolist()
        if picked != list(range(picked[0], picked[-1] + 1)):
            raise Declined("the query's columns for one part of the keys do not stand together", self.anchor)
        return self.build(aten.slice.Tensor, query, 3, picked[0], picked[-1] + 1)

    def _realised(self, wanted, above: Cone, shape: list, what: str) -> fx.Node:
        moved = realise(self.build, wanted, above, shape)
        if moved is None:
            raise Declined(f"{what} is nowhere [batch, tokens, width]", above.node)
        return moved

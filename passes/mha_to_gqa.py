"""mha-to-gqa: key-value heads are merged, several into one that more query heads share (Ainslie et al., 2023, who take the mean).

    softmax(q_h k_g) v_g W_h   ->   softmax((B_g^T q_h) k') v' (W_h B'_g)^T,       k_g ~ B_g k',  v_g ~ B'_g v'

Heads of a trained model say the same in bases of their own, so that a mean cancels what they share; here they are aligned first. A pair that RoPE turns is one
complex number, and what may stand between a key and RoPE is one complex number for each frequency; values may be mixed by any map. Both are chosen from
calibration text so that the model's answer loses least (`ftc.rewrite.head_merge`), and so is which heads are merged (`ftc.rewrite.head_plan`). The loss is
measured as KL(original || merged) on text apart. What is proved is the construction: as many heads as before in random bases and a random order change
nothing, and merged graphs compute what the original does where its heads are B_g k' and B'_g v'.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::rope
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.attention_conversion import (
    Planned,
    check_not_latent,
    erase_unread,
    regions_with_sites,
    tidied,
    with_tables,
)
from ftc.rewrite.attention_site import ROPE, SDPA, AttentionSite, Projection, attention_nodes, read_site
from ftc.rewrite.calibration import as_batches, held_out, num_tokens
from ftc.rewrite.certificate import compared
from ftc.rewrite.edit import Editor, linear_operands
from ftc.rewrite.graph_json import graph_hash
from ftc.rewrite.head_plan import HeadPlan, make_plan, pooled_plan, trial_plan
from ftc.rewrite.head_statistics import collect_heads
from ftc.rewrite.latent_statistics import HeadSizes
from ftc.rewrite.lens_heads import HeadMap
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass, check_max_kl

aten = torch.ops.aten
MOST_BYTES = 1 << 30  # of statistics, where the model is small


@dataclass(frozen=True)
class MhaToGqa(Pass):
    """The pass; see the module's docstring."""

    groups: int = field(metadata={"help": "key-value heads that are left in every layer; must divide those that there are"})
    choose: Literal["similarity", "neighbours"] = field(default="similarity", metadata={"help": "merge heads that lose least together, or those side by side"})
    align: bool = field(default=True, metadata={"help": "align heads before they are merged; without it their plain mean is taken"})
    max_kl: float | None = field(default=None, metadata={"help": "the most that may be lost, nats a token; past it the model stays as it was"})
    seed: int = field(default=0, metadata={"help": "of the tokens drawn for the gradients"})

    name: ClassVar[str] = "mha-to-gqa"
    summary: ClassVar[str] = "key-value heads aligned and merged, so that more query heads share each: a smaller cache"
    contract: ClassVar[str] = "lossy"
    inverse: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention")

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"groups = {self.groups} must be at least 1")
        check_max_kl(self.max_kl)

    def apply(self, graph: fx.Graph) -> Outcome:
        """Without calibration: the plain means of neighbours."""
        return convert(graph, lambda site: pooled_plan(HeadSizes.of(site), self.groups), self.groups)

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        return prove(before, after, earlier)

    def calibrate(self, program, calibration, tell=lambda text: None, check=True) -> dict[str, Planned] | None:
        """A pass for each region that has more heads, with its plan; None where none has. FtcError for groups that do not divide, and too little text."""
        check_not_latent(program, self.name)
        regions = regions_with_sites(program, self.name)
        for name, sizes in regions.items():
            if sizes.groups % self.groups:
                valid = ", ".join(str(n) for n in range(1, sizes.groups + 1) if sizes.groups % n == 0)
                raise FtcError(f"pass {self.name}: groups = {self.groups} does not divide the {sizes.groups} key-value heads of {name}; {valid} do")
        regions = {name: sizes for name, sizes in regions.items() if sizes.groups > self.groups}
        if not regions:
            return None
        batches, _ = held_out(as_batches(calibration, what=f"pass {self.name}"))
        needed = 4 * max(sizes.groups // self.groups * max(sizes.width, sizes.value) for sizes in regions.values())
        if num_tokens(batches) < needed:
            raise FtcError(
                f"pass {self.name}: {num_tokens(batches)} tokens of calibration text are too few to align heads by; give at least {needed}, and a third "
                "more for what is measured apart"
            )
        plans = {}
        for part in _parts(program, regions):
            for name, statistics in collect_heads(program, part, batches, self.seed, tell).items():
                tell(f"aligning heads: layer {len(plans) + 1} of {len(regions)}")
                plan = make_plan(statistics, self.groups, self.align, self.choose)
                merge = functools.partial(convert, plan_of=lambda site, p=plan: p, groups=self.groups)
                plans[name] = Planned(self, plan, merge, prove)
        return plans

    def new_config(self, config):
        """A copy of the model's configuration with the new number of key-value heads, where it has one."""
        if not hasattr(config, "num_key_value_heads"):
            return config
        if dataclasses.is_dataclass(config):
            return dataclasses.replace(config, num_key_value_heads=self.groups)
        config = copy.deepcopy(config)
        config.num_key_value_heads = self.groups
        return config


def _parts(program, regions: dict[str, HeadSizes]) -> list[dict[str, HeadSizes]]:
    """The regions in parts whose statistics fit into a quarter of the model's own bytes, or into 1 GiB."""
    most = max(sum(p.numel() * p.element_size() for p in program.parameters()) // 4, MOST_BYTES)
    parts, taken = [], most
    for name, sizes in regions.items():
        size = 2 * 8 * (sizes.keys**2 + sizes.values**2)
        if taken + size > most:
            parts.append({})
            taken = 0
        parts[-1][name] = sizes
        taken += size
    return parts


def convert(graph: fx.Graph, plan_of, groups: int, same: bool = False) -> Outcome:
    """Merge the heads of every site of a graph by the plan that `plan_of(site)` gives, in place; with `same` also where their number stays."""
    outcome = Outcome()
    for node in attention_nodes(graph):
        try:
            site = read_site(node)
            if site.groups == groups and not same:
                outcome.already += 1
                continue
            _check(site, groups)
        except Declined as declined:
            outcome.misses.append(declined.miss(node))
            continue
        place, plan = location(node), plan_of(site)
        made, lenses = _convert_site(graph, site, plan)
        outcome.lenses += lenses
        detail = {"heads": site.num_heads, "key_value_heads": f"{groups} of {site.groups}"}
        outcome.matches.append(Match("merged heads", (made.name,), detail, place))
    return outcome


def _check(site: AttentionSite, groups: int) -> None:
    if site.groups % groups:
        raise Declined(f"{groups} does not divide its {site.groups} key-value heads", site.attention)
    if site.out is None:
        raise Declined("no product of its own follows the attention, into which the maps of the values could go", site.attention)


def _convert_site(graph: fx.Graph, site: AttentionSite, plan: HeadPlan) -> tuple[fx.Node, list[HeadMap]]:
    lenses = _reading_lenses(site, plan)
    made = {}
    for word, projection, into, back in (
        ("key", site.key, plan.key_into, plan.key_back),
        ("value", site.value, plan.value_into, plan.value_back),
    ):
        made[word] = _merged(graph, site, projection, plan, into, back, lenses)
    edit = Editor(graph, site.attention)
    rest = list(site.attention.args[3:])
    kwargs = {k: v for k, v in site.attention.kwargs.items() if k not in ("query", "key", "value", "enable_gqa")}
    shared = {"enable_gqa": True} if plan.groups < site.num_heads else {}
    attention = edit(SDPA, site.query.read, made["key"], made["value"], *rest[:3], **kwargs, **shared)
    site.attention.replace_all_uses_with(attention)
    erase_unread(graph, site.attention)
    return attention, lenses


def _reading_lenses(site: AttentionSite, plan: HeadPlan) -> list[HeadMap]:
    """Lenses of what reads keys and values: queries, and the columns of the product after the attention. No node changes."""
    query, order = plan.reading(plan.key_back), plan.query_order
    found = [HeadMap(str(n.target), str(n.target), order, query) for n in (site.query.weight, site.query.bias) if n is not None]
    out = str(linear_operands(site.out)[1].target)
    return [*found, HeadMap(out, out, order, plan.reading(plan.value_back), dim=1)]


def _merged(graph: fx.Graph, site: AttentionSite, projection: Projection, plan: HeadPlan, into: Tensor, back: Tensor, lenses: list) -> fx.Node:
    """The new keys or values [B, N, T, W] as attention reads them; adds the lenses of their parameters."""
    edit = Editor(graph, projection.linear)
    operands = [linear_operands(projection.linear)[0]]
    for node in (projection.weight, projection.bias):
        if node is not None:
            lenses.append(HeadMap(str(node.target), str(node.target), plan.order, into, back))
            operands.append(edit.attribute(str(node.target), [len(into) * into.shape[1], *node.meta["val"].shape[1:]], node))
    rows = edit(aten.linear.default, *operands)
    edit = Editor(graph, site.attention)
    heads = edit(aten.transpose.int, edit(aten.unflatten.int, rows, -1, [plan.groups, into.shape[1]]), 1, 2)
    return heads if projection.rope is None else edit(ROPE, heads, *projection.rope.args[1:])


# ------------------------------------------------------------------------------------------------------------------ proof


def prove(before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
    """Trials of the construction with random maps and a random order of heads: as many heads as before, and merged ones against the original with
    heads that are had from them; those of `earlier` once more where they are given. Also that `after` is what the construction makes of `before`.
    Raises FtcFailure where it is not."""
    from ftc.rewrite.pipeline import copy_graph

    groups = _groups_as_in(before, after)
    start = with_tables(copy_graph(before))
    same, merged = copy_graph(start), copy_graph(start)
    lenses = {False: convert_each(same, {name: count for name, (count, _) in groups.items()}).lenses, True: _expanding(start, groups)}
    convert_each(merged, {name: count for name, (_, count) in groups.items()})
    trials = []
    for merges, pair in ((False, (start, same)), (True, (merged, start))):
        recorded = None if earlier is None else [t for t in earlier if t["merges"] == merges]
        trials += [trial | {"merges": merges} for trial in compared(*pair, lenses[merges], recorded)]
    again = copy_graph(before)
    convert_each(again, {name: count for name, (_, count) in groups.items()})
    if graph_hash(tidied(again)) != graph_hash(after):
        raise FtcFailure("pass mha-to-gqa: the rewritten graph is not what the construction makes of the graph before")
    return trials


def convert_each(graph: fx.Graph, groups: dict[str, int]) -> Outcome:
    """Merge by random maps, in place: each attention that `groups` names, into so many heads."""
    outcome = Outcome()
    for name, count in groups.items():
        site = read_site(next(node for node in attention_nodes(graph) if node.name == name))
        outcome.lenses += _convert_site(graph, site, trial_plan(HeadSizes.of(site), count, 7))[1]
    return outcome


def _groups_as_in(before: fx.Graph, after: fx.Graph) -> dict[str, tuple[int, int]]:
    """Key-value heads before and after, by the names of the attentions of `before` that were merged."""
    nodes = [(b, a) for b, a in zip(attention_nodes(before), attention_nodes(after), strict=True) if b.target is SDPA]
    counts = {b.name: tuple(int(n.args[1].meta["val"].shape[1]) for n in (b, a)) for b, a in nodes}
    return {name: count for name, count in counts.items() if count[0] != count[1]}


def _expanding(graph: fx.Graph, groups: dict[str, tuple[int, int]]) -> list[HeadMap]:
    """From the parameters of merged heads to those of the original that compute the same: k_g = B_g k', q_h = B_g^-T q'_h, and heads in the old order."""
    lenses = []
    for node in [n for n in attention_nodes(graph) if n.name in groups]:
        site, count = read_site(node), groups[node.name][1]
        plan = trial_plan(HeadSizes.of(site), count, 7)
        out = linear_operands(site.out)[1]
        heads, old = range(site.num_heads), torch.tensor(plan.order).argsort().tolist()
        readers = torch.tensor(plan.query_order).argsort().tolist()
        parts = [(n, plan.key_back, range(count), old, 0) for n in (site.key.weight, site.key.bias)]
        parts += [(n, plan.value_back, range(count), old, 0) for n in (site.value.weight, site.value.bias)]
        parts += [(n, torch.linalg.inv(plan.reading(plan.key_back)), heads, readers, 0) for n in (site.query.weight, site.query.bias)]
        parts.append((out, torch.linalg.inv(plan.reading(plan.value_back)), heads, readers, 1))
        for parameter, matrix, order, back, dim in parts:
            if parameter is not None:
                name, width = str(parameter.target), matrix.shape[1] * len(matrix) // len(back)
                lenses.append(HeadMap(name, name, tuple(order), matrix, dim=dim))
                lenses.append(HeadMap(name, name, tuple(back), torch.eye(width, dtype=torch.float64).repeat(len(back), 1, 1), dim=dim))
    return lenses

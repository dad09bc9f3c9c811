"""gqa-to-mla: attention with grouped or separate key-value heads becomes latent attention with decoupled RoPE (DeepSeek-V2 report, 2024, section 2.1).

    softmax(q_h k_g)  v_g   ->   softmax([c q_h; q'_h] [W_UK,g a; k']) W_UV,g a,     a the latent, k' one rotated key part for all heads

With nothing left out (no options) this is exact. With ranks or a cache budget it is lossy: the key components that keep RoPE, the latent and what the queries
become are planned from calibration text (`ftc.rewrite.latent_budget`), layer by layer, and the loss is measured as KL(original || converted) on text apart.
What is proved about a lossy conversion is its construction: with the same edits and matrices that lose nothing, the graphs are equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::latent_attention
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.attention_conversion import (
    Planned,
    check_not_latent,
    ending_at,
    erase_unread,
    hash_beside,
    regions_with_sites,
    tidied,
    with_tables,
)
from ftc.rewrite.attention_site import (
    LATENT,
    ROPE,
    AttentionSite,
    attention_nodes,
    output_product,
    pair_places,
    read_site,
)
from ftc.rewrite.calibration import as_batches, held_out, num_tokens, pieces
from ftc.rewrite.certificate import compared
from ftc.rewrite.edit import Editor, sibling_name
from ftc.rewrite.graph_json import graph_hash
from ftc.rewrite.latent_budget import LayerSpectrum, plans_for_budget, plans_for_ranks
from ftc.rewrite.latent_plan import LatentPlan, full_plan, trial_plan
from ftc.rewrite.latent_statistics import HeadSizes, collect
from ftc.rewrite.lens_heads import HeadMap
from ftc.rewrite.lens_latent import Shift, ToLatent
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass, check_max_kl
from ftc.rewrite.spill import give_back

aten = torch.ops.aten


@dataclass(frozen=True)
class GqaToMla(Pass):
    """The pass; see the module's docstring. `rank` and `rope` go together; `cache` is instead of them."""

    rank: int | None = field(default=None, metadata={"help": "elements of the latent, in every layer"})
    rope: int | None = field(default=None, metadata={"help": "elements of the shared key part with RoPE, in every layer"})
    cache: float | None = field(default=None, metadata={"help": "share of the cache elements of keys and values to keep, divided over layers by what is lost"})
    rotation: Literal["complex", "real", "none"] = field(default="complex", metadata={"help": "how heads are mixed before a component is chosen"})
    weigh: Literal["answer", "size"] = field(default="answer", metadata={"help": "losses weighed by the model's answer, or only balanced by size (TransMLA)"})
    max_kl: float | None = field(default=None, metadata={"help": "the most that may be lost, nats a token; past it the model stays as it was"})
    seed: int = field(default=0, metadata={"help": "of the tokens drawn for the gradients"})

    name: ClassVar[str] = "gqa-to-mla"
    summary: ClassVar[str] = "grouped-query attention becomes latent attention: exact at full rank, a smaller cache below it"
    contract: ClassVar[str] = "lossy"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention")

    def __post_init__(self):
        if (self.rank is None) != (self.rope is None):
            raise ValueError("rank and rope go together: the elements of the latent and of the key part with RoPE")
        if self.rank is not None and self.cache is not None:
            raise ValueError("rank and rope, or cache, not both")
        if self.cache is not None and not 0 < self.cache <= 1:
            raise ValueError(f"cache = {self.cache} is not a share of the cache; use more than 0 and at most 1")
        if self.weigh == "size" and self.cache is not None:
            raise ValueError('weigh = "size" knows no losses to divide a cache by; give rank and rope')
        check_max_kl(self.max_kl)

    @property
    def is_lossy(self) -> bool:
        """Whether anything is left out."""
        return self.rank is not None or self.cache is not None

    def kept_contract(self) -> str:
        return "lossy" if self.is_lossy else "exact"

    def apply(self, graph: fx.Graph) -> Outcome:
        return convert(graph, lambda site: full_plan(HeadSizes.of(site)))

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        return prove(before, after, earlier)

    def calibrate(self, program, calibration, tell=lambda text: None, check=True) -> dict[str, Planned] | None:
        """A pass for each region with its own plan, and None at full rank. Raises FtcError for text that is too short for the ranks.

        Where the passes will be proved (`check`), the trials run first, while nothing else takes memory.
        """
        check_not_latent(program, self.name)
        if not self.is_lossy:
            return None
        batches, _ = held_out(as_batches(calibration, what=f"pass {self.name}"))
        regions = regions_with_sites(program, self.name)
        _check_length(batches, regions, self)
        program.run_example(pieces(program, batches)[0])  # graphs for text of this form
        proved: dict[str, list[dict]] = {}  # twins with plans of their own have one graph before
        for graph in [variant.captured.graph for code in program.codes for variant in code.all_variants() if check]:
            name = graph_hash(graph)
            if name not in proved and any(node.target is not LATENT for node in attention_nodes(graph)):
                tell("proving the construction")
                proved[name] = _trials(graph, None)
                give_back()
        found = collect(program, regions, batches, self.seed, tell)
        give_back()
        tell("choosing ranks")
        spectra = {name: LayerSpectrum.of(s, self.rotation, self.weigh, self.weigh == "answer" and s.has_out) for name, s in found.items()}
        plans = plans_for_budget(spectra, self.cache) if self.cache is not None else plans_for_ranks(spectra, self.rank, self.rope)
        prove_once = functools.partial(prove, proved=proved)
        return {name: Planned(self, plan, functools.partial(convert, plan_of=lambda site, p=plan: p), prove_once) for name, plan in plans.items()}


def convert(graph: fx.Graph, plan_of) -> Outcome:
    """Convert every site of a graph by the plan that `plan_of(site)` gives, in place."""
    outcome = Outcome()
    for node in attention_nodes(graph):
        if node.target is LATENT:
            outcome.already += 1
            continue
        try:
            site = read_site(node)
        except Declined as declined:
            outcome.misses.append(declined.miss(node))
            continue
        place, plan = location(node), plan_of(site)
        made, lenses = _convert_site(graph, site, plan)
        outcome.lenses += lenses
        detail = {"latent": plan.latent, "rope": plan.rotated, "cache_elements": f"{plan.cache_elements} of {site.cache_elements}"}
        outcome.matches.append(Match("latent attention", (made.name,), detail, place))
    return outcome


def _convert_site(graph: fx.Graph, site: AttentionSite, plan: LatentPlan) -> tuple[fx.Node, list]:
    order = {node: number for number, node in enumerate(graph.nodes)}
    first = min((site.query.linear, site.key.linear, site.value.linear), key=order.__getitem__)
    projections = Editor(graph, first, site.query.linear)
    lenses = []
    x = first.args[0]
    query = projections(aten.linear.default, x, *_query_weights(projections, site, plan, lenses))
    names, down = _latent_weights(projections, site, plan, lenses)
    both = projections(aten.linear.default, x, *down)
    edit = Editor(graph, site.attention)
    up = edit.attribute(names[1], list(plan.decode.shape), site.key.weight)
    query = edit(aten.transpose.int, edit(aten.unflatten.int, query, -1, [site.num_heads, plan.query.shape[1]]), 1, 2)
    q_nope = edit(aten.narrow.default, query, -1, 0, plan.unrotated)
    q_pe = edit(aten.narrow.default, query, -1, plan.unrotated, plan.rotated)
    latent = edit(aten.narrow.default, both, -1, 0, plan.latent)
    k_pe = edit(aten.narrow.default, both, -1, plan.latent, plan.rotated)
    if plan.rotated:
        tables = _columns(edit, site.key.rope.args[1:3], plan)
        q_pe = edit(ROPE, q_pe, *tables, site.interleaved)
        k_pe = edit(aten.squeeze.dim, edit(ROPE, edit(aten.unsqueeze.default, k_pe, 1), *tables, site.interleaved), 1)
    made = edit(LATENT, q_nope, q_pe, latent, k_pe, up, site.mask, site.dropout, site.is_causal, groups=site.groups, scale=site.scale)
    if plan.shift is not None:
        lenses.append(_shift_output(graph, site, plan))
    site.attention.replace_all_uses_with(made)
    erase_unread(graph, site.attention)
    return made, lenses


def _query_weights(edit: Editor, site: AttentionSite, plan: LatentPlan, lenses: list) -> list[fx.Node]:
    rows = plan.query.shape[0] * plan.query.shape[1]
    made = []
    for node in (site.query.weight, site.query.bias):
        if node is not None:
            lenses.append(HeadMap(str(node.target), str(node.target), tuple(range(site.num_heads)), plan.query))
            made.append(edit.attribute(str(node.target), [rows, *node.meta["val"].shape[1:]], node))
    return made


def _latent_weights(edit: Editor, site: AttentionSite, plan: LatentPlan, lenses: list) -> tuple[list[str], list[fx.Node]]:
    weights = [site.key.weight, site.value.weight]
    names = [str(node.target) for node in weights]
    down, up = (sibling_name(edit.graph, names, word) for word in ("kv_a_proj_with_mqa", "kv_b_proj"))
    made = [edit.attribute(down, [len(plan.encode), weights[0].meta["val"].shape[1]], weights[0])]
    sources, targets = names, [down, up]
    if site.key.bias is not None:
        biases = [site.key.bias, site.value.bias]
        sources = names + [str(node.target) for node in biases]
        targets = [*targets, sibling_name(edit.graph, sources[2:], "kv_a_proj_with_mqa")]
        made.append(edit.attribute(targets[-1], [len(plan.encode)], biases[0]))
    lenses.append(ToLatent(tuple(sources), tuple(targets), plan.encode, plan.decode, plan.keep, site.groups, plan.exact))
    return [down, up], made


def _columns(edit: Editor, tables: tuple[fx.Node, fx.Node], plan: LatentPlan) -> list[fx.Node]:
    """The tables' columns for the pairs that are kept; the tables themselves where those are all of their columns in order."""
    columns = plan.table_columns()
    if columns == list(range(tables[0].meta["val"].shape[-1])):
        return list(tables)
    index = edit.constant("rope_columns", torch.tensor(columns))
    return [edit(aten.index_select.default, table, -1, index) for table in tables]


def _shift_output(graph: fx.Graph, site: AttentionSite, plan: LatentPlan) -> Shift:
    weight = site.out.args[1]
    bias = site.out.args[2] if len(site.out.args) > 2 else site.out.kwargs.get("bias")
    if bias is not None:
        return Shift(str(weight.target), str(bias.target), plan.shift, made=False)
    name = sibling_name(graph, [f"{str(weight.target).rpartition('.')[0]}.bias"], str(weight.target).split(".")[-2])
    made = Editor(graph, site.out).attribute(name, [weight.meta["val"].shape[0]], weight)
    site.out.args = (site.out.args[0], weight, made)
    return Shift(str(weight.target), name, plan.shift, made=True)


# ------------------------------------------------------------------------------------------------------------------ proof


def prove(before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None, proved: dict[str, list[dict]] | None = None) -> list[dict]:
    """Trials of the construction, up to the attentions' results, with matrices that lose nothing: all pairs kept, and half of them on tables
    that do not rotate; those of `earlier` once more where they are given.

    Also that `after` is what the construction makes of `before` at its sizes, and that what reads those results is as it was. Raises FtcFailure
    where it is not.
    """
    from ftc.rewrite.pipeline import copy_graph

    proved, name = {} if proved is None else proved, graph_hash(before)
    if earlier is not None or name not in proved:
        proved[name] = _trials(before, earlier)
    again = copy_graph(before)
    found = _plans_as_in(before, after)
    convert(again, lambda site: found[site.attention.name])
    if graph_hash(tidied(again)) != graph_hash(after):
        raise FtcFailure("pass gqa-to-mla: the rewritten graph is not what the construction makes of the graph before")
    ours, theirs = _results(before, again, found)
    if hash_beside(before, ours) != hash_beside(again, theirs):
        raise FtcFailure("pass gqa-to-mla: the construction changes what stands beside the attentions")
    return [dict(trial) for trial in proved[name]]


def _trials(before: fx.Graph, earlier: list[dict] | None) -> list[dict]:
    """The construction on a copy of `before`, with matrices that lose nothing, against it."""
    from ftc.rewrite.pipeline import copy_graph

    trials = []
    for all_kept in (True, False):
        recorded = None if earlier is None else [t for t in earlier if t["all_kept"] == all_kept]
        start = copy_graph(before)
        start = with_tables(ending_at(start, [node for node in attention_nodes(start) if node.target is not LATENT]), rotating=all_kept)
        made = copy_graph(start)
        outcome = convert(made, lambda site, a=all_kept: trial_plan(HeadSizes.of(site), 7, a))
        trials += [trial | {"all_kept": all_kept} for trial in compared(start, made, outcome.lenses, recorded)]
    return trials


def _results(before: fx.Graph, after: fx.Graph, plans: dict[str, LatentPlan]) -> tuple[list[str], list[str]]:
    """In both graphs, the nodes after which nothing is different: the attentions, or the products after them where their bias takes a shift."""
    names: tuple[list[str], list[str]] = ([], [])
    for pair in zip(attention_nodes(before), attention_nodes(after), strict=True):
        plan = plans.get(pair[0].name)
        for node, found in zip(pair, names, strict=True) if plan is not None else ():
            found.append((node if plan.shift is None else output_product(node)).name)
    return names


def _plans_as_in(before: fx.Graph, after: fx.Graph) -> dict[str, LatentPlan]:
    """Plans without values whose sizes are those of the latent attentions in `after`, by the names of the attentions of `before`."""
    found = {}
    sites = [read_site(node) for node in attention_nodes(before) if node.target is not LATENT]
    for site, node in zip(sites, [n for n in attention_nodes(after) if n.target is LATENT], strict=True):
        sizes = HeadSizes.of(site)
        rows, latent = (int(size) for size in node.args[4].meta["val"].shape)
        rotated, nope = (int(node.args[i].meta["val"].shape[-1]) for i in (1, 0))
        shift = torch.zeros(site.num_heads * site.value.width) if _has_shift(site, after) else None
        plan = LatentPlan(
            sizes,
            torch.zeros(site.num_heads, nope + rotated, sizes.width),
            torch.zeros(latent + rotated, sizes.keys + sizes.values),
            torch.zeros(rows, latent),
            torch.zeros(sizes.keys, rotated),
            _frequencies(sizes, node, rotated),
            shift,
        )
        found[site.attention.name] = plan
    return found


def _frequencies(sizes: HeadSizes, node: fx.Node, rotated: int) -> tuple[int, ...]:
    if not rotated:
        return ()
    table = node.args[1].args[1]
    columns = table.args[2].meta["constant"].tolist() if table.target is aten.index_select.default else list(range(rotated))
    theirs = {places: f for f, places in enumerate(pair_places(sizes.rotary, sizes.width, sizes.interleaved)[0])}
    found = [theirs.get((columns[a], columns[b])) for a, b in pair_places(rotated, rotated, sizes.interleaved)[0]]
    if None in found:
        raise FtcFailure("pass gqa-to-mla: the rotated part reads columns of the tables that are no pair")
    return tuple(found)


def _has_shift(site: AttentionSite, after: fx.Graph) -> bool:
    if site.out is None or len(site.out.args) > 2:
        return False
    weight = site.out.args[1].target
    products = [n for n in after.nodes if n.target is aten.linear.default and n.args[1].target == weight]
    return bool(products) and len(products[0].args) > 2


# ------------------------------------------------------------------------------------------------------------ calibration


def _check_length(batches, regions: dict[str, HeadSizes], options: GqaToMla) -> None:
    needed = max(sizes.keys + sizes.values for sizes in regions.values())
    needed = options.rank if options.rank is not None else max(int(options.cache * needed), 1)
    if num_tokens(batches) < 4 * needed:
        raise FtcError(
            f"pass {options.name}: {num_tokens(batches)} tokens of calibration text are too few for a latent of about {needed}; give at least "
            f"{4 * needed}, a quarter more for what is measured apart"
        )

"""rope-scale: a model with RoPE reads longer texts, by any of the six Hugging Face rope types.

    cos(t f), sin(t f)   becomes   a cos(t f'), a sin(t f')          t a position, f [R/2] the frequencies theta^(-2i/R)

f' and the attention factor a are those of `ftc.models.rope` (linear: Chen et al., 2023; dynamic: NTK-aware scaling; yarn: Peng et al.,
2023; longrope: Ding et al., 2024; llama3). The pass finds by data flow where positions meet frequencies, wherever that is; for types
whose f' depends on the length of the text (dynamic, longrope) f' is computed in the graph from the largest position.

It changes the function on purpose, so graph is not compared with graph. What is proved: apart from the tables of cos and sin the graph is the same,
node for node; and the tables are what the type's definition gives, at lengths up to the new one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import torch
from ftc.models.rope import RopeConfig, inverse_frequencies
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ftc.errors import FtcError, FtcFailure
from ftc.rewrite import probe
from ftc.rewrite.certificate import BOUNDS, model_dtype
from ftc.rewrite.edit import Editor
from ftc.rewrite.graph_json import graph_hash
from ftc.rewrite.movement import CASTS
from ftc.rewrite.outcome import Match, Miss, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.probe import aten
from ftc.rewrite.rope_tables import Site, evaluate, find_sites, fits_theta, positions_up_to, theta_of, without_tables

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TAKES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_COMMON = ("type", "original_max_position_embeddings", "rope_theta", "buffers")
_NEEDS = {"longrope": ("short_factor", "long_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}


def _help(text: str):
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True)
class RopeScale(Pass):
    """The pass. Options are named like Hugging Face's rope_scaling; those that a type does not take are errors."""

    name: ClassVar[str] = "rope-scale"
    summary: ClassVar[str] = "RoPE's frequencies are scaled for longer texts: linear, dynamic, yarn, longrope, llama3"
    contract: ClassVar[str] = "lossy"
    metric: ClassVar[str] = "cos and sin against the type's definition"
    bound: ClassVar[float] = 1e-12
    inverse: ClassVar[bool] = True
    every_graph: ClassVar[bool] = True

    type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = field(metadata={"help": "the rope type"})
    factor: float | None = _help("how many times the trained length; at least 1")
    original_max_position_embeddings: int | None = _help("the trained length; default: from the model's configuration")
    attention_factor: float | None = _help("scales cos and sin; default: from factor")
    beta_fast: float | None = _help("yarn: pairs that turn more often in the trained length stay; 32")
    beta_slow: float | None = _help("yarn: pairs that turn less often are divided; 1")
    mscale: float | None = _help("yarn: with mscale_all_dim, another attention factor")
    mscale_all_dim: float | None = _help("yarn: see mscale")
    truncate: bool | None = _help("yarn: the ends of the ramp are whole pairs; true")
    low_freq_factor: float | None = _help("llama3: wavelengths above trained length / this are divided")
    high_freq_factor: float | None = _help("llama3: wavelengths below trained length / this stay")
    short_factor: list | tuple | None = _help("longrope: a divisor a pair for texts within the trained length")
    long_factor: list | tuple | None = _help("longrope: a divisor a pair for longer texts")
    rope_theta: float | None = _help("the base of the frequencies to scale; default: read off the model")
    buffers: list | tuple | None = _help("names of the buffers that hold frequencies to scale; default: found")

    def __post_init__(self):
        for name in ("short_factor", "long_factor", "buffers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and f.name not in _COMMON]
        for name in given:
            if name not in _TAKES[self.type]:
                raise FtcError(f"pass rope-scale: type {self.type} takes no {name}; it takes {', '.join(_TAKES[self.type]) or 'no options'}")
        if self.type != "default" and self.factor is None:
            raise FtcError(f"pass rope-scale: type {self.type} needs factor, how many times the trained length the texts are")
        for name in _NEEDS.get(self.type, ()):
            if getattr(self, name) is None:
                raise FtcError(f"pass rope-scale: type {self.type} needs {name}")
        if self.factor is not None and not 1 <= self.factor < math.inf:
            raise FtcError(f"pass rope-scale: factor is {self.factor}; it must be at least 1")
        for name in ("original_max_position_embeddings", "attention_factor", "rope_theta", "beta_fast", "beta_slow", "low_freq_factor"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise FtcError(f"pass rope-scale: {name} is {getattr(self, name)}; it must be positive")
        for name in ("short_factor", "long_factor"):
            if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf for v in getattr(self, name) or ()):
                raise FtcError(f"pass rope-scale: {name} is {list(getattr(self, name))}; every entry must be a positive number")
        if self.type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise FtcError(f"pass rope-scale: low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}")

    # ---- what the type says

    def rope(self) -> RopeConfig:
        """The options as the models' own configuration of RoPE."""
        names = ("rope_theta", "original_max_position_embeddings", *_TAKES[self.type])
        return RopeConfig(rope_type=self.type, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    def frequencies(self, width: int, seq_len=None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, float]:
        """f' [R/2] and the attention factor, for `width` R and a text of `seq_len` tokens."""
        trained = self.original_max_position_embeddings or 1
        longest = trained if self.type == "dynamic" else round(trained * (self.factor or 1))
        rope = self.rope()
        if self.type == "longrope":  # models hold the divisors in float32
            rounded = {name: torch.tensor(getattr(self, name)).tolist() for name in ("short_factor", "long_factor")}
            rope = replace(rope, **rounded)
        return inverse_frequencies(rope, width, longest, seq_len, dtype=dtype)

    def lengths(self) -> list[int]:
        """Lengths of text at which tables are compared: short, the trained one, one more, and the longest."""
        trained = self.original_max_position_embeddings or 64
        return sorted({2, max(2, trained), trained + 1, math.ceil(trained * (self.factor or 1))})

    # ---- the model

    def with_program(self, program) -> RopeScale:
        """The pass with theta, the trained length and the buffers read off the program; FtcError where it is scaled already."""
        from ftc.rewrite.rope_model import filled_in

        return filled_in(self, program)

    def new_config(self, config):
        """A copy of the model's configuration with the new RoPE and the new number of positions."""
        from ftc.rewrite.rope_model import rescaled

        longest = self.original_max_position_embeddings or 0
        return rescaled(copy.deepcopy(config), self.rope(), longest if self.type == "dynamic" else round(longest * (self.factor or 1)))

    # ---- the graph

    def apply(self, graph: fx.Graph) -> Outcome:
        sites, misses = find_sites(graph)
        outcome = Outcome(misses=misses)
        for site in sites:
            verdict = self._verdict(graph, site)
            if isinstance(verdict, Miss):
                outcome.misses.append(verdict)
            elif verdict == "already":
                outcome.already += 1
        if outcome.misses:
            return outcome
        for site in sites:
            if self._verdict(graph, site) == "scale":
                outcome.matches.append(self._scale(graph, site))
        return outcome

    def _verdict(self, graph: fx.Graph, site: Site) -> str | Miss:
        """scale, already, other (frequencies that were not asked for), or why the site can be none of them."""

        def miss(reason: str) -> Miss:
            return Miss(site.product.name, reason, site.frequencies.name, location(site.frequencies))

        if self.rope_theta is None or (self.type != "default" and self.original_max_position_embeddings is None):
            return miss("rope_theta and original_max_position_embeddings are not known here; give both")
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None and len(getattr(self, name)) != site.width // 2:
                raise FtcError(f"pass rope-scale: {name} has {len(getattr(self, name))} entries; the model has {site.width // 2} frequencies")
        if self.type == "dynamic" and site.width < 4:
            return miss("type dynamic needs at least two frequencies")
        buffers = site.buffers()
        if buffers:
            if self.buffers is not None and not set(buffers) <= set(self.buffers):
                return "other"
            if site.scale != 1 or not site.fixed:
                return miss("its cos and sin are scaled by a number, or its frequencies depend on the text: scaled already")
            return "already" if self.type == "default" else "scale"
        if self._has_target_tables(graph, site):
            return "already"
        if not site.fixed:
            return miss("the frequencies depend on the text: scaled already, in another way than asked for")
        (values,) = evaluate(graph, [site.frequencies], {})
        if site.scale == 1 and fits_theta(values, self.rope_theta):
            return "scale"
        if site.scale == 1 and theta_of(values) is not None:
            return "other"
        return miss(
            f"the frequencies are no powers of {self.rope_theta:g}, or cos and sin are scaled by a number: scaled already, in another way than asked for"
        )

    def _has_target_tables(self, graph: fx.Graph, site: Site) -> bool:
        attention = self.frequencies(site.width)[1]
        if abs(site.scale - attention) > 1e-9 * attention:
            return False
        for length in self.lengths():
            positions = positions_up_to(graph, site, length, lifted=True)
            (values,) = evaluate(graph, [site.frequencies], {site.positions: positions}, lifted=True)
            wanted, _ = self.frequencies(site.width, length, torch.float64)
            if probe.relative_error(values, wanted) > 1e-6:
                return False
        return True

    def _scale(self, graph: fx.Graph, site: Site) -> Match:
        edit = Editor(graph, site.product, site.frequencies)
        dtype = _stored_dtype(site)
        if self.rope().depends_on_length:
            new = self._computed(edit, site)
            new = new if dtype == torch.float32 else edit(aten.to.dtype, new, dtype)
        else:
            new = edit.constant("rope_frequencies", self.frequencies(site.width)[0].to(dtype))
        operand = site.chain[-1] if site.chain else site.frequencies
        site.product.replace_input_with(operand, edit.copy(site.chain, {site.frequencies: new})[operand])
        attention = self.frequencies(site.width)[1]
        if attention != 1:
            for root in site.roots:
                after = Editor(graph, root.next, root)
                scaled = after(aten.mul.Tensor, root, attention)
                root.replace_all_uses_with(scaled, delete_user_cb=lambda user, s=scaled: user is not s)
        detail = {"type": self.type, "frequencies": site.width // 2, "attention_factor": attention, "theta": self.rope_theta}
        return Match("rope", tuple(root.name for root in site.roots), detail, location(site.product))

    def _computed(self, edit: Editor, site: Site) -> fx.Node:
        """f' as nodes that compute it from the largest position: the models' own function, traced."""
        length = edit(aten.add.Tensor, edit(aten.max.default, site.positions), 1)
        if length.meta["val"].is_floating_point():
            length = edit(aten.to.dtype, length, torch.int64)
        traced = make_fx(lambda seq_len: self.frequencies(site.width, seq_len)[0])(torch.tensor(3))
        made: dict[fx.Node, fx.Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                made[node] = length
            elif node.op == "get_attr":
                made[node] = edit.constant("rope_divisors", getattr(traced, node.target).detach())
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
                made[node] = edit(node.target, *args, **kwargs)
            else:
                return made[node.args[0]]
        raise AssertionError("the trace has no output")

    # ---- the proof

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """The graphs are equal but for their tables, and the tables are the type's: at each of `lengths` in lifted float64, at the longest
        in the model's dtype too. FtcFailure where the graphs differ elsewhere."""
        old, new = find_sites(before)[0], find_sites(after)[0]
        if len(old) != len(new) or graph_hash(without_tables(before, old)) != graph_hash(without_tables(after, new)):
            raise FtcFailure("pass rope-scale changed something else than the tables of cos and sin; the program was left as it was")
        trials = []
        own = model_dtype(before)
        for number, length in enumerate(self.lengths()):
            trials.append({"seed": number, "sizes": [length], "dtype": "float64", "lifted": True})
        if own != torch.float64:
            trials.append({"seed": 0, "sizes": [self.lengths()[-1]], "dtype": _NAMES[own], "lifted": False})
        for trial in trials:
            (length,), lifted = trial["sizes"], trial["lifted"]
            errors = [self._table_errors(before, after, a, b, length, lifted) for a, b in zip(old, new, strict=True)]
            bound = BOUNDS[torch.float64] if lifted else BOUNDS.get(own, 2.0**-8)
            worst = max(error for error, _ in errors)
            trial |= {"output_error": worst, "gradient_error": 0.0, "bound": bound}
            if not lifted and worst > bound:  # the type's definition rounds as much by itself
                trial |= {"own_rounding": max(rounding for _, rounding in errors)}
                trial["bound"] = max(bound, 2 * trial["own_rounding"])
        return trials

    def _table_errors(self, before: fx.Graph, after: fx.Graph, old: Site, new: Site, length: int, lifted: bool) -> tuple[float, float]:
        """The worst error of the site's tables, and how far the definition in the graph's own dtypes is from float64."""
        if self._verdict(before, old) != "scale":
            return (0.0 if graph_hash(_only(before, old)) == graph_hash(_only(after, new)) else math.inf), 0.0
        attention = self.frequencies(old.width)[1]

        def reference(lifted: bool) -> list[torch.Tensor]:
            positions = positions_up_to(before, old, length, lifted)
            exact = lifted and self.rope().depends_on_length  # constants of the graph are rounded once, what it computes is lifted
            f = self.frequencies(old.width, length, torch.float64 if exact else torch.float32)[0]
            f = f.double() if lifted else f.to(_stored_dtype(old))
            product, *tables = evaluate(before, [old.product, *old.tables], {old.positions: positions, old.frequencies: f}, lifted=lifted)
            angles = (positions.reshape(-1, 1).to(f.dtype) * f).flatten().sort().values
            found = product.flatten().sort().values
            if lifted and not torch.allclose(found, angles.repeat_interleave(len(found) // len(angles)), rtol=1e-14, atol=0):
                raise FtcFailure(f"pass rope-scale: {old.product.name} is no product of every position with every frequency")
            return [table * attention for table in tables]

        found = evaluate(after, list(new.tables), {new.positions: positions_up_to(after, new, length, lifted)}, lifted=lifted)
        wanted = reference(lifted)
        error = max(probe.relative_error(a, b) for a, b in zip(found, wanted, strict=True))
        if lifted or error == 0:
            return error, 0.0
        return error, max(probe.relative_error(a, b) for a, b in zip(wanted, reference(True), strict=True))


def _stored_dtype(site: Site) -> torch.dtype:
    """float32, as the definition computes, where the graph casts what it reads anyway; else the dtype that the product meets."""
    casts = any(node.target in CASTS for node in site.chain)
    return torch.float32 if casts else site.frequencies.meta["val"].dtype


def _only(graph: fx.Graph, site: Site) -> fx.Graph:
    """A graph that computes nothing but the tables of a site."""
    new, mapping = fx.Graph(), {}
    for node in graph.nodes:
        if node.op not in ("output", "call_module"):
            if all(used in mapping for used in node.all_input_nodes):
                mapping[node] = new.node_copy(node, lambda n: mapping[n])
    new.output(tuple(mapping[table] for table in site.tables))
    new.eliminate_dead_code()
    return new

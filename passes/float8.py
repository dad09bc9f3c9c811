"""float8: products in 8-bit floats, forward and backward, for training.

    x W^T + b  ->  float8_linear(x, W, b, recipe)      y, dx and dW each from operands in float8 (`ftc.float8.recipes`)
    moe(x, i, w, ...)  ->  float8_moe(..., recipe)

In float8 run the products in the regions: attention and MLP projections, fused or not, and experts. Norms, the embedding, softmax and what lies between
stay as they are, and so do, by default, routers and the output head (Micikevicius et al. 2022, arXiv:2209.05433; DeepSeek-V3, arXiv:2412.19437, 3.3.1).
A product goes to float8 where its sizes are multiples of 16 and reach `min_k` and `min_n`, or, with `measure`, where it is faster so on this device.
Every product's decision is told in the report; one whose sizes float8 cannot take is a near miss, and an error with expect = "all".
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::float8_linear
from ftc.errors import FtcError
from ftc.float8.decide import Rule, decide
from ftc.float8.place import How, is_float8, place
from ftc.float8.proof import BOUND, METRIC, prove
from ftc.float8.recipes import FINE
from ftc.float8.sites import find_sites
from ftc.rewrite.outcome import Match, Miss, Outcome, location
from ftc.rewrite.passes import Expectation, Pass


def _help(text: str) -> dict:
    return {"help": text}


@dataclass(frozen=True)
class Float8(Pass):
    """See the module's docstring."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "fine"] = field(default="rowwise", metadata=_help("how operands are scaled"))
    save: Literal["input", "exact", "float8"] = field(
        default="input", metadata=_help("kept for the backward: inputs; float8 operands, norms and gates computed again; also inputs of gates in float8")
    )
    products: Literal["auto", "emulated", "scaled_mm"] = field(default="auto", metadata=_help("auto: float8 units on CUDA, emulated in float32 on CPU"))
    head: bool = field(default=False, metadata=_help("the output head too"))
    router: bool = field(default=False, metadata=_help("routers of experts too"))
    keep: list[str] = field(default_factory=list, metadata=_help('parts of the names of weights that stay, in their region, such as ["q_proj"]'))
    min_k: int = field(default=1, metadata=_help("least summed size of a product in float8"))
    min_n: int = field(default=1, metadata=_help("least output size of a product in float8"))
    measure: int = field(default=0, metadata=_help("time each shape with so many tokens on this device and take what is faster; 0: by rule"))
    all_gather: bool = field(default=False, metadata=_help("FSDP2 gathers these weights in float8"))

    name: ClassVar[str] = "float8"
    summary: ClassVar[str] = "products run in 8-bit floats, forward and backward; norms, routers, head and embedding stay"
    contract: ClassVar[str] = "lossy"
    metric: ClassVar[str] = METRIC
    bound: ClassVar[float] = BOUND
    inverse: ClassVar[bool] = True
    sees_calls: ClassVar[bool] = True
    default_expect: ClassVar[Expectation] = "some"

    def __post_init__(self):
        for name in ("min_k", "min_n", "measure"):
            least = 0 if name == "measure" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be {least} or more")
        if not all(isinstance(word, str) and word for word in self.keep):
            raise ValueError(f"keep = {self.keep} must be a list of parts of names")
        if self.recipe == FINE and self.save == "input":
            object.__setattr__(self, "save", "exact")  # what dW of "fine" reads is float8 in any case
        if self.recipe == FINE and self.all_gather:
            raise ValueError("all_gather = true is of the other recipes: blocks of 128 rows cross the ranks' shards")
        if self.recipe == FINE and self.products != "auto":
            raise ValueError(f'products = "{self.products}" is of the other recipes: "fine" has kernels of its own')

    def with_program(self, program) -> "Float8":
        """The pass itself, once every word of `keep` is known to name a weight."""
        names = [name for host in (*program.regions, program) for name, _ in host.named_attributes()]
        for word in self.keep:
            if not any(word in name for name in names):
                raise FtcError(f"float8: keep = {word!r} is part of no weight's name; they are like {', '.join(sorted(set(names))[:4])}")
        return self

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=sum(is_float8(node) for node in graph.nodes))
        rule = Rule(self.recipe, self.products, self.head, self.router, self.min_k, self.min_n, self.measure, tuple(self.keep))
        taken = []
        for site in find_sites(graph):
            decision = decide(site, rule)
            place_ = location(site.node)
            outcome.notes.append(str(decision))
            if decision.float8:
                detail = {"weight": site.name, "k": site.k, "n": site.n, "recipe": self.recipe, "reason": decision.reason}
                outcome.matches.append(Match(site.role, (site.node.name,), detail, place_))
                taken.append(site)
            elif decision.impossible:
                outcome.misses.append(Miss(site.name, decision.reason, site.node.name, place_))
        place(graph, taken, How(self.recipe, self.save, self.products))
        return outcome

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """That nothing but the precision of products has changed, and how far the results are from those of before."""
        return prove(before, after, earlier)

"""What a raise pass reports: sites it rewrote, sites that were canonical already, and near misses with the node where they part."""

from dataclasses import dataclass, field

from torch import fx

from ftc.rewrite.lens import Lens


def location(node: fx.Node) -> str:
    """`file:line (op)` of the source line that made `node`, as far as tracing kept it."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    place = "source unknown"
    if lines:
        parts = lines[-1].removeprefix("File ").split(", ")
        place = f"{parts[0].strip(chr(34))}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else parts[0]
    return f"{place} ({operation(node)})"


def operation(node: fx.Node) -> str:
    """The name of what a node does: `aten.mul.Tensor`, `placeholder`, ..."""
    return str(node.target).replace("torch.ops.", "") if node.op == "call_function" else node.op


@dataclass(frozen=True)
class Match:
    """A site that now stands in canonical spelling. `outputs` are the names of the canonical nodes, `detail` what was read off or measured."""

    kind: str
    outputs: tuple[str, ...]
    detail: dict
    location: str


@dataclass(frozen=True)
class Miss:
    """A site that looks like the idea and is not it: `anchor` began the hypothesis, `node` is the first where it and the graph part."""

    anchor: str
    reason: str
    node: str
    location: str


@dataclass(frozen=True)
class NewRegion:
    """A region that a pass adds at the dotted `name`: the code of the region `like`, and parameters of its own that start as
    its copy, or (`init` "random") with matrices drawn anew from `seed`."""

    name: str
    like: str
    init: str = "copy"
    seed: int = 0


@dataclass
class Outcome:
    """What one pass did to one graph. `already`: sites that were in the target form before; `lenses`: how the parameters
    follow, in order; `dropped`: positions of outputs that the graph no longer gives (new ones are appended); `layout`: how
    ranks divide its inputs and outputs (a `certificate_ranks.Layout`); `shares`: size symbols that now stand for one rank's
    share, with the number of shares; `retired`: why the graph has no place in the rewritten program, which does without it;
    `from_one`: size symbols that may be 1 from now on, whatever tracing assumed of them; `notes`: decisions that the report tells, a line each.

    Of passes that see calls: `regions` are added to the program, those named in `gone` are taken away, those in `uncalled`
    stay but are not called by this graph any more; `answers` maps the position of an output to that of the output (of the
    rewritten graph) which the model's caller gets in its place."""

    matches: list[Match] = field(default_factory=list)
    already: int = 0
    misses: list[Miss] = field(default_factory=list)
    lenses: list[Lens] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    layout: object | None = None
    shares: dict = field(default_factory=dict)
    regions: list[NewRegion] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)
    retired: str = ""
    from_one: tuple = ()
    notes: list[str] = field(default_factory=list)

    def growth(self) -> dict:
        """JSON-ready: what the pass adds to the program and takes from it beside values."""
        return {"added": [vars(region) for region in self.regions], "gone": list(self.gone)}


class Declined(Exception):
    """A hypothesis that does not hold, with the node where it parts from the graph. Never leaves a pass."""

    def __init__(self, reason: str, node: fx.Node):
        super().__init__(reason)
        self.reason, self.node = reason, node

    def miss(self, anchor: fx.Node) -> Miss:
        """This refusal as a report line for the site that began at `anchor`."""
        return Miss(anchor.name, self.reason, self.node.name, location(self.node))

"""Which inputs and outputs of a rewritten graph stand for those of the graph before, so that a certificate compares like with like.

Own inputs and outputs keep their order; new outputs are appended. Calls of a shell graph are paired by region and by number.
Whatever is left over must be declared: outputs that were dropped, regions that were added or are gone. So a pass that adds a
region is still held to what every other region is given, and to the outputs that the model had.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from ftc.errors import FtcFailure
from ftc.rewrite.opened import Calls, _fill, _Slot, _slots, open_calls


@dataclass(frozen=True)
class Alignment:
    """`inputs`: for each input of `after` the position of its value among those of `before`, None for a new one; the
    outputs `kept_before` of `before` are compared with `kept_after` of `after`. Both graphs are opened."""

    before: fx.Graph
    after: fx.Graph
    inputs: list[int | None]
    kept_before: list[int]
    kept_after: list[int]


def align(
    before: fx.Graph, after: fx.Graph, dropped: Sequence[int] = (), added: Collection[str] = (), gone: Collection[str] = ()
) -> Alignment:
    """Pair what the two graphs have in common; `added` and `gone` are names of regions. FtcFailure for what is undeclared."""
    before, old = open_calls(before)
    after, new = open_calls(after)
    kept = [place for place in range(old.num_outputs) if place not in dropped]
    if len(kept) > new.num_outputs:
        raise FtcFailure(f"the rewritten graph gives {new.num_outputs} outputs where {len(kept)} were kept")
    pairs = list(zip(kept, range(len(kept)), strict=True))
    places = {str(node.target): place for place, node in enumerate(n for n in before.nodes if n.op == "placeholder")}
    source = {}
    theirs, ours = _by_region(old), _by_region(new)
    for region in dict.fromkeys([*theirs, *ours]):
        if (region in ours) != (region in theirs):
            if region not in (added if region in ours else gone):
                raise FtcFailure(f"the pass {'adds' if region in ours else 'removes'} a call of {region} without saying so")
            continue
        if len(theirs[region]) != len(ours[region]):
            raise FtcFailure(f"{region} is called {len(ours[region])} times in place of {len(theirs[region])}")
        for was, now in zip(theirs[region], ours[region], strict=True):
            pairs += _arguments(was, now)
            source |= {holder: places[was[0][position]] for position, holder in now[0].items() if position in was[0]}
    results = {name for record in new.records for name in record[0].values()}
    inputs = []
    for node in (n for n in after.nodes if n.op == "placeholder"):
        if node.name not in results and str(node.target) not in places:
            raise FtcFailure(f"the rewritten graph has an input {node.target} that the graph before lacks")
        inputs.append(source.get(node.name) if node.name in results else places[str(node.target)])
    return Alignment(before, after, inputs, [a for a, _ in pairs], [b for _, b in pairs])


def _by_region(calls: Calls) -> dict[str, list]:
    found = defaultdict(list)
    for record in calls.records:
        found[record[1]].append(record)
    return found


def _arguments(was: tuple, now: tuple) -> list[tuple[int, int]]:
    """The outputs that hand the same argument to a call; FtcFailure when the plain arguments differ."""
    old, new = was[2:4], now[2:4]
    if repr(_fill(old, lambda s: _Slot(0))) != repr(_fill(new, lambda s: _Slot(0))):
        raise FtcFailure(f"the pass calls {was[1]} with other arguments")
    return [(a.index, b.index) for a, b in zip(_slots(old), _slots(new), strict=True)]

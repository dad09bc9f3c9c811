"""What a trainer does about the balance of experts after each step: load of all ranks, selection biases moved, numbers logged, alarms.

    before the optimizer's step    tallies of all ranks added up; logits that are not finite stop the run, and the router is named
    after it                       b_e += rate sign(mean load - load_e)            Wang et al. 2024, arXiv:2408.15664, algorithm 1
                                   pool = 0.9 pool + load, and the tally is emptied; an expert that nobody chose for long is reported

The pass `balance` puts the tallies into the graphs, and its options are read from the program. A step is a global batch: microbatches and
recomputation count once. Works with any loop: `follow` an optimizer, and run each microbatch under `ftc.dialect.balance.share_of_batch`.

Numbers of a router, those of the last step:

    max_violation    largest load over the mean load, - 1: MaxVio (Wang et al. 2024, section 4); 0 is perfect balance
    load_entropy     of the shares of all experts in the load, over log E: 1 is perfect balance
    router_entropy   mean over tokens of the entropy of p, over log E; p sums to 1 over the experts (ftc.dialect.balance)
    confidence       mean over tokens of the largest p. It stands in for router saturation: the agreement of choices with those of another
                     checkpoint (Muennighoff et al. 2024, arXiv:2409.02060, section 4.1), which takes a second router over the same tokens
    dropped          share of choices that no expert took
    switch, sequence, z    the losses, before their coefficients, where they have one
    dead             experts without a token for `dead_after` steps of this process

Legend: E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ftc.dialect.balance import SUMS, parts_of
from ftc.errors import FtcFailure
from ftc.parallel.weights import hosts, local
from ftc.rewrite.outcome import Declined
from ftc.rewrite.router_site import router_of

# The pool forgets a tenth of itself a step: what it says is of about the last ten.
POOL_KEPT = 0.9


@dataclass
class BalancedRouter:
    """One router of a program: where its tally and its selection bias are, and for how many steps each expert has had no token."""

    name: str
    host: Any
    tally_name: str
    bias_name: str | None
    experts: int
    top_k: int
    options: dict[str, Any]
    counts_E: Tensor = field(init=False)
    sums: Tensor = field(init=False)

    def __post_init__(self):
        self.counts_E, self.sums = torch.zeros(self.experts, dtype=torch.float64), torch.zeros(len(SUMS), dtype=torch.float64)
        self.idle_E = torch.zeros(self.experts, dtype=torch.int64)

    @property
    def tally(self) -> Tensor:
        """float64 [2 E + 7]."""
        return self.host.fetch(self.tally_name)


def balanced_routers(program: Any) -> list[BalancedRouter]:
    """The routers that the pass `balance` has seen to, in the order of the regions. FtcFailure where one with a bias to move is not found again."""
    applied = [e["options"] for e in getattr(program, "_applied", ()) if e["pass"] == "balance" and e["matches"]]
    found = []
    for prefix, host in hosts(program) if applied else ():
        variant = next(iter(host.code.all_variants()), None)
        for node in variant.captured.graph.nodes if variant is not None else ():
            if node.target is torch.ops.ftc.balance.default:
                weights, logits, indices, tally = node.args
                experts, name = int(logits.meta["val"].shape[1]), f"{prefix}{str(tally.target).rpartition('.')[0]}".removesuffix(".")
                try:
                    bias = router_of(indices, weights, experts).bias if applied[-1]["loss_free"] else None
                except Declined as declined:
                    raise FtcFailure(f"the selection bias of {name} cannot be found any more: {declined.reason}") from None
                bias_name = None if bias is None else str(bias.target)
                found.append(BalancedRouter(name, host, str(tally.target), bias_name, experts, int(weights.meta["val"].shape[1]), applied[-1]))
    return found


class ExpertBalance:
    """Follows the routers of a program through training.

    `add_ranks` adds a tensor up over the ranks that see different tokens, in place; `warn` takes a line for people. Without routers
    nothing is done and `report` is empty. Of a pipeline (ftc.train.pipeline_step) the program is a list of this rank's stages: the
    numbers of all ranks are brought together, and an error on one is raised on all.
    """

    def __init__(
        self,
        program: Any,
        add_ranks: Callable[[Tensor], None] = lambda tally: None,
        warn: Callable[[str], None] = print,
        pipeline: Any = None,
    ):
        programs = program if isinstance(program, list) else [program]
        self.routers = [router for each in programs for router in balanced_routers(each)]
        self._add_ranks, self._warn, self._pipeline = add_ranks, warn, pipeline
        self._balanced = any(e["pass"] == "balance" and e["matches"] for each in programs for e in getattr(each, "_applied", ()))

    def follow(self, optimizer: torch.optim.Optimizer, step: Callable[[], int]) -> None:
        """Do both halves around each step of an optimizer; `step` says which it is."""
        optimizer.register_step_pre_hook(lambda *_: self.gather(step()))
        optimizer.register_step_post_hook(lambda *_: self.settle())

    @torch.no_grad()
    def gather(self, step: int) -> None:
        """Read the tallies, added up over all ranks: a collective. FtcFailure that names the first router whose logits are not finite."""
        if self._pipeline is None:
            self._gather()
            self._check_finite(step)
        elif self._balanced:
            self._gather()
            self._pipeline.together(lambda: self._check_finite(step))

    def _gather(self) -> None:
        """The numbers of this rank's routers, and where a mirrored pipeline holds them twice, of both."""
        parts = [part for router in self.routers for part in parts_of(router.tally, router.experts)[::2]]
        if parts:
            flat = torch.cat(parts)
            self._add_ranks(flat)
            numbers = iter(flat.cpu().split([len(part) for part in parts]))
            for router in self.routers:
                router.counts_E, router.sums = next(numbers), next(numbers)
        if self._pipeline is not None and self._pipeline.is_mirrored:
            self._add_mirrored()

    def _add_mirrored(self) -> None:
        """Both directions of a mirrored pipeline run a stage, each with microbatches of its own on a rank of its own."""
        everyone = self._pipeline.told({router.name: (router.counts_E, router.sums) for router in self.routers})
        for router in self.routers:
            held = [found[router.name] for found in everyone if router.name in found]
            router.counts_E, router.sums = (sum(numbers[1:], numbers[0]) for numbers in zip(*held, strict=True))

    def _check_finite(self, step: int) -> None:
        for router in self.routers:
            bad, tokens = (int(router.sums[SUMS.index(word)]) for word in ("bad", "tokens"))
            if bad:
                raise FtcFailure(
                    f"at step {step} the logits of the router {router.name} are not finite for {bad} of {tokens} tokens; it is the first of "
                    f"{len(self.routers)} routers where they are not. The weights are those of step {step - 1}: lower optimizer.lr, raise "
                    "lr_scheduler.warmup_steps or the option z of the pass balance, and continue from the last checkpoint"
                )

    @torch.no_grad()
    def settle(self) -> None:
        """Move the selection biases by what `gather` read, renew the pools, empty the tallies, and warn of dead experts."""
        for router in self.routers:
            counts_E, pool_E, sums = parts_of(router.tally, router.experts)
            pool_E.mul_(POOL_KEPT).add_(router.counts_E.to(pool_E.device))
            counts_E.zero_()
            sums.zero_()
            if router.bias_name is not None:
                move_bias(router.host.fetch(router.bias_name), router.counts_E, router.options["loss_free"])
            router.idle_E = torch.where(router.counts_E > 0, 0, router.idle_E + 1)
            for expert in (router.idle_E == router.options["dead_after"]).nonzero().flatten().tolist():
                self._warn(f"expert {expert} of {router.name} is dead: in {router.options['dead_after']} steps no token went to it")

    def report(self) -> dict[str, Any]:
        """Means over the routers of the numbers in the module's docstring (dead: the sum), and under "layers" those of each router by name.

        All ranks of a pipeline must call it."""
        layers = {router.name: statistics(router) for router in self.routers if router.counts_E.sum() > 0}
        if self._pipeline is not None and self._balanced:
            layers = self._pipeline.in_order({name: values for found in self._pipeline.told(layers) for name, values in found.items()})
        if not layers:
            return {}
        total = {name: sum(values[name] for values in layers.values()) for name in next(iter(layers.values()))}
        return {name: value if name == "dead" else value / len(layers) for name, value in total.items()} | {"layers": layers}


def move_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """bias += rate sign(mean(counts) - counts), in place; `bias_E` may be a DTensor."""
    change_E = (rate * torch.sign(counts_E.mean() - counts_E)).to(local(bias_E).device, bias_E.dtype)
    if isinstance(bias_E, DTensor):
        change_E = distribute_tensor(change_E, bias_E.device_mesh, bias_E.placements, src_data_rank=None)
    local(bias_E).add_(local(change_E))


def statistics(router: BalancedRouter) -> dict[str, float]:
    """The numbers of one router of which something was counted."""
    load_E, sums, options = router.counts_E, dict(zip(SUMS, router.sums.tolist(), strict=True)), router.options
    tokens, log_E = sums["tokens"], math.log(router.experts) or 1.0
    found = {
        "max_violation": float(load_E.max() / load_E.mean()) - 1,
        "load_entropy": float(torch.special.entr(load_E / load_E.sum()).sum()) / log_E,
        "router_entropy": sums["entropy"] / tokens / log_E,
        "confidence": sums["confidence"] / tokens,
        "dropped": 1 - float(load_E.sum()) / (tokens * router.top_k),
        "dead": int((router.idle_E >= options["dead_after"]).sum()),
    }
    return found | {name: sums[name] / tokens for name in ("switch", "sequence", "z") if options[name]}


def in_words(report: dict[str, Any]) -> str:
    """A line for people about what `ExpertBalance.report` gave."""
    worst = max(report["layers"], key=lambda name: report["layers"][name]["max_violation"])
    said = f"experts: MaxVio {report['max_violation']:.2f} (most in {worst}: {report['layers'][worst]['max_violation']:.2f}), "
    losses = "".join(f", {name} loss {report[name]:.4g}" for name in ("switch", "sequence", "z") if name in report)
    return said + f"load entropy {report['load_entropy']:.3f}, router entropy {report['router_entropy']:.3f}, dead {report['dead']}{losses}"

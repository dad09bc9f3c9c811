"""Which products run in float8: by rule, or by time on this device. Every product gets a decision, with its reason."""

import time
from dataclasses import dataclass
from functools import cache

import torch

from ftc.float8.recipes import FINE, MULTIPLE
from ftc.float8.sites import Site


@dataclass(frozen=True)
class Decision:
    """One product: its parameter, sizes (x [..., k] W^T [k, n]), whether float8 takes it, and why. `impossible`: float8 could not, whoever asks."""

    weight: str
    k: int
    n: int
    float8: bool
    reason: str
    impossible: bool = False

    def __str__(self) -> str:
        return f"{self.weight} [{self.n}, {self.k}]: {'float8' if self.float8 else 'high precision'}, {self.reason}"


@dataclass(frozen=True)
class Rule:
    """Options of the pass that decide. `measure`: tokens to time with, 0 for none; `keep`: parts of the names of weights that stay."""

    recipe: str
    products: str = "auto"
    head: bool = False
    router: bool = False
    min_k: int = 1
    min_n: int = 1
    measure: int = 0
    keep: tuple[str, ...] = ()


def decide(site: Site, rule: Rule) -> Decision:
    """The decision for one product. Times it where the rule says so, once for each shape, dtype and device."""

    def say(float8: bool, reason: str, impossible: bool = False) -> Decision:
        return Decision(site.name, site.k, site.n, float8, reason, impossible)

    if site.role in ("head", "router") and not getattr(rule, site.role):
        return say(False, f"the {site.role} stays ({site.role} = true takes it)")
    named = next((word for word in rule.keep if word in site.name), None)
    if named is not None:
        return say(False, f"keep names it ({named})")
    odd = [size for size in (site.k, site.n) if size % MULTIPLE]
    if odd and rule.recipe != FINE:
        return say(False, f"float8 products need sizes in multiples of {MULTIPLE}, not {odd[0]}", True)
    for size, least, word in ((site.k, rule.min_k, "min_k"), (site.n, rule.min_n, "min_n")):
        if size < least:
            return say(False, f"{size} is less than {word} = {least}")
    if site.experts:
        why = _why_no_experts(site, rule)
        return say(not why, why or f"{site.experts} experts as grouped products, by rule", bool(why))
    if not rule.measure:
        return say(True, "by rule")
    value = site.weight.meta["val"]
    high, low = measured(rule.measure, site.k, site.n, value.dtype, str(value.device), rule.recipe, rule.products)
    times = f"{high:.3g} ms in {str(value.dtype).removeprefix('torch.')}, {low:.3g} ms in float8, {rule.measure} tokens forward and backward on {value.device}"
    return say(low < high, times)


def _why_no_experts(site: Site, rule: Rule) -> str:
    """Why the experts of a mixture cannot run in float8; empty where they can."""
    if rule.products == "scaled_mm" and site.weight.meta["val"].device.type == "cpu":
        return 'experts on the CPU are emulated (products = "auto" or "emulated")'
    rows = int(site.node.args[3].meta["val"].shape[1])
    return "" if rule.recipe == FINE or rows % MULTIPLE == 0 else f"the experts' first product has {rows} rows, no multiple of {MULTIPLE}"


@cache
def measured(tokens: int, k: int, n: int, dtype: torch.dtype, device: str, recipe: str, products: str) -> tuple[float, float]:
    """(high precision, float8): milliseconds of x W^T and both its gradients, the least of several rounds that take turns.

    On CUDA both are compiled first, as training does: without fusion the casts alone cost more than float8 saves.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(n, k, generator=generator).div_(k**0.5).to(device, dtype).requires_grad_()
    grad = torch.randn(tokens, n, generator=generator).to(device, dtype)

    def high(x, weight):
        return torch.nn.functional.linear(x, weight)

    def low(x, weight):
        return torch.ops.ftc.float8_linear(x, weight, None, recipe, "input", products)

    on_gpu = torch.device(device).type == "cuda"
    functions = [torch.compile(f, dynamic=False) if on_gpu else f for f in (high, low)]

    def run(function) -> float:
        start = time.perf_counter()
        for _ in range(5 if on_gpu else 1):
            torch.autograd.grad(function(x, weight), (x, weight), grad)
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / (5 if on_gpu else 1)

    with torch.enable_grad():
        for function in functions:
            run(function)
        rounds = [[run(function) for function in functions] for _ in range(5)]
    return min(r[0] for r in rounds), min(r[1] for r in rounds)

"""How much of the time of exchanges an order of forward and backward in one graph hides, on one device, with exchanges that are copies.

    python benchmarks/overlap.py            # blocks of an 8B model, bfloat16, 8,192 tokens: about a minute on an H100 or H200
    python benchmarks/overlap.py --cpu      # small blocks, exchanges that sleep: seconds, without a GPU

Each block is attention, an exchange, a gated MLP and an exchange, as with experts on other ranks. The forward of one microbatch and the backward of another
are merged into one graph and ordered by `ftc.pipeline.interleave` from measured costs. An exchange copies what goes through it to pinned host memory and
back on a stream of its own, as often as it takes for all exchanges together to last about as long as all compute. Rounds of four run in turns:

    compute        the merged graph without its exchanges
    copies         the exchanges alone, one behind the other
    one by one     the graph as it was merged: forward, then backward
    interleaved    in the order found

hidden = 1 - (interleaved - compute) / copies, in each round. Runs from a checkout without installation.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import finish

try:
    import ftc.pipeline.merge  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import ftc.pipeline.synthetic_exchange  # noqa: F401 - registers ftc::synthetic_exchange
from ftc.pipeline.communication import is_start, is_wait, lowered
from ftc.pipeline.interleave import interleave
from ftc.pipeline.interleave_costs import measured
from ftc.pipeline.merge import Merged, merge
from ftc.pipeline.merge_trace import Slot, trace

HIDDEN = 0.80
NOISE = 1e-2  # norm of the difference over norm: where a GPU has no kernel for attention's gradient that adds in one order


@dataclass(frozen=True)
class Size:
    """A block: width D, heads of 128 (or less) with a fourth as many for keys, width F of the MLP; `tokens` of one text; `layers` blocks in a stage."""

    tokens: int
    width: int
    heads: int
    inner: int
    layers: int
    dtype: torch.dtype
    device: str

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def weights(self) -> dict[str, torch.Tensor]:
        wide = self.width + 2 * self.width // 4
        shapes = {"qkv": (wide, self.width), "out": (self.width, self.width), "up": (2 * self.inner, self.width), "down": (self.inner, self.width)}
        found = {}
        for layer in range(self.layers):
            for name, (rows, columns) in shapes.items():
                shape = (columns, rows) if name == "down" else (rows, columns)
                tensor = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=shape[1] ** -0.5)
                found[f"{layer}.{name}"] = tensor.requires_grad_()
        return found

    def tokens_drawn(self) -> torch.Tensor:
        return torch.randn(1, self.tokens, self.width, dtype=torch.float32).to(self.device, self.dtype)


BLOCKS_8B = Size(8192, 4096, 32, 14336, 2, torch.bfloat16, "cuda")
SMALL = Size(192, 192, 4, 512, 2, torch.float32, "cpu")


def stage(size: Size, units: int):
    """The function of a stage: (weights by name, x [1, T, D]) -> [x]."""
    exchange = lambda x: torch.ops.ftc.synthetic_exchange(x, units)  # noqa: E731

    def attention(w, layer, x):
        q, k, v = F.linear(F.layer_norm(x, x.shape[-1:]), w[f"{layer}.qkv"]).split([size.width, size.width // 4, size.width // 4], -1)
        q, k, v = (t.unflatten(-1, (-1, size.head_dim)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.linear(y.transpose(1, 2).flatten(2), w[f"{layer}.out"])

    def function(w, x):
        for layer in range(size.layers):
            x = x + attention(w, layer, x)
            gate, up = F.linear(exchange(F.layer_norm(x, x.shape[-1:])), w[f"{layer}.up"]).chunk(2, -1)
            x = x + exchange(F.linear(F.silu(gate) * up, w[f"{layer}.down"]))
        return [x]

    return function


def without_exchanges(merged: Merged) -> Merged:
    """The same graph in which what is awaited is what was sent."""
    new = merged.in_order(list(merged.graph.nodes))
    for node in [n for n in new.graph.nodes if is_wait(n)]:
        start = node.args[0]
        node.replace_all_uses_with(start.args[0])
        new.graph.erase_node(node)
        new.graph.erase_node(start)
    return new


def exchanges(merged: Merged, size: Size):
    """A function that runs the exchanges alone, one behind the other."""
    starts = [node for node in merged.graph.nodes if is_start(node)]
    given = [(torch.zeros(node.meta["val"].shape, dtype=size.dtype, device=size.device), node.args[1]) for node in starts]

    def run():
        for x, units in given:
            torch.ops.ftc.synthetic_wait(torch.ops.ftc.synthetic_start(x, units))

    return run


def pair_of(size: Size, units: int):
    """(merged graph, inputs by place, weights): the forward of one microbatch, and the backward of another whose forward has run."""
    weights, front, back = size.weights(), size.tokens_drawn(), size.tokens_drawn()
    traced = trace(stage(size, units), weights, [back], [0])
    forward, backward = lowered(traced.forward), lowered(traced.backward)
    own = {Slot("parameter", name): tensor.detach() for name, tensor in weights.items()}
    done = forward(own | {Slot("input", 0): back})
    done[Slot("gradient", 0)] = torch.randn_like(done[Slot("result", 0)])
    merged = merge({"forward": forward, "backward": backward})
    given = {place: own[place[1]] if place[0] is None else front if place[0] == "forward" else done[place[1]] for place in merged.inputs}
    return merged, given


def in_turns(calls: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round is not kept."""
    taken = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)  # about 12 ms, in which launches queue up: the device is timed, not Python
                start.record()
                call()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                begin = time.perf_counter()
                call()
                seconds = time.perf_counter() - begin
            if index:
                taken[name].append(seconds)
    return taken


def summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(a.float()).clamp(min=1e-30)).item()


def units_for(size: Size, share: float) -> tuple[int, dict]:
    """Journeys of each exchange so that all together last about `share` of the compute, from a first measurement with one."""
    merged, given = pair_of(size, 1)
    values = [given[place] for place in merged.inputs]
    compute = without_exchanges(merged).boxed()
    taken = in_turns({"compute": lambda: compute(list(values)), "copies": exchanges(merged, size)}, 3, size.device)
    one, whole = statistics.median(taken["copies"]), statistics.median(taken["compute"])
    return max(1, round(share * whole / one)), {"compute_s": whole, "copies_of_one_journey_s": one}


def measure(size: Size, share: float, more_bytes: int | None, rounds: int) -> dict:
    units, first = units_for(size, share)
    merged, given = pair_of(size, units)
    found = interleave(merged, measured(merged, given), more_bytes)
    values = [given[place] for place in merged.inputs]
    graphs = {"compute": without_exchanges(found.graph), "one by one": merged, "interleaved": found.graph}
    functions = {name: graph.boxed() for name, graph in graphs.items()}
    calls = {name: lambda name=name: functions[name](list(values)) for name in functions}
    torch.use_deterministic_algorithms(True, warn_only=True)  # attention's backward adds in any order otherwise
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills new memory with NaN, so that what is read too soon shows
    pairs = list(zip(calls["one by one"](), calls["interleaved"](), strict=True))
    torch.use_deterministic_algorithms(False)
    same, away = all(torch.equal(a, b) for a, b in pairs), max(distance(a, b) for a, b in pairs)
    torch.use_deterministic_algorithms(False)
    calls["copies"] = exchanges(merged, size)
    taken = in_turns(calls, rounds, size.device)
    hidden = {
        name: summary([1 - (t - c) / x for t, c, x in zip(taken[name], taken["compute"], taken["copies"], strict=True)])
        for name in ("one by one", "interleaved")
    }
    speedup = summary([a / b for a, b in zip(taken["one by one"], taken["interleaved"], strict=True)])
    return {
        "share": share, "more_bytes": more_bytes, "units": units, "first": first, "same_bits": same, "distance": away, "hidden": hidden, "speedup": speedup,
        "seconds": {name: summary(times) for name, times in taken.items()}, "model": found.summary(),
    }  # fmt: skip


def rows_of(result: dict) -> list[tuple[str, str, str, bool | None]]:
    three = lambda found: f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"  # noqa: E731
    memory = "any memory" if result["more_bytes"] is None else f"{result['more_bytes']} bytes more memory"
    title = f"copies {result['seconds']['copies'][0] / result['seconds']['compute'][0]:.2f} of compute, {memory}"
    model = result["model"]
    rows = [
        (f"{title}: hidden", three(result["hidden"]["interleaved"]), f"at least {HIDDEN:.2f}", result["hidden"]["interleaved"][0] >= HIDDEN),
        ("    hidden one by one", three(result["hidden"]["one by one"]), "", None),
        ("    one by one over interleaved", three(result["speedup"]), "", None),
        ("    distance to one by one", f"{result['distance']:.1e}{' (same bits)' if result['same_bits'] else ''}", f"{NOISE:.0e}", result["distance"] <= NOISE),
        ("    by the model", f"{1 - model['exposed_interleaved_ms'] / model['transfers_ms']:.3f}; peak {model['peak_bytes_interleaved'] / 2**30:.2f} GiB, "
         f"one by one {model['peak_bytes_concatenated'] / 2**30:.2f}", "", None),
    ]  # fmt: skip
    return rows + [(f"    {name}", f"{times[0] * 1e3:.2f} ms ({times[1] * 1e3:.2f} to {times[2] * 1e3:.2f})", "", None) for name, times in result["seconds"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="small blocks on the CPU, exchanges that sleep")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5], help="copies over compute")
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --cpu runs a small one without")
    torch.manual_seed(0)
    size = SMALL if args.cpu else BLOCKS_8B
    rows, results = [], []
    for share in args.shares:
        for more in (0, None):
            results.append(measure(size, share, more, args.rounds))
            rows += rows_of(results[-1])
            print("  ".join(rows_of(results[-1])[0][:3]), flush=True)
    finish("overlap", rows, {"asked": HIDDEN, "tokens": size.tokens, "layers": size.layers, "results": results}, fail=args.check, json_out=args.json_out)


if __name__ == "__main__":
    main()

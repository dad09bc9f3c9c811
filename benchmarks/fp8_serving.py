"""Decode steps of an 8B-shaped stack: FP8 weights with FP8 activations by row against bfloat16.

    .venv/bin/python benchmarks/fp8_serving.py [--layers 4] [--batches 1 16 64] [--context 512] [--json-out FILE]
    .venv/bin/python benchmarks/fp8_serving.py --cpu        a smoke run at small sizes: nothing is timed for real

A layer is norm, one product for queries, keys and values, rotation, attention to a cache, output product, norm, one product for gate and up, SwiGLU, down;
width 4096, middle 14336, 32 heads on 8 of 128. Products of the FP8 stack are `ftc::quantized_linear`, what the pass `quantize{dtype=fp8, activations=dynamic}`
puts into a graph. Layers are compiled, a step of all layers is one CUDA graph, and both stacks are timed in turns. First the products alone: bfloat16,
`torch._scaled_mm` by row, and the skinny kernel at each of a few plans, the best of which the stack then uses.
"""

import argparse
import time
from statistics import median

import torch
from measure import finish, timing_options
from torch import Tensor, nn
from torch.nn import functional as F

import ftc.dialect  # noqa: F401  registers the operators
from ftc.quantize.formats import Format

FORMAT = Format.named("fp8-row-dynamic")
ASKED = 1.6
PLANS = [(64, 1), (64, 2), (64, 4), (64, 7), (64, 8), (128, 1), (128, 2), (128, 4)]


class Product(nn.Module):
    """x [B, D] times a weight, kept in bfloat16 or in FP8."""

    def __init__(self, weight: Tensor, fp8: bool):
        super().__init__()
        self.fp8, self.shape = fp8, list(weight.shape)
        stored = FORMAT.nearest(weight) if fp8 else None
        self.register_buffer("weight", stored.data if fp8 else weight)
        self.register_buffer("scale", stored.scale if fp8 else None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fp8:
            return F.linear(x, self.weight)
        return torch.ops.ftc.quantized_linear(x, self.weight, self.scale, None, None, None, "fp8", FORMAT.block(self.shape), self.shape[1], "dynamic")


class Layer(nn.Module):
    """One block on one token of each of B sequences, x [B, D], with a cache [B, G, T, K] that is full but for the last place."""

    def __init__(self, sizes: dict, fp8: bool, weights: dict[str, Tensor]):
        super().__init__()
        self.heads, self.groups, self.width = sizes["heads"], sizes["groups"], sizes["width"]
        self.norms = nn.ParameterList([nn.Parameter(torch.ones_like(weights["o"][:, 0]), requires_grad=False) for _ in range(2)])
        self.products = nn.ModuleDict({name: Product(weight, fp8) for name, weight in weights.items()})

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, at = x.shape[0], keys.shape[2] - 1
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0], 1e-5)
        q, k, v = self.products["qkv"](normed).view(batch, -1, self.width).split([self.heads, self.groups, self.groups], 1)
        q, k = (part * cos + torch.cat([-part[..., self.width // 2 :], part[..., : self.width // 2]], -1) * sin for part in (q, k))
        keys[:, :, at], values[:, :, at] = k, v
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        x = x + self.products["o"](out.reshape(batch, -1))
        gate, up = self.products["gate_up"](F.rms_norm(x, x.shape[-1:], self.norms[1], 1e-5)).chunk(2, -1)
        return x + self.products["down"](F.silu(gate) * up)


def shapes(sizes: dict) -> dict[str, tuple[int, int]]:
    model, middle, width = sizes["model"], sizes["middle"], sizes["width"]
    attention = sizes["heads"] * width
    return {"qkv": (attention + 2 * sizes["groups"] * width, model), "o": (model, attention), "gate_up": (2 * middle, model), "down": (model, middle)}


def stacks(sizes: dict, layers: int, device: str) -> dict[str, list[Layer]]:
    """The same weights twice."""
    made: dict[str, list[Layer]] = {"bfloat16": [], "fp8": []}
    for layer in range(layers):
        torch.manual_seed(layer)
        weights = {name: (torch.randn(shape, device=device) * shape[1] ** -0.5).to(torch.bfloat16) for name, shape in shapes(sizes).items()}
        for name, stack in made.items():
            stack.append(Layer(sizes, name == "fp8", weights).eval())
    return made


def step_of(stack: list[Layer], layer_of, sizes: dict, batch: int, context: int, device: str):
    """A function of no arguments that runs one token of each sequence through all layers, and the tensor that it leaves its result in."""
    torch.manual_seed(1)
    shape = (len(stack), batch, sizes["groups"], context, sizes["width"])
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    angles = torch.rand(sizes["width"] // 2, device=device).repeat(2)
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    x, result = torch.randn(batch, sizes["model"], device=device, dtype=torch.bfloat16), torch.empty(batch, sizes["model"], device=device, dtype=torch.bfloat16)

    def step() -> None:
        hidden = x
        for number, layer in enumerate(stack):
            hidden = layer_of(layer, hidden, keys[number], values[number], cos, sin)
        result.copy_(hidden)

    return step, result


def graph_of(call, warm: int = 3) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, after a few runs on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        from ftc.kernels import skinny_fp8

        skinny_fp8.reserve(torch.device("cuda", torch.cuda.current_device()))
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def microseconds(*graphs: torch.cuda.CUDAGraph, rounds: int, repeats: int) -> list[float]:
    """Median microseconds of one replay of each, timed in turns."""
    taken: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for number, graph in enumerate(graphs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            taken[number].append(start.elapsed_time(end) * 1e3 / repeats)
    return [median(each) for each in taken]


def tune(sizes: dict, rows: int, deadline: float) -> list[dict]:
    """Each product at `rows` rows by the ways there are; the best plan of the skinny kernel is kept. Weights are several, so that none stays in a cache."""
    from ftc.kernels import skinny_fp8

    found = []
    for name, shape in shapes(sizes).items():
        copies = max(2, int(256e6 / (shape[0] * shape[1])))
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        stored = [FORMAT.nearest(w) for w in weights]
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        codes, by_row = ftc.dialect.quantized_linear.quantize_rows(x, [1, shape[1]], None)
        ways = {"bfloat16": lambda x=x, weights=weights: [F.linear(x, w) for w in weights]}
        ways["scaled_mm"] = lambda c=codes, r=by_row, stored=stored: [
            torch._scaled_mm(c, s.data.t(), r, s.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True) for s in stored
        ]
        times = {}
        for way, call in ways.items():
            times[way] = microseconds(graph_of(call), rounds=5, repeats=5)[0] / copies
        key, plans = (shape[0], shape[1], max(16, 1 << (rows - 1).bit_length())), {}
        exact = codes.float() @ stored[0].data.float().t() * by_row * stored[0].scale.t()
        for plan in PLANS:
            if (shape[1] // 256) % plan[1] or time.perf_counter() > deadline:
                continue
            skinny_fp8.tuned[key] = plan
            call = lambda c=codes, r=by_row, stored=stored: [skinny_fp8.product(c, r, s.data, s.scale, None, torch.bfloat16) for s in stored]  # noqa: E731
            error = float((call()[0].float() - exact).abs().max() / exact.abs().max())
            assert error < 2e-2, f"the skinny kernel is off by {error} for {shape}, plan {plan}"
            plans[plan] = microseconds(graph_of(call), rounds=5, repeats=5)[0] / copies
        if plans:
            skinny_fp8.tuned[key] = min(plans, key=plans.get)
            times["skinny"] = min(plans.values())
        else:
            skinny_fp8.tuned.pop(key, None)
        size = shape[0] * shape[1]
        found.append({"product": name, "rows": rows, "plan": skinny_fp8.tuned.get(key), "us": times, "tb_per_s": {w: size * (2 if w == "bfloat16" else 1) / t / 1e6 for w, t in times.items()}})
        del weights, stored, ways
    return found


def smoke() -> None:
    """Both stacks on the CPU at small sizes, eagerly; the FP8 one must be near the other."""
    sizes = {"model": 64, "middle": 96, "heads": 4, "groups": 2, "width": 16}
    made = stacks(sizes, 2, "cpu")
    results = {}
    with torch.no_grad():
        for name, stack in made.items():
            step, results[name] = step_of(stack, lambda layer, *a: layer(*a), sizes, 3, 8, "cpu")
            step()
    error = float((results["fp8"].float() - results["bfloat16"].float()).norm() / results["bfloat16"].float().norm())
    finish("fp8_serving", [("smoke run on the CPU: FP8 against bfloat16, relative distance", f"{error:.3f}", "below 0.1", error < 0.1)], {"cpu": True, "error": error})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cpu", action="store_true")
    timing_options(parser)
    args = parser.parse_args()
    if args.cpu:
        smoke()
        return
    began = time.perf_counter()
    sizes = {"model": 4096, "middle": 14336, "heads": 32, "groups": 8, "width": 128}
    rows, record = [], {"layers": args.layers, "context": args.context, "products": [], "steps": {}}
    with torch.no_grad():
        for count in sorted({max(16, 1 << (batch - 1).bit_length()) for batch in args.batches} & {16, 64}):
            for each in tune(sizes, count, began + 35):
                record["products"].append(each)
                words = ", ".join(f"{way} {t:.1f} us ({each['tb_per_s'][way]:.2f} TB/s)" for way, t in each["us"].items())
                rows.append((f"product {each['product']}, {count} rows", f"{words}; plan {each['plan']}", "", None))
        made = stacks(sizes, args.layers, "cuda")
        for batch in args.batches:
            if time.perf_counter() - began > 75:
                rows.append((f"{batch} sequences", "left out: the time is up", "", None))
                continue
            graphs, results, kept = [], [], []
            for stack in made.values():
                compiled = torch.compile(lambda layer, *a: layer(*a), dynamic=False)
                step, result = step_of(stack, compiled, sizes, batch, args.context, "cuda")
                graphs.append(graph_of(step))
                results.append(result)
                kept.append(step)  # a graph reads tensors that it does not hold
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
            error = float((results[1].float() - results[0].float()).norm() / results[0].float().norm())
            times = microseconds(*graphs, rounds=max(args.rounds, 7), repeats=20)
            ratio = times[0] / times[1]
            rates = [batch / t * 1e6 for t in times]
            record["steps"][batch] = {"us": times, "tokens_per_s": rates, "ratio": ratio, "distance": error}
            rows.append((f"{batch} sequences, {args.layers} layers", f"{rates[0]:,.0f} tokens/s bfloat16, {rates[1]:,.0f} FP8, {ratio:.2f}x; distance {error:.3f}", f"{ASKED}x", ratio >= ASKED))
    record["seconds"] = time.perf_counter() - began
    finish("fp8_serving", rows, record | {"asked": ASKED}, args.check, args.json_out)


if __name__ == "__main__":
    main()

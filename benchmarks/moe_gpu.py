"""A mixture of experts on a GPU, forward and backward: time against the machine's matrix rate, activations against the plain grouped form.

    python benchmarks/moe_gpu.py              # 64 and 128 experts, 8 a token, 8,192 tokens, bfloat16: about four minutes
    python benchmarks/moe_gpu.py --check      # only the comparisons with the definition and the plain form
    python benchmarks/moe_gpu.py --sweep      # tiles for each kernel: what `choose_tiles` comes from

The plain form sorts the slots, gathers their tokens, multiplies with PyTorch's grouped_mm, silu(gate) * up, multiplies again, unsorts and weighs,
differentiated by autograd. Both forms and a square product of 8192 run in turns, so that clocks that drift hit all alike; the matrix rate is that of
the product. A share counts the products that the gradient needs (18 N K D F), not those that are done again to keep no activations (22 N K D F
in all). Activation memory is the peak above inputs, parameter gradients left out, from the allocator's own history.
Runs from a checkout without installation; needs CUDA and Triton.

Legend: N tokens, K experts a token, S = N K slots, D model, F middle, E experts.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import finish

try:
    import ftc.dialect  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ftc.dialect  # noqa: F401

from ftc.dialect import moe

TOKENS, SHARE = 8192, 8
SIDE = 8192  # of the square product that the matrix rate is measured with
RATE_SHARE, RATE_AIM, MEMORY_RATIO = 0.60, 0.85, 0.55
ERROR = 2e-2  # bfloat16, norm of the difference over norm
NAMES = ("x", "weights", "gate_up", "down", "gate_up bias", "down bias")


@dataclass(frozen=True)
class Size:
    experts: int
    width: int
    inner: int

    @property
    def flops(self) -> int:
        """Of the forward and the gradients: three products of each slot with each of the three matrices."""
        return 18 * TOKENS * SHARE * self.width * self.inner

    def __str__(self) -> str:
        return f"E {self.experts}, D {self.width}, F {self.inner}"


SIZES = (Size(64, 2048, 768), Size(128, 2048, 768), Size(64, 4096, 1536), Size(128, 4096, 1536))


def draw_routing(num_tokens: int, experts: int, share: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token from random logits: counts that differ by chance, as a balanced router's do. (indices, float32 weights) [N, K]."""
    weights, indices = torch.softmax(torch.randn(num_tokens, experts, device="cuda"), -1).topk(share, -1)
    return indices, weights / weights.sum(-1, keepdim=True)


def draw(size: Size) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[x, weights, gate_up, down], all with gradients, the indices, and the gradient of the result."""
    generate = lambda *shape, scale=1.0: torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=scale)  # noqa: E731
    indices, weights = draw_routing(TOKENS, size.experts, SHARE)
    x, grad = generate(TOKENS, size.width), generate(TOKENS, size.width)
    gate_up = generate(size.experts, 2 * size.inner, size.width, scale=size.width**-0.5)
    down = generate(size.experts, size.width, size.inner, scale=size.inner**-0.5)
    return [tensor.requires_grad_() for tensor in (x, weights, gate_up, down)], indices, grad


def plain(x, indices, weights, gate_up, down):
    """The form that models write, with grouped products; weights in the dtype of the tokens, weighed and summed by one batched product."""
    experts, share = gate_up.shape[0], indices.shape[1]
    sorted_S, slot_S = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_S, torch.arange(experts, device=x.device), right=True, out_int32=True)
    rows = x[slot_S // share]
    gate, up = torch.nn.functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows[slot_S.argsort()].view(*indices.shape, -1)
    return torch.bmm(weights.to(x.dtype)[:, None], rows)[:, 0]


def fused(x, indices, weights, gate_up, down):
    return torch.ops.ftc.fused_moe(x, indices, weights, gate_up, down)


def step(form, tensors, indices, grad):
    """(result, *gradients of x, weights, gate_up, down)."""
    x, weights, gate_up, down = tensors
    out = form(x, indices, weights, gate_up, down)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def in_turns(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, one after the other; the first two rounds are not kept."""
    taken = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(10_000_000)  # about 6 ms, in which the launches of a call queue up: kernels are timed, not Python
            start.record()
            call()
            end.record()
            end.synchronize()
            if index >= 2:
                taken[name].append(start.elapsed_time(end) / 1e3)
    return taken


def peak_bytes(events: list[dict], left_out: set[int]) -> int:
    """The most that is allocated at one time by an allocator's history, without the last blocks at the addresses `left_out`."""
    last = {event["addr"]: index for index, event in enumerate(events) if event["action"] == "alloc" and event["addr"] in left_out}
    live, peak = {}, 0
    now = 0
    for index, event in enumerate(events):
        if event["action"] == "alloc" and last.get(event["addr"]) != index:
            live[event["addr"]] = event["size"]
            now += event["size"]
        elif event["action"] == "free_completed":
            now -= live.pop(event["addr"], 0)
        peak = max(peak, now)
    return peak


def memory(form, tensors, indices, grad) -> dict[str, int]:
    """Bytes above the inputs at the peak of one step: "activations", without gradients of gate_up and down, and "total", with them."""
    step(form, tensors, indices, grad)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=1_000_000, clear_history=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step(form, tensors, indices, grad)
    torch.cuda.synchronize()
    total = torch.cuda.max_memory_allocated() - before
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(None)
    found = peak_bytes(events, set())
    assert abs(found - total) <= 0.01 * total, f"the allocator's history says {found} bytes at the peak, its counters {total}"
    return {"activations": peak_bytes(events, {kept[3].data_ptr(), kept[4].data_ptr()}), "total": total}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(got.float() - expected.float()) / torch.linalg.vector_norm(expected.float())).item()


def compare_forms(size: Size) -> float:
    """The largest distance between the plain form's result or gradients and ours."""
    tensors, indices, grad = draw(size)
    ours, theirs = (step(form, tensors, indices, grad) for form in (fused, plain))
    return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))


def definition_cases():
    """(name, limit, distance) over the paths of the kernels at small sizes, against the definition in float64 on the device."""
    from ftc.kernels import grouped_experts

    for dtype, limit, width, inner, gated, biased, activation, on_input in (
        (torch.bfloat16, 1.5e-2, 256, 128, True, False, "silu", False),
        (torch.bfloat16, 1.5e-2, 200, 72, True, True, "clamped_swish", False),  # no descriptors: sizes are no multiples of the depth
        (torch.bfloat16, 1.5e-2, 256, 192, True, True, "silu", True),
        (torch.float16, 2e-3, 128, 128, False, True, "gelu_tanh", False),
        (torch.float32, 1e-5, 96, 72, True, True, "gelu", False),
    ):
        for num_tokens in (600, 30):  # tiles of 128 rows and of 16
            torch.manual_seed(0)
            experts, share, high = 7, 3, inner * (2 if gated else 1)
            indices, weights = draw_routing(num_tokens, experts - 1, share)  # the last expert gets none
            indices[torch.rand(indices.shape, device="cuda") < 0.1] = experts
            generate = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float64)  # noqa: E731
            rest = [generate(experts, high, width) * width**-0.5, generate(experts, width, inner) * inner**-0.5]
            rest += [generate(experts, high), generate(experts, width)] if biased else [None, None]
            tensors = [generate(num_tokens, width).to(dtype), weights, *(None if t is None else t.to(dtype) for t in rest)]
            wide = [None if t is None else t.double() for t in tensors]
            grad, want = generate(num_tokens, width).to(dtype), [t is not None for t in tensors]
            options = {"activation": activation, "constants": [1.7, 7.0] if activation == moe.CLAMPED else [], "weight_on_input": on_input}
            x, *others = tensors
            assert grouped_experts.supported(x, others[1], others[2], others[0])
            out = grouped_experts.forward(x, indices, *others, *options.values())
            found = grouped_experts.backward(grad, x, indices, *others, *options.values(), want)
            expected = moe.gradients(grad.double(), wide, indices, options, want)
            pairs = {"out": (out, moe.definition(wide[0], indices, *wide[1:], **options))}
            pairs |= {name: pair for name, pair, w in zip(NAMES, zip(found, expected, strict=True), want, strict=True) if w}
            worst = max(pairs, key=lambda name: distance(*pairs[name]))
            kind = f"{'gated' if gated else 'plain'} {activation}{', biases' if biased else ''}{', weight on input' if on_input else ''}"
            yield f"{dtype} D {width} F {inner} N {num_tokens} {kind}: worst in {worst}", limit, distance(*pairs[worst])


def check() -> tuple[list, dict]:
    rows, results = [], []

    def add(name, limit, error):
        print(f"{'ok  ' if error <= limit else 'FAIL'} {name}: {error:.1e}", flush=True)
        rows.append((name, f"{error:.1e}", f"{limit:.0e}", error <= limit))
        results.append({"case": name, "error": error, "limit": limit})

    for case in definition_cases():
        add(*case)
    for size in SIZES[:1]:
        add(f"{size}: fused and plain grouped form", ERROR, compare_forms(size))
    return rows, {"cases": results}


def kernel_calls(size: Size, tensors, indices, grad, tiles):
    """(name, flops, function) of each kernel of a step, on inputs as the step has them."""
    from ftc.kernels import grouped_experts_backward as backward
    from ftc.kernels import grouped_experts_forward as forward
    from ftc.kernels.expert_order import expert_order

    x, weights, gate_up, down = (tensor.detach() for tensor in tensors)
    order = expert_order(indices, size.experts, tiles.rows)
    unit = 2 * TOKENS * SHARE * size.width * size.inner
    want = {"h": True, "pre": True, "weight": True, "bias": False}
    up = lambda: forward.up(x, order, weights, gate_up, None, "silu", [], False, size.inner, tiles.up)  # noqa: E731
    middle = lambda: backward.middle_of(grad, x, order, weights, gate_up, down, None, "silu", [], False, want, tiles.middle)  # noqa: E731
    h, found = up(), middle()
    y = forward.slots(h, order, down, None, True, tiles.down)
    down_grad, gate_up_grad = torch.empty_like(down), torch.empty_like(gate_up)
    yield "order", 0, lambda: expert_order(indices, size.experts, tiles.rows)
    yield "up", 2 * unit, up
    yield "down", unit, lambda: forward.slots(h, order, down, None, True, tiles.down)
    yield "sum", 0, lambda: forward.sum_slots(y, indices, weights, size.experts, x.dtype)
    yield "middle", 3 * unit, middle
    yield "matrices (down)", unit, lambda: backward.matrices(grad, found["h"], True, order, down_grad, tiles.matrices)
    yield "matrices (gate_up)", 2 * unit, lambda: backward.matrices(found["pre"], x, False, order, gate_up_grad, tiles.matrices)
    yield "tokens", 2 * unit, lambda: forward.slots(found["pre"], order, gate_up, None, False, tiles.tokens)


def square():
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: torch.mm(a, b)


def share_of_rate(flops: float, taken: list[float], product: list[float]) -> float:
    """Median over rounds of the rate over that of the square product in the same round."""
    return statistics.median(flops / t / (2 * SIDE**3 / p) for t, p in zip(taken, product, strict=True))


def measure_size(size: Size, rounds: int) -> tuple[list, dict]:
    from ftc.kernels.grouped_product import choose_tiles

    tensors, indices, grad = draw(size)
    bytes_ = {name: memory(form, tensors, indices, grad) for name, form in (("fused", fused), ("plain", plain))}
    torch.cuda.empty_cache()
    calls = {"mm": square(), "fused": lambda: step(fused, tensors, indices, grad), "plain": lambda: step(plain, tensors, indices, grad)}
    taken = in_turns(calls, rounds)
    shares = {name: share_of_rate(size.flops, taken[name], taken["mm"]) for name in ("fused", "plain")}
    tiles = choose_tiles(torch.bfloat16, TOKENS * SHARE, size.experts)
    kernels = list(kernel_calls(size, tensors, indices, grad, tiles))
    each = in_turns({"mm": calls["mm"], **{name: call for name, _, call in kernels}}, max(3, rounds // 2))
    result = {
        "experts": size.experts, "width": size.width, "inner": size.inner, "matrix_flops_per_s": 2 * SIDE**3 / statistics.median(taken["mm"]),
        **{f"{name}_s": statistics.median(taken[name]) for name in taken}, "rate_share": shares["fused"], "plain_rate_share": shares["plain"],
        "done_rate_share": shares["fused"] * 22 / 18, "speedup": statistics.median(p / f for p, f in zip(taken["plain"], taken["fused"], strict=True)),
        "memory_ratio": bytes_["fused"]["activations"] / bytes_["plain"]["activations"], "bytes": bytes_,
        "kernels": {
            name: {"seconds": statistics.median(each[name]), "rate_share": share_of_rate(flops, each[name], each["mm"])} for name, flops, _ in kernels
        },
    }  # fmt: skip
    return rows_of(size, result), result


def rows_of(size: Size, result: dict) -> list[tuple[str, str, str, bool | None]]:
    gibibytes = {name: result["bytes"][name]["activations"] / 2**30 for name in ("fused", "plain")}
    rows = [
        (
            f"{size}: share of the matrix rate",
            f"{result['rate_share']:.2f} ({result['fused_s'] * 1e3:.2f} ms; {result['done_rate_share']:.2f} with what is done again)",
            f"at least {RATE_SHARE:.2f}, aim {RATE_AIM:.2f}",
            result["rate_share"] >= RATE_SHARE,
        ),
        (
            f"{size}: activations over plain",
            f"{result['memory_ratio']:.2f} ({gibibytes['fused']:.2f} / {gibibytes['plain']:.2f} GiB)",
            f"at most {MEMORY_RATIO:.2f}",
            result["memory_ratio"] <= MEMORY_RATIO,
        ),
        (f"{size}: plain form", f"share {result['plain_rate_share']:.2f}, {result['plain_s'] * 1e3:.2f} ms: {result['speedup']:.2f} x ours", "", None),
    ]
    for name, kernel in result["kernels"].items():
        rows.append((f"    {name}", f"{kernel['seconds'] * 1e3:7.3f} ms  matrix {kernel['rate_share']:.2f}", "", None))
    return rows


def grid(seconds: float, rounds: int) -> tuple[list, dict]:
    """The comparisons, then all sizes, smallest first, until `seconds` have passed."""
    started = time.monotonic()
    rows, result = check()
    sizes = []
    for size in SIZES:
        if time.monotonic() - started > seconds:
            rows.append((str(size), f"not within {seconds:.0f} s", "", False))
            continue
        try:
            found, numbers = measure_size(size, rounds)
        except Exception as error:  # one size that fails must not hide the others
            found, numbers = [(str(size), f"{type(error).__name__}: {str(error)[:300]}", "", False)], {"size": str(size), "error": str(error)[:300]}
        torch.cuda.empty_cache()
        for row in found:
            print("  ".join(str(part) for part in row[:3]), flush=True)
        rows += found
        sizes.append(numbers)
    asked = {"rate_share": RATE_SHARE, "rate_share_aim": RATE_AIM, "memory_ratio": MEMORY_RATIO}
    return rows, {"tokens": TOKENS, "share": SHARE, "asked": asked, **result, "sizes": sizes}


def sweep_tiles() -> dict[str, list]:
    """Tiles to try for each kernel, all of 128 rows but one family of 64."""
    from ftc.kernels.grouped_product import Tile

    pairs = [Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 3), Tile(128, 64, 64, 8, 4), Tile(64, 128, 64, 4, 3)]
    whole = [Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(64, 256, 64, 4, 3)]
    matrices = [Tile(128, 256, 64, 8, 5), Tile(128, 256, 64, 8, 7), Tile(128, 128, 64, 8, 5), Tile(128, 128, 64, 4, 5), Tile(256, 128, 64, 8, 5)]
    middle = [Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)]
    return {"up": pairs, "down": whole, "tokens": whole, "middle": middle, "matrices": matrices}


def sweep(seconds: float, rounds: int) -> tuple[list, dict]:
    """Each kernel alone with each tile, the others as they are chosen (with 64 rows where the tile has them)."""
    from dataclasses import replace

    from ftc.kernels.grouped_product import choose_tiles

    started, rows, results = time.monotonic(), [], []
    for size in SIZES:
        tensors, indices, grad = draw(size)
        product = square()
        chosen = {rows_: choose_tiles(torch.bfloat16, rows_ * size.experts, size.experts) for rows_ in (64, 128)}
        for kernel, candidates in sweep_tiles().items():
            for tile in candidates:
                if time.monotonic() - started > seconds:
                    return rows, {"sweep": results}
                try:
                    tiles = replace(chosen[64 if tile.rows == 64 else 128], **{kernel: tile})
                    calls = [one for one in kernel_calls(size, tensors, indices, grad, tiles) if one[0].startswith(kernel)]
                    taken = in_turns({"mm": product, **{name: call for name, _, call in calls}}, rounds)
                    shares = {name: share_of_rate(flops, taken[name], taken["mm"]) for name, flops, _ in calls}
                    outcome = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
                except Exception as error:
                    outcome, shares = f"{type(error).__name__}: {str(error)[:120]}", {}
                print(f"{size}  {tile}: {outcome}", flush=True)
                rows.append((f"{size} {tile}", outcome, "", None))
                results.append({"size": str(size), "kernel": kernel, "tile": str(tile), "rate_share": shares})
        torch.cuda.empty_cache()
    return rows, {"sweep": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with the definition and the plain form; exit code 1 where they differ")
    parser.add_argument("--sweep", action="store_true", help="tiles of each kernel")
    parser.add_argument("--seconds", type=float, default=300, help="stop starting new measurements after this")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json-out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.manual_seed(0)
    rows, result = check() if args.check else sweep(args.seconds, 5) if args.sweep else grid(args.seconds, args.rounds)
    finish("moe_gpu", rows, result, fail=args.check, json_out=args.json_out)


if __name__ == "__main__":
    main()

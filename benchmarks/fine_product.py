"""Fine-grained FP8 on a GPU: the rate of its products against the machine's tensorwise FP8 rate, same shapes, same run, in turns.

    python benchmarks/fine_product.py              # shapes of an 8B decoder, forward, input and weight gradient: under two minutes
    python benchmarks/fine_product.py --check      # only the comparison of every kernel with the plain PyTorch reference
    python benchmarks/fine_product.py --sweep      # tiles: what `BY_BLOCK_TILE` and `BY_TILE_TILE` come from; under four minutes

Tensorwise is torch._scaled_mm with one scale an operand and fast accumulation; the form without fast accumulation, which training uses for
gradients, is timed as well. A rate counts 2 M N K operations. A kernel that fails is named and left out; the others go on.
Runs from a checkout without installation; needs CUDA and Triton.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import finish

try:
    import ftc.float8.fine as fine
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ftc.float8.fine as fine

ASKED = 0.60
TOKENS = 8192
LAYERS = ((6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336))  # (out, in) of one decoder block of 8B: qkv, o, gate or up, down
ERROR = 1e-3  # norm of the difference to the reference over its norm; tensor cores add 128 terms with about 14 bits, so 6e-5 a step
HOPPER_WORKS = True  # set by main: False where its kernel hung or crashed when tried alone
REPEAT = 4  # launches in one timing, so that clocks are those of work that goes on


@dataclass(frozen=True)
class Product:
    """One product of a linear layer: [rows, depth] x [columns, depth]^T."""

    kind: str
    rows: int
    columns: int
    depth: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.columns * self.depth

    def __str__(self) -> str:
        return f"{self.kind} {self.rows} x {self.columns} x {self.depth}"


def products(tokens: int) -> list[Product]:
    """The three products of every layer."""
    found = []
    for out, wide in LAYERS:
        found += [Product("forward", tokens, out, wide), Product("input gradient", tokens, wide, out), Product("weight gradient", out, wide, tokens)]
    return found


def draw(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda").mul_(torch.randn(rows, 1, device="cuda").exp_()).to(dtype)


def operands(product: Product) -> tuple[torch.Tensor, ...]:
    """(a, scales, b, scales) as the product has them: b by blocks, but for the weight gradient by tiles."""
    from ftc.kernels import fine_quantise

    a, b = draw(product.rows, product.depth), draw(product.columns, product.depth)
    second = fine_quantise.tiles(b) if product.kind == "weight gradient" else fine_quantise.blocks(b, False)
    return *fine_quantise.tiles(a), *second


def portable(*args):
    from ftc.kernels import fine_product

    return fine_product.product(*args, dtype=torch.bfloat16, tile=fine_product.TILE)


def hopper(*args, tile=None, dtype=torch.bfloat16):
    from ftc.kernels import fine_product_hopper

    if torch.cuda.get_device_capability()[0] != 9 or not HOPPER_WORKS:
        raise RuntimeError("the Hopper kernel needs compute capability 9.0, and to have come back when it was tried alone")
    return fine_product_hopper.product(*args, dtype=dtype, tile=tile)


def tensorwise(a, _, b, __, fast: bool = True):
    one = torch.ones((), device="cuda")
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def attempt(what: str, call: Callable, failed: list[str]):
    """call(), or None with the failure printed and kept."""
    try:
        return call()
    except Exception as error:
        text = f"{what}: {type(error).__name__}: {str(error).strip()[-600:]}"
        print("FAILED", text, flush=True)
        failed.append(text)
        return None


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected)).item()


def check_quantise(failed: list[str]) -> list[tuple]:
    """The kernels that quantise against the reference: how many numbers differ."""
    from ftc.kernels import fine_quantise as kernels

    worst = {}
    for rows, columns in ((256, 512), (300, 200), (1, 7), (1000, 4096)):
        for power in (False, True):
            x = draw(rows, columns)
            tiles, blocks = fine.quantise_tiles(x, power), fine.quantise_blocks(x, power)
            cases = {
                "tiles": (lambda x=x, p=power: kernels.tiles(x, p), tiles),
                "tiles, both ways": (lambda x=x, p=power: kernels.tiles_both(x, p), (*tiles, *fine.quantise_tiles(x.t(), power))),
                "blocks": (lambda x=x, p=power: kernels.blocks(x, False, p), blocks),
                "blocks, turned": (lambda x=x, p=power: kernels.blocks(x, True, p), fine.turn_blocks(*blocks, columns)),
                "tiles, turned": (lambda t=tiles, c=columns, p=power: kernels.turn_tiles(*t, c, p), fine.turn_tiles(*tiles, columns, power)),
            }
            for name, (call, expected) in cases.items():
                got = attempt(f"quantise {name} {rows} x {columns}", call, failed)
                if got is not None:
                    differ = sum(int((g.float() != e.float()).sum()) for g, e in zip(got, expected, strict=True))
                    worst[name] = max(worst.get(name, 0), differ)
    return [(f"quantise, {name}: numbers unlike the reference", str(count), "0", count == 0) for name, count in worst.items()]


def check_products(failed: list[str]) -> list[tuple]:
    """Both kernels against the reference in float64, for ragged sizes, by block and by tile, with and without bias, 16 and 32 bits out."""
    worst = {}
    for rows, columns, depth in ((256, 256, 512), (1000, 712, 1000), (64, 128, 100), (8, 8, 128), (4096, 4096, 4096)):
        for by_block in (True, False):
            product = Product("forward" if by_block else "weight gradient", rows, columns, depth)
            args = operands(product)
            bias = draw(1, columns)[0]
            expected = fine.product(*args, bias, dtype=torch.float64)
            for name, call in (
                ("portable kernel", lambda a=args, b=bias: portable(*a, b)),
                ("Hopper kernel", lambda a=args, b=bias: hopper(*a, b)),
                ("Hopper kernel, 32 bits", lambda a=args, b=bias: hopper(*a, b, dtype=torch.float32)),
            ):
                got = attempt(f"{name}, {product}", call, failed)
                torch.cuda.synchronize()
                if got is not None:
                    # bfloat16 rounds the result by 2^-9 at most, 1.7e-3 of the norm
                    found = distance(got, expected.to(got.dtype).double())
                    worst[name] = max(worst.get(name, 0.0), found)
    limit = {name: ERROR if "32" in name else 3e-3 for name in worst}
    return [(f"{name}: difference to the reference", f"{found:.1e}", f"{limit[name]:.0e}", found <= limit[name]) for name, found in worst.items()]


def in_turns(calls: dict[str, Callable], rounds: int, failed: list[str], what: str) -> dict[str, float]:
    """Median seconds of each call that works, REPEAT launches a timing, one after the other; the first round is not kept."""
    taken = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name in list(taken):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

            def once(call=calls[name], start=start, end=end):
                torch.cuda._sleep(2_000_000)  # about 1 ms, in which launches queue up: kernels are timed, not Python
                start.record()
                for _ in range(REPEAT):
                    call()
                end.record()
                end.synchronize()
                return start.elapsed_time(end) / 1e3 / REPEAT

            seconds = attempt(f"{name}, {what}", once, failed)
            if seconds is None:
                del taken[name]
            elif index:
                taken[name].append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_rates(rounds: int, failed: list[str]) -> tuple[list[tuple], dict]:
    """Each product of each layer: tensorwise with and without fast accumulation, the Hopper kernel, the portable kernel."""
    rows, record, sums = [], {}, {}
    for product in [*products(TOKENS), *[p for p in products(TOKENS // 2) if p.kind == "forward"]]:
        args = operands(product)
        calls = {
            "tensorwise": lambda a=args: tensorwise(*a), "tensorwise, exact sums": lambda a=args: tensorwise(*a, fast=False),
            "fine": lambda a=args: hopper(*a), "fine, portable": lambda a=args: portable(*a),
        }  # fmt: skip
        found = in_turns(calls, rounds, failed, str(product))
        rates = {name: product.operations / seconds / 1e12 for name, seconds in found.items()}
        record[str(product)] = {"us": {name: seconds * 1e6 for name, seconds in found.items()}, "tflops": rates}
        print(f"{product}: " + ", ".join(f"{name} {rate:,.0f} TFLOP/s" for name, rate in rates.items()), flush=True)
        if "fine" in found and "tensorwise" in found:
            share = found["tensorwise"] / found["fine"]
            rows.append((f"{product}: share of the tensorwise rate", f"{share:.3f}", f"{ASKED}", share >= ASKED))
            both = sums.setdefault(product.kind, [0.0, 0.0])
            both[0], both[1] = both[0] + found["tensorwise"], both[1] + found["fine"]
    rows += [(f"all of {kind}", f"{tensorwise_s / fine_s:.3f}", f"{ASKED}", None) for kind, (tensorwise_s, fine_s) in sums.items()]
    return rows, record


def measure_layer(rounds: int, failed: list[str]) -> tuple[list[tuple], dict]:
    """A linear layer forward and backward, quantising included, against bfloat16; and what quantising alone moves a second."""
    from ftc.kernels import fine_product, fine_quantise

    rows, record = [], {}
    for out, wide in LAYERS:
        x, weight, grad = draw(TOKENS, wide), draw(out, wide), draw(TOKENS, out)
        values = fine_quantise.tiles(x)

        def fine_layer(x=x, weight=weight, grad=grad):
            values, scales, *kept = fine_quantise.tiles_both(x)
            y = fine_product.product(values, scales, *fine_quantise.blocks(weight, False), None, torch.bfloat16)
            g, g_scales, turned, turned_scales = fine_quantise.tiles_both(grad)
            dx = fine_product.product(g, g_scales, *fine_quantise.blocks(weight, True), None, torch.bfloat16)
            dw = fine_product.product(turned, turned_scales, *kept, None, torch.bfloat16)
            return y, dx, dw

        calls = {
            "bfloat16": lambda x=x, w=weight, g=grad: (x @ w.t(), g @ w, g.t() @ x), "fine": fine_layer,
            "tiles": lambda x=x: fine_quantise.tiles(x), "both": lambda g=grad: fine_quantise.tiles_both(g),
            "turn": lambda v=values, c=wide: fine_quantise.turn_tiles(*v, c), "blocks": lambda w=weight: fine_quantise.blocks(w, False),
        }  # fmt: skip
        found = in_turns(calls, rounds, failed, f"layer {wide} to {out}")
        record[f"{wide} to {out}"] = {name: seconds * 1e6 for name, seconds in found.items()}
        bytes_moved = {"tiles": 3 * x.numel(), "both": 4 * grad.numel(), "turn": 2 * x.numel(), "blocks": 3 * weight.numel()}
        moved = ", ".join(f"{name} {bytes_moved[name] / found[name] / 1e12:.2f} TB/s" for name in bytes_moved if name in found)
        print(f"layer {wide} to {out}: {moved}", flush=True)
        if "fine" in found and "bfloat16" in found:
            rows.append((f"layer {wide} to {out}, both ways, with quantising: speed against bfloat16", f"{found['bfloat16'] / found['fine']:.2f}", "", None))
    return rows, record


def experts_case(tokens: int, experts: int, share: int, wide: int, inner: int, biased: bool):
    """(x, weights, gate_up, down, both biases) and the indices of a mixture in bfloat16, some slots dropped, and the gradient of its result."""
    normal = lambda *shape, scale=1.0: (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)  # noqa: E731
    weights, indices = torch.softmax(torch.randn(tokens, experts, device="cuda"), -1).topk(share, -1)
    indices[::7, 0] = experts
    tensors = [normal(tokens, wide), weights, normal(experts, 2 * inner, wide, scale=wide**-0.5), normal(experts, wide, inner, scale=inner**-0.5)]
    tensors += [normal(experts, 2 * inner), normal(experts, wide)] if biased else [None, None]
    return tensors, indices, normal(tokens, wide)


def check_experts(failed: list[str]) -> list[tuple]:
    """All experts in one launch against expert by expert, the result and every gradient."""
    from ftc.dialect import float8_moe
    from ftc.kernels import fine_grouped

    worst = {}
    for biased, on_input in ((False, False), (True, False), (True, True)):
        tensors, indices, grad = experts_case(1000, 8, 2, 512, 384, biased)
        options, want = ("silu", [], on_input), [t is not None for t in tensors]

        def grouped(t=tensors, i=indices, g=grad, o=options, w=want):
            out, *cast = fine_grouped.forward(t[0], i, *t[1:], *o)
            return [out, *fine_grouped.backward(g, *cast, i, *t[1:], *o, w)]

        out, *cast = float8_moe.definition(tensors[0], indices, *tensors[1:], activation="silu", weight_on_input=on_input, recipe="fine")
        expected = [out, *float8_moe.gradients(grad, *cast, indices, *tensors[1:], *options, "fine", want)]
        got = attempt(f"experts, biased {biased}, weight on input {on_input}", grouped, failed)
        for name, g, e in zip(("result", "x", "weights", "gate_up", "down", "gate_up bias", "down bias"), got or (), expected, strict=False):
            if e.numel():
                worst[name] = max(worst.get(name, 0.0), distance(g, e.double()))
    return [(f"experts, {name}: all in one launch against one by one", f"{found:.1e}", "2e-02", found <= 2e-2) for name, found in worst.items()]


def measure_experts(rounds: int, failed: list[str]) -> tuple[list[tuple], dict]:
    """A mixture both ways: fine-grained FP8 with all its casts against `ftc::fused_moe` in bfloat16."""
    import ftc.dialect  # noqa: F401

    rows, record = [], {}
    for experts, wide, inner in ((64, 2048, 768), (64, 4096, 1536)):
        tensors, indices, grad = experts_case(TOKENS, experts, 8, wide, inner, False)
        tensors = [None if t is None else t.requires_grad_() for t in tensors]

        def step(operator, t=tensors, i=indices, g=grad, **options):
            return torch.autograd.grad(operator(t[0], i, *t[1:4], **options), t[:4], g)

        calls = {"bfloat16": lambda s=step: s(torch.ops.ftc.fused_moe), "fine": lambda s=step: s(torch.ops.ftc.float8_moe, recipe="fine")}
        found = in_turns(calls, rounds, failed, f"experts {experts} x {wide} x {inner}")
        record[f"{experts} x {wide} x {inner}"] = {name: seconds * 1e6 for name, seconds in found.items()}
        if len(found) == 2:
            speed = found["bfloat16"] / found["fine"]
            rows.append((f"{experts} experts, {wide} x {inner}, both ways: speed against bfloat16", f"{speed:.2f}", "", None))
            print(f"{rows[-1][0]} {speed:.2f}, {found}", flush=True)
    return rows, record


def probe(groups: int, columns: int, programs: int, staggered: int) -> None:
    """One small product of a Hopper tile by block and one by tile, in this process; groups 0: a small mixture."""
    from ftc.kernels.fine_product_hopper import HopperTile

    if groups == 0:
        from ftc.kernels import fine_grouped

        return print(fine_grouped.probe(torch.device("cuda", 0)))
    for kind in ("forward", "weight gradient"):
        hopper(*operands(Product(kind, 1000, 712, 1000)), tile=HopperTile(groups, columns, programs=programs, staggered=bool(staggered)))
    torch.cuda.synchronize()


def works(failed: list[str], tiles: list[tuple[int, int, int, bool]]) -> set[tuple[int, int, int, bool]]:
    """Which Hopper tiles (groups, columns, programs, staggered) come back at all: each in a process of its own, side by side, which is ended where it hangs."""
    running = {tile: subprocess.Popen([sys.executable, __file__, "--probe", ",".join(str(int(part)) for part in tile)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for tile in tiles}
    deadline, found = time.monotonic() + 90, set()
    for tile, process in running.items():
        try:
            text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            reason = f"exit code {process.returncode}: {text.strip()[-600:]}" if process.returncode else None
        except subprocess.TimeoutExpired:
            process.kill()
            reason = "no end after 90 s"
        if reason is None:
            found.add(tile)
        else:
            failed.append(f"Hopper tile (groups, columns, programs, staggered) {tile}: {reason}")
            print("FAILED", failed[-1], flush=True)
    return found


def sweep(rounds: int, failed: list[str]) -> dict:
    """Rates of tiles for a product by block and one by tile, each checked before it is timed."""
    from ftc.kernels import fine_product, fine_product_hopper
    from ftc.kernels.grouped_product import Tile

    plain_tiles = [fine_product_hopper.HopperTile(groups, columns, stages, programs, band) for groups, columns, stages, programs, band in (
        (2, 128, 6, 1, 8), (2, 128, 6, 1, 4), (2, 128, 6, 1, 16), (2, 128, 4, 1, 8), (3, 128, 6, 1, 8), (1, 128, 6, 2, 16), (2, 64, 6, 1, 8),
    )]  # fmt: skip
    tiles = [*plain_tiles, *(dataclasses.replace(tile, staggered=True) for tile in plain_tiles if tile.groups > 1)]
    plain = [Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 128, 128, 4, 3), Tile(64, 128, 128, 4, 4), Tile(128, 64, 128, 4, 4)]
    there = works(failed, sorted({(t.groups, t.columns, t.programs, t.staggered) for t in tiles}))
    tiles = [t for t in tiles if (t.groups, t.columns, t.programs, t.staggered) in there]
    record = {}
    for product in (Product("forward", TOKENS, 14336, 4096), Product("weight gradient", 14336, 4096, TOKENS), Product("forward", TOKENS, 4096, 4096)):
        args = operands(product)
        expected = tensorwise_reference(args)
        calls = {"tensorwise": lambda a=args: tensorwise(*a)}
        candidates = {str(t): lambda a=args, t=t: hopper(*a, tile=t) for t in tiles}
        candidates |= {str(t): lambda a=args, t=t: fine_product.product(*a, dtype=torch.bfloat16, tile=t) for t in plain}
        for name, call in candidates.items():
            got = attempt(name, call, failed)
            if got is not None and distance(got[:256], expected) > 3e-3:
                failed.append(f"{name}: {distance(got[:256], expected):.1e} from the reference")
                print("WRONG", failed[-1], flush=True)
            elif got is not None:
                calls[name] = call
        found = in_turns(calls, rounds, failed, str(product))
        base = found["tensorwise"]
        print(f"{product}: tensorwise {product.operations / base / 1e12:,.0f} TFLOP/s", flush=True)
        for name, seconds in sorted(found.items(), key=lambda pair: pair[1]):
            print(f"  {base / seconds:.3f}  {product.operations / seconds / 1e12:7,.0f} TFLOP/s  {name}", flush=True)
        record[str(product)] = {name: base / seconds for name, seconds in found.items()}
    return record


def tensorwise_reference(args: tuple) -> torch.Tensor:
    """The first 256 rows by the reference, in float64."""
    a, a_scales, b, b_scales = args
    return fine.product(a[:256].contiguous(), a_scales[:, :256].contiguous(), b, b_scales, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with the reference")
    parser.add_argument("--sweep", action="store_true", help="time tiles")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/fine_product.py measures a CUDA device and finds none; its comparison on the CPU is tests/kernels/test_fine_kernels.py")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    if options.probe:
        return probe(*map(int, options.probe.split(",")))
    failed: list[str] = []
    start = time.perf_counter()
    there: set = set()
    if torch.cuda.get_device_capability()[0] == 9:
        global HOPPER_WORKS
        there = works(failed, [(2, 128, 1, False), (0, 0, 0, False)])
        HOPPER_WORKS = (2, 128, 1, False) in there
    experts_work = HOPPER_WORKS and (0, 0, 0, False) in there
    rows = check_quantise(failed) + check_products(failed) + (check_experts(failed) if experts_work else [])
    print(f"checked in {time.perf_counter() - start:.0f} s: {[row[:2] for row in rows]}", flush=True)
    record: dict = {}
    if options.sweep:
        record["sweep"] = sweep(options.rounds, failed)
    elif not options.check:
        rates, record["rates"] = measure_rates(options.rounds, failed)
        layers, record["layers"] = measure_layer(options.rounds, failed)
        rows += rates + layers
        if experts_work:
            experts, record["experts"] = measure_experts(options.rounds, failed)
            rows += experts
    rows.append(("kernels that failed", str(len(failed)), "0", not failed))
    record |= {"failed": failed, "seconds": time.perf_counter() - start}
    finish("fine_product", rows, record, json_out=options.json_out)


if __name__ == "__main__":
    main()

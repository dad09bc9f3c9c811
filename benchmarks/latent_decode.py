"""Decode attention over paged caches: absorbed latents against keys and values, and against what the machine can do.

    python benchmarks/latent_decode.py              # on CUDA the Triton kernels, else the operators on the CPU
    python benchmarks/latent_decode.py --check      # CUDA: every kernel configuration against the definition, under a minute
    python benchmarks/latent_decode.py --sweep      # CUDA: tiles and numbers of splits

On CUDA: copy bandwidth (bytes read and written) and the rate of an 8192^3 bfloat16 product are measured first. Each kernel then runs from a
CUDA graph over caches whose sizes together exceed the second-level cache; a row gives the time of one call, cache bytes a second over
the copy bandwidth, products a second over the matrix rate, and the share of the roofline: max(bytes / bandwidth, flops / rate) / time.
Runs from a checkout without installation.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import compare, finish

try:
    import ftc.dialect  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ftc.dialect  # noqa: F401

from ftc.dialect import fp8_latent, paged_latent_attention
from ftc.dialect import paged_attention as paged_attention_module

BATCHES, CONTEXTS = (1, 4, 16, 64), (8192, 16384, 32768, 65536)
HEADS, LATENT, ROPE = 128, 512, 64  # DeepSeek-V2 and V3
GQA_HEADS, GQA_GROUPS, GQA_WIDTH = 32, 8, 128  # Llama 3 8B
BLOCK_SIZE = 64
L2_BYTES = 256 * 2**20  # distinct caches of one measurement together hold at least this much: several times an H200's 60 MB
BANDWIDTH_SHARE, MATRIX_SHARE = 0.85, 0.6


def graph_seconds(calls, rounds: int = 7) -> float:
    """Median over rounds of the seconds of one call, all `calls` captured in one CUDA graph and run back to back."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(taken)


def device_rates() -> tuple[float, float]:
    """(copy bandwidth in bytes/s, read and written both counted; bfloat16 matrix rate in flops/s), medians of 7.

    The copy is the faster of the driver's own and of a kernel's that negates on the way: a copy in a graph may go to the slower copy engine.
    """
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copies = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    copy = min(*(graph_seconds([call] * 2) for call in copies), stream_seconds(copies[0]))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = graph_seconds([lambda: torch.mm(a, b)] * 4)
    return 2 * source.numel() * 2 / copy, 2 * 8192**3 / product


def stream_seconds(call, rounds: int = 7) -> float:
    """Median over rounds of the seconds of one call that takes long beside its launch, outside of a graph."""
    taken = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken[1:])


def tables(batch: int, context: int, copies: int) -> tuple[list[torch.Tensor], int]:
    """Block tables of `copies` distinct batches in shuffled blocks, and the number of blocks they take."""
    blocks = -(-context // BLOCK_SIZE)
    order = torch.randperm(copies * batch * blocks, device="cuda").to(torch.int32)
    return list(order.view(copies, batch, blocks)), copies * batch * blocks


def copies_of(cache_bytes: int) -> int:
    return max(2, min(32, -(-L2_BYTES // cache_bytes)))


def fits(num_bytes: int) -> bool:
    return num_bytes * 1.15 + 2**30 < torch.cuda.mem_get_info()[0]


def latent_inputs(batch, context, packed, copies, heads=HEADS):
    table_list, num_blocks = tables(batch, context, copies)
    if packed:
        cache = torch.empty(num_blocks, BLOCK_SIZE, fp8_latent.row_bytes(LATENT, ROPE), dtype=torch.uint8, device="cuda")
        for part in cache.split(4096):
            c = torch.randn(*part.shape[:2], LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
            part.copy_(fp8_latent.pack(c[..., :LATENT], c[..., LATENT:]))
    else:
        cache = torch.empty(num_blocks, BLOCK_SIZE, LATENT + ROPE, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.randn(batch, heads, 1, LATENT, dtype=torch.bfloat16, device="cuda")
    q_pe = torch.randn(batch, heads, 1, ROPE, dtype=torch.bfloat16, device="cuda")
    lengths = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    return q, q_pe, cache, table_list, lengths, torch.ones_like(lengths)


def time_latent(batch: int, context: int, packed: bool, **choice) -> dict:
    from ftc.kernels.latent_decode import latent_decode

    row = fp8_latent.row_bytes(LATENT, ROPE) if packed else 2 * (LATENT + ROPE)
    cache_bytes = batch * context * row
    copies = copies_of(cache_bytes)
    if not fits(copies * cache_bytes):
        copies = 1
    if not fits(copies * cache_bytes):
        return {"skipped": f"{cache_bytes / 2**30:.0f} GiB of cache do not fit"}
    q, q_pe, cache, table_list, had, new = latent_inputs(batch, context, packed, copies)
    scale = (LATENT // 4 + ROPE) ** -0.5
    calls = [lambda t=t: latent_decode(q, q_pe, cache, t, had, new, scale, **choice) for t in table_list]
    flops = 2 * batch * HEADS * context * (2 * LATENT + ROPE)
    return {"seconds": graph_seconds(calls), "bytes": cache_bytes + 2 * q.numel() * 2 + q_pe.numel() * 2, "flops": flops}


def time_gqa(batch: int, context: int, **choice) -> dict:
    from ftc.kernels.paged_decode import paged_decode

    cache_bytes = batch * context * 2 * GQA_GROUPS * GQA_WIDTH * 2
    copies = copies_of(cache_bytes) if fits(copies_of(cache_bytes) * cache_bytes) else 1
    if not fits(copies * cache_bytes):
        return {"skipped": f"{cache_bytes / 2**30:.0f} GiB of cache do not fit"}
    table_list, num_blocks = tables(batch, context, copies)
    caches = [torch.empty(num_blocks, BLOCK_SIZE, GQA_GROUPS, GQA_WIDTH, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2)]
    q = torch.randn(batch, GQA_HEADS, 1, GQA_WIDTH, dtype=torch.bfloat16, device="cuda")
    had = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    new = torch.ones_like(had)
    calls = [lambda t=t: paged_decode(q, *caches, t, had, new, scale=GQA_WIDTH**-0.5, **choice) for t in table_list]
    flops = 4 * batch * GQA_HEADS * context * GQA_WIDTH
    return {"seconds": graph_seconds(calls), "bytes": cache_bytes + 2 * q.numel() * 2, "flops": flops}


def judge(row: dict, bandwidth: float, rate: float) -> dict:
    if "seconds" not in row:
        return row
    memory, matrix = row["bytes"] / bandwidth, row["flops"] / rate
    return {
        **row,
        "bandwidth_share": memory / row["seconds"],
        "matrix_share": matrix / row["seconds"],
        "bound": "memory" if memory >= matrix else "matrix",
        "roofline_share": max(memory, matrix) / row["seconds"],
    }


def describe(row: dict) -> str:
    if "seconds" not in row:
        return row.get("skipped", row.get("error", ""))
    return (
        f"{row['seconds'] * 1e6:8.1f} us  copy {row['bandwidth_share']:.2f}  matrix {row['matrix_share']:.2f}  "
        f"roofline ({row['bound']}) {row['roofline_share']:.2f}"
    )


def grid(seconds: float) -> tuple[list, dict]:
    """All kernels over batch x context, smallest first, until `seconds` have passed."""
    started = time.monotonic()
    bandwidth, rate = device_rates()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 matrix {rate / 1e12:.0f} TFLOP/s: {rate / bandwidth:.0f} flops a byte", flush=True)
    kernels = {
        "latent bf16": lambda b, s: time_latent(b, s, False),
        "latent FP8": lambda b, s: time_latent(b, s, True),
        "GQA bf16": time_gqa,
    }
    rows, results = [], []
    for name, run in kernels.items():
        for batch in BATCHES:
            for context in CONTEXTS:
                if time.monotonic() - started > seconds:
                    result = {"skipped": f"not within {seconds:.0f} s"}
                else:
                    try:
                        result = judge(run(batch, context), bandwidth, rate)
                    except Exception as error:  # one kernel that fails must not hide the others
                        result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                torch.cuda.empty_cache()
                print(f"{name:12s} batch {batch:3d} context {context:6d}  {describe(result)}", flush=True)
                results.append({"kernel": name, "batch": batch, "context": context, **result})
                asked, met = "", None
                if "seconds" in result:
                    asked = f"copy {BANDWIDTH_SHARE}" if result["bound"] == "memory" else f"matrix {MATRIX_SHARE}"
                    met = result["bandwidth_share"] >= BANDWIDTH_SHARE if result["bound"] == "memory" else result["matrix_share"] >= MATRIX_SHARE
                rows.append((f"{name}, {batch} x {context}", describe(result), asked, met))
    return rows, {"copy_bytes_per_s": bandwidth, "matrix_flops_per_s": rate, "grid": results}


def check() -> tuple[list, dict]:
    """Each configuration on the device, at small sizes, against the definition in float64 (float32 for the rows' own rounding)."""
    rows, results = [], []
    limits = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
    for name, limit, run in [*latent_cases(limits), *gqa_cases(limits)]:
        started = time.monotonic()
        try:
            got, expected = run()
            error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
            outcome, met = f"error {error:.1e}", error <= limit
        except Exception as failure:
            outcome, met, error = f"{type(failure).__name__}: {str(failure)[:400]}", False, None
        print(f"{'ok  ' if met else 'FAIL'} {name}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)
        rows.append((name, outcome, f"{limit:.0e}", met))
        results.append({"case": name, "error": error, "met": met})
    return rows, {"cases": results}


def _ragged(batch, num_tokens, block_size, longest):
    generator = torch.Generator().manual_seed(1)
    cached = torch.randint(0, longest, (batch,), generator=generator)
    new = torch.randint(0, num_tokens + 1, (batch,), generator=generator)
    cached[0], new[0] = longest, num_tokens
    blocks = -(-(longest + num_tokens) // block_size)
    table = torch.randperm(batch * blocks, generator=generator).view(batch, blocks)
    return [tensor.to("cuda", torch.int32) for tensor in (table, cached, new)], batch * blocks


def latent_cases(limits):
    for dtype, heads, num_tokens, latent, rope, block_size, packed in (
        (torch.bfloat16, 128, 1, 512, 64, 64, False),
        (torch.float16, 40, 2, 256, 64, 16, False),
        (torch.bfloat16, 128, 1, 512, 64, 64, True),
        (torch.bfloat16, 16, 2, 512, 64, 16, False),
        (torch.bfloat16, 16, 1, 448, 64, 16, True),
        (torch.bfloat16, 8, 1, 48, 16, 16, False),
        (torch.float16, 32, 1, 192, 64, 32, False),
        (torch.float32, 8, 3, 96, 32, 8, False),
        (torch.float32, 16, 1, 512, 64, 16, False),
        (torch.float32, 8, 20, 96, 32, 8, False),  # no decode step: the fused call over gathered pages
    ):

        def run(dtype=dtype, heads=heads, num_tokens=num_tokens, latent=latent, rope=rope, block_size=block_size, packed=packed):
            torch.manual_seed(0)
            (table, cached, new), num_blocks = _ragged(5, num_tokens, block_size, 1500)
            draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
            cache = draw(num_blocks, block_size, latent + rope)
            if packed:
                cache = fp8_latent.pack(cache[..., :latent], cache[..., latent:])
            groups = heads // 4
            inputs = [draw(5, heads, num_tokens, 32), draw(5, heads, num_tokens, rope), draw(5, num_tokens, latent), draw(5, num_tokens, rope)]
            kv_b = draw(groups * 64, latent) * latent**-0.5
            options = {"groups": groups, "scale": 0.1, "absorb_up_to": 8}
            copy = cache.clone()
            got = torch.ops.ftc.paged_latent_attention(*inputs, kv_b, cache, table, cached, new, **options)
            wide = [tensor.double() for tensor in (*inputs, kv_b)]
            expected = paged_latent_attention.reference(*wide, copy if packed else copy.double(), table, cached, new, **options)
            if packed:  # the same bytes from float64 inputs as from theirs: the values are the same
                assert torch.equal(cache, copy), "the packed rows written differ"
            return got, expected

        yield f"latent {dtype}{' FP8' if packed else ''} H {heads} T {num_tokens} {latent}+{rope} block {block_size}", limits[dtype], run


def gqa_cases(limits):
    plain = (None, None, None)
    for dtype, heads, groups, num_tokens, width, block_size, (window, softcap, cache_dtype) in (
        (torch.bfloat16, 32, 8, 1, 128, 64, plain),
        (torch.bfloat16, 32, 8, 4, 128, 16, (100, None, None)),
        (torch.float16, 8, 8, 1, 64, 32, (None, 20.0, None)),
        (torch.float32, 8, 4, 1, 32, 16, plain),
        (torch.float32, 16, 2, 2, 80, 8, plain),
        (torch.bfloat16, 32, 8, 1, 128, 64, (None, None, torch.float8_e4m3fn)),
        (torch.bfloat16, 32, 8, 1, 128, 64, (None, None, torch.int8)),
        (torch.float32, 16, 2, 20, 64, 8, (100, None, None)),
    ):

        def run(dtype=dtype, heads=heads, groups=groups, num_tokens=num_tokens, width=width, block_size=block_size, window=window, softcap=softcap, cache_dtype=cache_dtype):
            from ftc.dialect import paged_cache

            torch.manual_seed(0)
            (table, cached, new), num_blocks = _ragged(5, num_tokens, block_size, 1500)
            draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
            query, key, value = draw(5, heads, num_tokens, width), draw(5, groups, num_tokens, width), draw(5, groups, num_tokens, width)
            caches, scales = [draw(num_blocks, block_size, groups, width) for _ in range(2)], [None, None]
            if cache_dtype is not None:
                caches, scales = map(list, zip(*(paged_cache.quantise(c, cache_dtype) for c in caches), strict=True))
            options = {"scale": width**-0.5, "window": window, "softcap": softcap}
            got = torch.ops.ftc.paged_attention(query, key, value, *caches, table, cached, new, *scales, **options)
            # The caches hold the new tokens now; writing them again from float64 changes nothing.
            wide = caches if cache_dtype is not None else [c.double() for c in caches]
            expected = paged_attention_module.reference(
                query.double(), key.double(), value.double(), *wide, table, cached, new, *scales, **options
            )
            return got, expected

        label = f"GQA {dtype} {heads}/{groups} T {num_tokens} width {width} block {block_size} window {window} softcap {softcap} cache {cache_dtype}"
        yield label, limits[dtype], run


def sweep(seconds: float) -> tuple[list, dict]:
    """Kernels, tiles and numbers of splits at a few sizes: what the choices in ftc/kernels come from."""
    from ftc.kernels.latent_decode import Tile

    started = time.monotonic()
    bandwidth, rate = device_rates()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 matrix {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows, results = [], []

    def one(name, run, *arguments, **choice):
        if time.monotonic() - started > seconds:
            return
        try:
            result = judge(run(*arguments, **choice), bandwidth, rate)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
        torch.cuda.empty_cache()
        name = f"{name} {arguments} {choice}"
        print(f"{name}: {describe(result)}", flush=True)
        rows.append((name, describe(result), "", None))
        results.append({"case": name, **result})

    for batch, context, splits in ((64, 8192, None), (16, 8192, None), (1, 65536, None), (1, 8192, None)):
        one("latent", time_latent, batch, context, False, splits=splits)  # what is chosen: on Hopper the kernel of its own
    for batch, context, splits in ((16, 8192, 8), (4, 8192, 16), (4, 8192, 8), (1, 8192, 32), (1, 65536, 33), (64, 8192, 2)):
        one("latent", time_latent, batch, context, False, splits=splits)
    one("latent", time_latent, 64, 8192, False, hopper=False)
    for batch, context in ((16, 8192), (1, 65536)):
        one("GQA", time_gqa, batch, context)
    for tile in (Tile(64, 64, 8, 2), Tile(64, 128, 8, 1)):
        one("latent FP8", time_latent, 64, 8192, True, tile=tile)
    return rows, {"sweep": results}


CPU_SHAPES = ((8, 4, 32), (32, 8, 64))  # heads, key-value heads, head width: 256 and 2048 wide models
CPU_BATCHES, CPU_CONTEXT, CPU_LAYERS, CUT = (1, 4, 16), 8192, 4, 4
CPU_RATIO, CPU_FUSED_RATIO = 1.0, 1.0


def cpu_steps(heads: int, groups: int, width: int, batch: int):
    """Functions that run the attention of one decode step of CPU_LAYERS layers: keys and values, latents, and PyTorch's fused call."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    blocks = CPU_CONTEXT // BLOCK_SIZE
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    had, new = torch.full((batch,), CPU_CONTEXT - 1, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
    query, key, value = draw(batch, heads, 1, width), draw(batch, groups, 1, width), draw(batch, groups, 1, width)
    kept = 2 * groups * width // CUT
    rope = kept // 4
    latent = kept - rope
    inputs = [draw(batch, heads, 1, width), draw(batch, heads, 1, rope), draw(batch, 1, latent), draw(batch, 1, rope)]
    kv_b = draw(groups * 2 * width, latent) * latent**-0.5
    pages = [[torch.empty(batch * blocks, BLOCK_SIZE, groups, width).normal_() for _ in range(2)] for _ in range(CPU_LAYERS)]
    rows = [torch.empty(batch * blocks, BLOCK_SIZE, kept).normal_() for _ in range(CPU_LAYERS)]

    def keys_and_values():
        for cache in pages:
            torch.ops.ftc.paged_attention(query, key, value, *cache, table, had, new, scale=width**-0.5)

    def latents():
        for cache in rows:
            torch.ops.ftc.paged_latent_attention(*inputs, kv_b, cache, table, had, new, groups=groups, scale=width**-0.5, absorb_up_to=1)

    def fused():
        for cache in pages:  # the same memory as [B, G, S, K], as a cache that is no paged one would hold it
            keys, values = (c.view(batch, groups, CPU_CONTEXT, width) for c in cache)
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=width**-0.5, enable_gqa=True)

    return keys_and_values, latents, fused


def cpu_grid(rounds: int) -> tuple[list, dict]:
    """One decode step's attention at 8k context in float32: latents at a quarter of the cache against keys and values, in alternation."""
    rows, results = [], []
    for heads, groups, width in CPU_SHAPES:
        for batch in CPU_BATCHES:
            keys_and_values, latents, fused = cpu_steps(heads, groups, width, batch)
            ours = compare(keys_and_values, latents, ("keys and values", "latents"), rounds=rounds, warmup=2)
            other = compare(fused, keys_and_values, ("scaled_dot_product_attention", "keys and values"), rounds=rounds, warmup=1)
            name = f"{heads} heads, {groups} x {width}, batch {batch}"
            for what, comparison, asked in (("latents / keys and values", ours, CPU_RATIO), ("paged / fused contiguous", other, CPU_FUSED_RATIO)):
                measured = f"{comparison.ratio:.2f} ({min(comparison.ratios):.2f} to {max(comparison.ratios):.2f}): {comparison.candidate} / {comparison.baseline}"
                rows.append((f"{name}: {what}", measured, f"at most {asked:.1f}", comparison.ratio <= asked))
            results.append({"heads": heads, "groups": groups, "width": width, "batch": batch, "latent": ours.as_dict(), "fused": other.as_dict()})
            del keys_and_values, latents, fused
    return rows, {"context": CPU_CONTEXT, "layers": CPU_LAYERS, "cut": CUT, "cpu": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="kernels against definitions on the device, no timing")
    parser.add_argument("--sweep", action="store_true", help="tiles and splits of the latent kernel")
    parser.add_argument("--seconds", type=float, default=200, help="stop starting new measurements after this")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json-out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if torch.cuda.is_available():
        rows, result = check() if args.check else sweep(args.seconds) if args.sweep else grid(args.seconds)
        name = "latent_decode_check" if args.check else "latent_decode"
        finish(name, rows, result, fail=args.check, json_out=args.json_out)
    else:
        if args.check or args.sweep:
            parser.error("--check and --sweep need a CUDA device")
        finish("latent_decode", *cpu_grid(args.rounds), json_out=args.json_out)


if __name__ == "__main__":
    main()

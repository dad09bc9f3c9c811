"""A decoder block of 8B shape with its products in float8 against bfloat16: forward and backward, compiled, on a GPU.

    python benchmarks/float8_blocks.py [--recipes tensorwise,rowwise] [--tokens 4096] [--batch 2] [--seconds 85] [--json-out FILE]
    python benchmarks/float8_blocks.py --cpu          small shapes, emulated products, no compiler: only whether it runs

Width 4096, 32 query and 8 key-value heads of 128, MLP 14336, fused projections on both sides; both are captured by ftc, and one is rewritten with the pass
float8. Rounds take turns; runs from a checkout without installation. A recipe that fails is told and left out; after --seconds no further recipe is begun. Asked: 1.25x, and no block slower.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch

ASKED = 1.25


def from_checkout() -> None:
    """Make `ftc` importable without installation: its passes and models stand beside it."""
    root = Path(__file__).resolve().parent.parent
    sys.path.append(str(root))
    for name in ("passes", "models"):
        place = str(root / name)
        spec = importlib.util.spec_from_file_location(f"ftc.{name}", f"{place}/__init__.py", submodule_search_locations=[place])
        module = sys.modules[f"ftc.{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


try:
    import ftc.passes  # noqa: F401
except ModuleNotFoundError:
    from_checkout()
import ftc  # noqa: E402


def programs(recipes: list[str], sizes: dict, device: torch.device) -> dict:
    """{"bfloat16": a program of one block, recipe: the same with float8 products}, over the same weights."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(0)
    with device:
        model = Decoder(preset("llama-3-8b", vocab_size=256, num_hidden_layers=1, max_position_embeddings=8192, **sizes)).bfloat16()
    example = {"input_ids": torch.arange(24, device=device).view(2, 12)}
    base = ftc.rewrite(model, ["fuse-qkv", "fuse-gate-up"], example=example, check=False)
    made = {"bfloat16": base}
    for recipe in recipes:
        name, _, save = recipe.partition("/")
        made[recipe] = ftc.rewrite(base, [("float8", {"recipe": name} | ({"save": save} if save else {}))], check=False)
    return made


def inputs_of(program, batch: int, tokens: int, device: torch.device) -> tuple:
    """What the program gives to its block: (args, kwargs), and the gradient of the result."""
    found = []
    region = program.regions[0]
    region.around = lambda run, args, kwargs: found.append((args, kwargs)) or run(*args, **kwargs)
    with torch.no_grad():
        program(input_ids=torch.randint(256, (batch, tokens), device=device))
    region.around = None
    args, kwargs = found[0]
    hidden = torch.randn(args[0].shape, device=device, dtype=args[0].dtype).requires_grad_()
    return (hidden, *args[1:]), kwargs, torch.randn_like(hidden) / hidden.numel() ** 0.5


def runner(program, arguments: tuple, device: torch.device):
    """A function that runs the block forward and backward and returns milliseconds."""
    (args, kwargs, grad), region = arguments, program.regions[0]

    def run() -> float:
        for p in region.parameters():
            p.grad = None
        args[0].grad = None
        if device.type != "cuda":
            start = time.perf_counter()
            region(*args, **kwargs).backward(grad)
            return (time.perf_counter() - start) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        region(*args, **kwargs).backward(grad)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return run


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def kept(program, arguments: tuple) -> int:
    """Bytes that the compiled block keeps between forward and backward."""
    args, kwargs, _ = arguments
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = program.regions[0](*args, **kwargs)
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated() - before
    del out
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="tensorwise,rowwise")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--cpu", action="store_true", help="small shapes, nothing compiled")
    parser.add_argument("--json-out")
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cpu" if options.cpu else "cuda")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256} if options.cpu else {}
    batch, tokens, rounds = (2, 32, 2) if options.cpu else (options.batch, options.tokens, options.rounds)
    made = programs(options.recipes.split(","), sizes, device)
    arguments = inputs_of(made["bfloat16"], batch, tokens, device)
    runs, reference, rows = {}, None, []
    for name, program in made.items():
        if runs and time.perf_counter() - began > options.seconds * 0.7:
            print(f"{name}: not begun, {time.perf_counter() - began:.0f} s have gone", flush=True)
            continue
        try:
            if not options.cpu:
                program.compile(dynamic=False)
            run = runner(program, arguments, device)
            for _ in range(3):
                run()
            weight = dict(program.regions[0].named_parameters())["mlp.down_proj.weight"]
            values = [arguments[0][0].grad.clone(), weight.grad.clone()]
            reference = reference or values
            errors = [relative(v, r) for v, r in zip(values, reference, strict=True)]
            runs[name] = run
            memory = None if options.cpu else kept(program, arguments)
            rows.append({"name": name, "dx_error": errors[0], "dw_error": errors[1], "kept_bytes": memory})
            print(f"{name}: ready after {time.perf_counter() - began:.0f} s, gradients {errors[0]:.3f} and {errors[1]:.3f} off, {memory} bytes kept", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}: failed, left out", flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    base = times["bfloat16"]
    for row in rows:
        own = times[row["name"]]
        row |= {"ms": statistics.median(own), "speedup": statistics.median(b / o for b, o in zip(base, own, strict=True))}
        print(f"{row['name']:28} {row['ms']:8.3f} ms   {row['speedup']:.3f}x   asked {ASKED}x", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record = {"benchmark": "float8_blocks", "device": where, "torch": torch.__version__, "batch": batch, "tokens": tokens, "rows": rows}
    record["seconds"] = round(time.perf_counter() - began, 1)
    if options.json_out:
        with open(options.json_out, "w") as file:
            json.dump(record, file)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Error of fine-grained FP8 against tensorwise FP8, both to float32, for the three products of a linear layer: a table and a line of JSON.

    python benchmarks/fine_error.py                 # 16 seeds, 512 x 1024 by 768 x 1024, about half a minute on one core

Ratios of fine over tensorwise, median over seeds (largest in brackets). "norm": of the norms of the errors; "elements": of the medians of the errors'
magnitudes, for one number of 1e5 has an error of its own that outweighs all others in a norm. Inputs: Gaussian; Gaussian with 1 channel in 128 of x
times 30, at random places; Gaussian with one number of x 1e5. Weights and gradients are Gaussian. Tensorwise: e4m3, one scale an operand.
The weight gradient of fine is of tiles cast from x itself; "requantised" of the forward's tiles cast again, as DeepSeek-V3 does.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from measure import finish

try:
    import ftc.float8.fine as fine
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import ftc.float8.fine as fine

TOKENS, WIDE, OUT = 512, 1024, 768
INPUTS = ("Gaussian", "outlier channels", "one number of 1e5")
PRODUCTS = ("forward", "input gradient", "weight gradient", "weight gradient, requantised")
# (input, product, measure) -> most that is asked of the median
ASKED = {
    ("Gaussian", "forward", "norm"): 1.0, ("Gaussian", "input gradient", "norm"): 1.0, ("Gaussian", "weight gradient", "norm"): 1.0,
    ("outlier channels", "forward", "norm"): 0.8, ("one number of 1e5", "forward", "elements"): 0.4,
}  # fmt: skip


def draw(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [TOKENS, WIDE], weight [OUT, WIDE] and the gradient of the result [TOKENS, OUT]."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, weight, grad = normal(TOKENS, WIDE), normal(OUT, WIDE) * WIDE**-0.5, normal(TOKENS, OUT)
    if kind == "outlier channels":
        x[:, torch.randperm(WIDE, generator=generator)[: WIDE // 128]] *= 30
    elif kind == "one number of 1e5":
        x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = 1e5
    return x, weight, grad


def tensorwise(x: torch.Tensor) -> torch.Tensor:
    """x to e4m3 with one scale and back."""
    scale = x.abs().max() / fine.LARGEST
    return (x / scale).to(fine.VALUES).float() * scale


def by_fine(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The four PRODUCTS."""
    rows, blocks, columns = fine.quantise_tiles(x), fine.quantise_blocks(weight), fine.quantise_tiles(grad.t())
    return [
        fine.product(*rows, *blocks),
        fine.product(*fine.quantise_tiles(grad), *fine.turn_blocks(*blocks, x.shape[1])),
        fine.product(*columns, *fine.quantise_tiles(x.t())),
        fine.product(*columns, *fine.turn_tiles(*rows, x.shape[1])),
    ]


def plain(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The four PRODUCTS of the operands as they are, the last two of them one."""
    by_weight = grad.t() @ x
    return [x @ weight.t(), grad @ weight, by_weight, by_weight]


def ratios(kind: str, seed: int) -> dict[tuple[str, str], float]:
    """(product, measure) -> error of fine over error of tensorwise."""
    operands = draw(kind, seed)
    found = {}
    for name, got, other, exact in zip(PRODUCTS, by_fine(*operands), plain(*map(tensorwise, operands)), plain(*operands), strict=True):
        errors = (got - exact), (other - exact)
        found[name, "norm"] = (torch.linalg.vector_norm(errors[0]) / torch.linalg.vector_norm(errors[1])).item()
        found[name, "elements"] = (errors[0].abs().median() / errors[1].abs().median()).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, record = [], {}
    for kind in INPUTS:
        runs = [ratios(kind, seed) for seed in range(options.seeds)]
        for product in PRODUCTS:
            for measure in ("norm", "elements"):
                values = [run[product, measure] for run in runs]
                median, asked = statistics.median(values), ASKED.get((kind, product, measure))
                record[f"{kind}, {product}, {measure}"] = {"median": median, "max": max(values)}
                rows.append((f"{kind}, {product}, {measure}", f"{median:.3f} ({max(values):.3f})", f"{asked or ''}", None if asked is None else median <= asked))
    finish("fine_error", rows, record, options.check, options.json_out)


if __name__ == "__main__":
    main()

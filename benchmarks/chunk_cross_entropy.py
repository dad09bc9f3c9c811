"""`ftc::chunk_cross_entropy` against linear + cross-entropy: time and peak memory of the loss, forward and backward.

    .venv/bin/python benchmarks/chunk_cross_entropy.py [--tokens 4096] [--width 512] [--vocabulary 32768] [--device cuda]

Peak memory is counted above the inputs, the parameters and the gradient of the head's weight, which both spellings have to make.
"""

import argparse

import torch
from measure import compare, finish, mebibytes, peak_memory

import ftc.dialect.chunk_cross_entropy as op

MEMORY_RATIO, TIME_RATIO = 0.25, 1.15


def setup(spelling: str, tokens: int, width: int, vocabulary: int, device: str, dtype: str, chunk_bytes: int):
    """A function that runs the loss of `spelling` ('plain' or 'chunked') once, forward and backward."""
    torch.manual_seed(0)
    op.CHUNK_BYTES = chunk_bytes
    options = {"device": device, "dtype": getattr(torch, dtype)}
    hidden_ND = torch.randn(tokens, width, **options).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, **options) * width**-0.5).requires_grad_()
    labels_N = torch.randint(vocabulary, (tokens,), device=device)
    function = {"plain": op.reference, "chunked": torch.ops.ftc.chunk_cross_entropy}[spelling]

    def run():
        hidden_ND.grad = weight_VD.grad = None
        loss = function(hidden_ND, weight_VD, None, labels_N)
        loss.backward()
        return loss

    # A small call loads kernels and thread pools, so that they are not counted as memory of the loss.
    function(hidden_ND[:8].detach().requires_grad_(), weight_VD[:8], None, labels_N[:8] % 8).backward()
    weight_VD.grad = None
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-mib", type=float, default=op.CHUNK_BYTES / 2**20)
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keywords = dict(
        tokens=args.tokens, width=args.width, vocabulary=args.vocabulary, device=args.device, dtype=args.dtype
    )
    keywords["chunk_bytes"] = int(args.chunk_mib * 2**20)

    weight_grad_bytes = args.vocabulary * args.width * getattr(torch, args.dtype).itemsize
    memory = {
        s: peak_memory(setup, args.threads, spelling=s, **keywords)["above"] - weight_grad_bytes
        for s in ("plain", "chunked")
    }
    memory_ratio = memory["chunked"] / memory["plain"]
    time = compare(setup("plain", **keywords), setup("chunked", **keywords), ("plain", "chunked"), args.rounds)
    rows = [
        ("peak memory, plain", mebibytes(memory["plain"]), "", None),
        (
            "peak memory, chunked",
            f"{mebibytes(memory['chunked'])}, {memory_ratio:.3f}x",
            f"{MEMORY_RATIO}x",
            memory_ratio <= MEMORY_RATIO,
        ),
        ("time, plain", str(time.baseline), "", None),
        ("time, chunked", f"{time.candidate}, {time.ratio:.3f}x", f"{TIME_RATIO}x", time.ratio <= TIME_RATIO),
    ]
    result = {**keywords, "peak_bytes": memory, "memory_ratio": memory_ratio, "time": time.as_dict()}
    finish("chunk_cross_entropy", rows, result, args.check)


if __name__ == "__main__":
    main()

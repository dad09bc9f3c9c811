"""Tokens a second of cached generation, greedy, one sequence: compiled decode of ours against transformers' `generate`, on the same weights.

    .venv/bin/python benchmarks/generate_speed.py [--tokens 256] [--rounds 5] [--threads 1] [--json-out FILE]

A Llama of 4 layers, 256 wide, with random weights. transformers decodes once with its static cache and a compiled forward (dynamic=False,
fullgraph=True) and once eagerly with its own default cache; the three give the same tokens, which is checked. Time is that of the whole call of
generate, prompt included; compilation is not in it. Beside wall-clock time stands CPU time, which neighbours on the machine disturb less.
"""

import argparse
import functools
import statistics
import time

import torch
import transformers
from measure import compare, finish, timing_options

from ftc.cache import CompiledStep, PagedCache, with_cache

OVER_COMPILED, OVER_EAGER = 1.5, 3.0
SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


class Ours:
    """The model with a cache and one compiled step, made once; each call begins a text anew."""

    def __init__(self, model, length: int):
        self.program = with_cache(model, fused=True).compile(dynamic=True)
        columns = -(-length // 16)
        self.cache = PagedCache(self.program, columns + 1)
        self.step = CompiledStep(self.cache, 1, 1, columns)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        sequence = self.cache.add()
        self.cache.reserve({sequence: len(prompt) + count})
        tokens = [int(self.cache.prefill({sequence: prompt})[sequence].argmax())]
        self.step.join(0, sequence)
        tokens.append(int(self.step.forward(tokens)[0].argmax()))
        while len(tokens) < count:
            tokens += self.step.follow()
        self.step.leave(0)
        self.cache.free(sequence)
        return tokens


def theirs(model, prompt: list[int], count: int, **options) -> list[int]:
    """transformers' tokens, greedy."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
    return made[0, len(prompt) :].tolist()


def timed(call, cpu_seconds: list[float]) -> None:
    """Make the call and note the CPU time that the process took for it."""
    start = time.process_time()
    call()
    cpu_seconds.append(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16)
    timing_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    eager, compiled = llama(), llama()
    compiled.forward = torch.compile(compiled.forward, dynamic=False, fullgraph=True)
    ours = Ours(llama(), args.prompt + args.tokens)
    prompt = torch.randint(1, SIZES["vocab_size"], (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    calls = {
        "ftc": lambda: ours.generate(prompt, args.tokens),
        "transformers, static cache, compiled": lambda: theirs(compiled, prompt, args.tokens, cache_implementation="static"),
        "transformers, eager": lambda: theirs(eager, prompt, args.tokens),
    }
    texts = {name: call() for name, call in calls.items()}
    assert len({tuple(text) for text in texts.values()}) == 1, f"the texts differ: {texts}"
    rows, result = [], {"sizes": SIZES, "tokens": args.tokens, "prompt": args.prompt, "same_tokens": True, "against": {}}
    for name, asked in (("transformers, static cache, compiled", OVER_COMPILED), ("transformers, eager", OVER_EAGER)):
        cpu: dict[str, list[float]] = {name: [], "ftc": []}
        timing = compare(*(functools.partial(timed, calls[which], spent) for which, spent in cpu.items()), (name, "ftc"), args.rounds)
        cpu_ratio = statistics.median(a / b for a, b in zip(*(spent[1:] for spent in cpu.values()), strict=True))
        times = 1 / timing.ratio
        speeds = [args.tokens / timing.baseline.median, args.tokens / timing.candidate.median]
        rows.append((name, f"{speeds[0]:.0f} tokens/s", "", None))
        rows.append(("ftc, compiled step", f"{speeds[1]:.0f} tokens/s, {times:.2f}x ({cpu_ratio:.2f}x in CPU time)", f"{asked}x", times >= asked))
        result["against"][name] = timing.as_dict() | {"times_as_fast": times, "times_as_fast_cpu": cpu_ratio, "tokens_per_second": speeds}
    finish("generate_speed", rows, result, args.check, args.json_out)


if __name__ == "__main__":
    main()

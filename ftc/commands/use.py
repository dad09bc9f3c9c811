"""Commands that run a model: evaluate, generate."""

import sys
from pathlib import Path

import typer

from ftc.commands.output import print_json, table
from ftc.commands.shared import JSON, MODEL, SEED, TOKENIZER, at_least

TASKS = ("text", "mtp", "passkey", "needle", "perplexity")


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)
    app.command("generate")(generate)


def evaluate(
    model: str = MODEL,
    data: list[str] = typer.Option(
        [], "--data", "--text", help="A txt, md, py, jsonl or parquet file, a folder, or stdlib; repeatable."
    ),
    tokenizer: Path = TOKENIZER,
    context: int = typer.Option(256, "--context", help="Tokens the model sees at once."),
    batch: int = typer.Option(16, "--batch", help="Windows at a time."),
    max_bytes: int = typer.Option(None, "--max-bytes", help="Use at most the first so many bytes of each source."),
    task: str = typer.Option(
        "text",
        "--task",
        help="text: bits per byte; mtp: acceptance of add-mtp's drafts, and when they pay; passkey, needle: what is hidden in a long text "
        "is found; perplexity: over sliding windows.",
    ),
    stride: int = typer.Option(None, "--stride", help="perplexity: tokens a window moves; default: half the context."),
    lengths: str = typer.Option("256,512,1024", "--lengths", help="passkey, needle: lengths of prompts in tokens."),
    depths: str = typer.Option("0,0.25,0.5,0.75,1", "--depths", help="passkey, needle: places of what is hidden, 0 first, 1 last."),
    seeds: int = typer.Option(5, "--seeds", help="passkey, needle: prompts at each length and depth."),
    experts: bool = typer.Option(False, "--experts", help="How experts are used, by domain of text (--data NAME=PATH), and what they are worth."),
    against: str = typer.Option(None, "--against", metavar="MODEL", help="--experts: an earlier checkpoint, to compare the choices with."),
    tokens: int = typer.Option(16384, "--tokens", help="--experts: tokens of each domain."),
    ablation_tokens: int = typer.Option(4096, "--ablation-tokens", help="--experts: of these, tokens to knock experts out on; 0: knock out none."),
    out: Path = typer.Option(None, "--out", help="passkey, needle: the grid as a picture, .svg or .html. --experts: a folder for report.html."),
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Bits per byte and perplexity of a model, per source of text; or how often the drafts of its MTP modules are accepted; or how
    much of a long text it uses; or what its experts do.

    [bold]Examples[/bold]

      ftc evaluate ./model --data book.txt --data questions.jsonl

      ftc evaluate runs/quickstart/train --data stdlib --max-bytes 100000 --json

      ftc evaluate runs/mtp --task mtp --data english.jsonl --data python.jsonl

      ftc evaluate longer --task passkey --lengths 1024,4096,16384 --depths 0,0.5,1 --out grid.svg

      ftc evaluate longer --task perplexity --text book.txt --context 4096 --stride 512

      ftc evaluate ./moe --experts --data english=novels.jsonl --data python=code.jsonl --out experts
    """
    from ftc.commands.long_context import GRIDS, check_grid, show_grid, show_perplexity
    from ftc.commands.shared import opened
    from ftc.errors import FtcError, nearest
    from ftc.open_model import find_tokenizer, open_tokenizer
    from ftc.texts import texts_of

    at_least(1, context=context, batch=batch, max_bytes=max_bytes, stride=stride, seeds=seeds)
    if task not in TASKS:
        raise FtcError(f"--task {task!r} is not known; {nearest(task, TASKS)}")
    if against is not None and not experts:
        raise FtcError("--against is for --experts; add it")
    if experts:
        if task != "text":
            raise FtcError(f"--experts measures experts, not --task {task}; leave one of them out")
        if max_bytes is not None:
            raise FtcError("--experts counts tokens; give --tokens in place of --max-bytes")
        from ftc.commands.experts import show_experts

        at_least(2, context=context, tokens=tokens)
        at_least(0, ablation_tokens=ablation_tokens)
        show_experts(model, data, tokenizer, against, context, batch, tokens, ablation_tokens, out, seed, as_json)
        return
    if not data and task != "passkey":
        raise FtcError(f"--task {task} needs text: --data FILE, a folder, or stdlib")
    asked = check_grid(lengths, depths, out) if task in GRIDS else None
    find_tokenizer(model, tokenizer)
    sources = texts_of(data, max_bytes)
    loaded = opened(model, seed)
    if asked is not None:
        show_grid(task, model, loaded, open_tokenizer(model, tokenizer), sources, *asked, seeds, seed, batch, out, as_json)
        return
    if task == "perplexity":
        show_perplexity(model, loaded, open_tokenizer(model, tokenizer), sources, context, stride, batch, as_json)
        return
    if task == "mtp":
        from ftc.commands.mtp import show_acceptance

        show_acceptance(model, loaded, open_tokenizer(model, tokenizer), sources, context, batch, as_json)
        return
    from ftc.evaluate import evaluate as measure

    results = measure(
        loaded,
        open_tokenizer(model, tokenizer),
        sources,
        context=context,
        batch=batch,
        progress=sys.stderr.isatty() and not as_json,
    )
    if as_json:
        print_json({"model": model, "context": context, "sources": results})
        return
    table(
        ("source", "bits per byte", "perplexity", "nats per token", "tokens", "bytes"),
        (
            (
                name,
                f"{r['bits_per_byte']:.4f}",
                f"{r['perplexity']:.4g}",
                f"{r['nats_per_token']:.4f}",
                r["tokens"],
                r["bytes"],
            )
            for name, r in results.items()
        ),
        right=(1, 2, 3, 4, 5),
    )


def generate(
    model: str = MODEL,
    prompt: str = typer.Option("", "--prompt", help="Text to continue; empty: begin a new one."),
    max_tokens: int = typer.Option(128, "--max-tokens", help="Stop after so many new tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0: always the likeliest token."),
    top_k: int = typer.Option(None, "--top-k", help="Sample from the so many likeliest tokens."),
    speculative: bool = typer.Option(False, "--speculative", help="Guess ahead with add-mtp's modules; the same text in fewer runs."),
    draft_depth: int = typer.Option(None, "--draft-depth", help="Tokens to guess ahead; default: all modules."),
    compile_: bool = typer.Option(False, "--compile", help="Compile prefill and decode: slower to begin, faster for long texts."),
    no_cache: bool = typer.Option(False, "--no-cache", help="Recompute the whole text for each token."),
    tokenizer: Path = TOKENIZER,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Continue a prompt; the text appears as it is made.

    The model is rewritten to continue from a key-value cache (insert-kv-cache, absorb-mla, each proved on the spot); where that cannot be done, the
    reason is said and the whole text is recomputed for each token.

    [bold]Examples[/bold]

      ftc generate ./model --prompt "Once upon a time"

      ftc generate runs/quickstart/train --prompt "def main(" --temperature 0.8 --top-k 40 --seed 1

      ftc generate ./model --prompt "Once" --max-tokens 500 --compile

      ftc generate runs/mtp --prompt "def main(" --speculative
    """
    from ftc.commands.shared import opened
    from ftc.errors import FtcError
    from ftc.open_model import find_tokenizer, open_tokenizer

    at_least(0, max_tokens=max_tokens, temperature=temperature)
    at_least(1, top_k=top_k, draft_depth=draft_depth)
    if speculative and (temperature or top_k is not None):
        raise FtcError("--speculative decodes greedily; leave --temperature and --top-k out")
    if draft_depth is not None and not speculative:
        raise FtcError("--draft-depth is for --speculative; add it")
    if compile_ and (no_cache or speculative):
        raise FtcError(f"--compile decodes from a cache; leave {'--no-cache' if no_cache else '--speculative'} out")
    find_tokenizer(model, tokenizer)
    loaded = opened(model, seed)
    if not (no_cache or speculative):
        loaded = _with_cache(loaded, compile_)
    from ftc.generate import generate as continue_text

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if not as_json:
        show(prompt)
    if speculative:
        from ftc.commands.mtp import speculate

        speculate(model, loaded, open_tokenizer(model, tokenizer), prompt, max_tokens, draft_depth, show, as_json)
        return
    text = continue_text(
        loaded,
        open_tokenizer(model, tokenizer),
        prompt,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        compiled=compile_,
        on_text=None if as_json else show,
    )
    if as_json:
        print_json(
            {"model": model, "prompt": prompt, "text": text, "temperature": temperature, "top_k": top_k, "seed": seed}
        )
    else:
        show("\n")


def _with_cache(model, compiled: bool):
    """The model with a key-value cache; as it is, and the reason on stderr, where it cannot have one."""
    from ftc.cache import with_cache
    from ftc.errors import FtcError, FtcFailure

    try:
        return with_cache(model, fused=compiled)
    except (FtcError, FtcFailure) as error:
        if compiled:
            raise FtcError(f"--compile decodes from a cache, and this model cannot have one: {error}") from error
        print(f"without a cache: {error}", file=sys.stderr)
        return model

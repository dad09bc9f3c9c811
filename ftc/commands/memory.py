"""The command that says what a model takes while it answers: memory."""

from pathlib import Path
from typing import Any

import typer

from ftc.commands.output import bytes_text, console, print_json, table, working
from ftc.commands.shared import JSON, SEED
from ftc.errors import FtcError

MODELS = typer.Argument(..., metavar="MODEL...", help="Folders ftc saved, Hugging Face folders, llama2.c files, or preset:NAME.")
DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def register(app: typer.Typer) -> None:
    app.command("memory")(memory)


def memory(
    models: list[str] = MODELS,
    context: int = typer.Option(None, "--context", help="Tokens of each sequence; default: the model's positions."),
    batch: int = typer.Option(1, "--batch", help="Sequences at once."),
    dtype: str = typer.Option(None, "--dtype", help="fp64, fp32, bf16 or fp16; default: as stored (a preset: fp32)."),
    block_size: int = typer.Option(16, "--block-size", help="Tokens in a block of the cache."),
    chunk: int = typer.Option(512, "--chunk", help="Tokens of each prompt given in one call."),
    rank: int = typer.Option(None, "--rank", help="With --rope: what gqa-to-mla would make, with a latent of so many elements."),
    rope: int = typer.Option(None, "--rope", help="Elements of the shared key part with RoPE."),
    activations: bool = typer.Option(True, "--activations/--no-activations", help="Predict what calls take beside weights and cache."),
    measured: bool = typer.Option(False, "--measure", help="Load the weights, make the cache, run both calls, and compare."),
    out: Path = typer.Option(None, "--out", help="A picture of cache against context: .svg, or .html with the tables."),
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Predict the bytes of weights, cache and activations, as the model is and after the passes that make its cache smaller.

    No weights are read but for --measure and folders ftc saved.

    [bold]Examples[/bold]

      ftc memory ./Llama-3.2-1B --context 131072 --batch 32

      ftc memory preset:llama-3-8b --context 8192 --rank 448 --rope 64 --dtype bf16 --out memory.html

      ftc memory mla/ --context 4096 --measure
    """
    if out is not None:
        from ftc.tasks.picture import check_picture

        check_picture(out)
    wanted = _dtype(dtype)
    from ftc.memory import Plan, measure, predict

    plan = Plan(context, batch, block_size, chunk, rank, rope)
    found, measurements = [], []
    with working(not as_json) as tell:
        for name in models:
            tell(f"{name}: predicting")
            found.append(predict(opened(name, wanted, seed, weights=False), plan, name, activations or measured))
            if measured:
                tell(f"{name}: measuring")
                measurements.append(measure(opened(name, wanted, seed, weights=True), found[-1]))
    if out is not None:
        from ftc.memory.picture import write_picture

        write_picture(out, found)
    if as_json:
        extra = [{"measured": m} for m in measurements] or [{}] * len(found)
        print_json({"models": [m.as_dict() | e for m, e in zip(found, extra, strict=True)], "picture": None if out is None else str(out)})
        return
    for index, each in enumerate(found):
        _show(each, measurements[index] if measurements else None)
    if out is not None:
        console().print(f"written: {out}", markup=False)


def opened(spec: str, dtype: str | None, seed: int, weights: bool) -> Any:
    """The model that `spec` names: with `weights`, or, but for a folder that ftc saved, on the meta device."""
    import torch

    from ftc.open_model import PRESET, is_preset, is_program, model_path, open_model

    wanted = None if dtype is None else getattr(torch, dtype)
    if not is_preset(spec) and is_program(model_path(spec)):
        model = open_model(spec)
        own = next((p.dtype for p in model.parameters()), None)
        if wanted not in (None, own):
            raise FtcError(f"--dtype {dtype}: {spec} is a program of {own} graphs; leave --dtype out, or rewrite the model in that dtype")
        return model
    if weights:
        model = open_model(spec, seed=seed)
        return model if wanted is None else model.to(wanted)
    from ftc.models.checkpoints import blueprint, meta_decoder

    if is_preset(spec):
        from ftc.models.presets import preset

        return meta_decoder(preset(spec.removeprefix(PRESET))).to(wanted or torch.float32).eval()
    path = model_path(spec)
    return blueprint(path).to(wanted or _stored_dtype(path))


def _stored_dtype(path: Path) -> Any:
    """The floating dtype that most bytes of a folder's weights have, or else the one that its config.json names; float32 where nothing says."""
    import torch

    from ftc.files import read_json
    from ftc.models.checkpoints.huggingface import stored_tensors

    if not path.is_dir() or not (path / "config.json").is_file():
        return torch.float32
    try:
        stored = stored_tensors(path).values()
    except FtcError:  # weights are not there
        config = read_json(path / "config.json")
        said = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
        return said if isinstance(said, torch.dtype) else torch.float32
    counts: dict[Any, int] = {}
    for tensor in stored:
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return max(counts, key=counts.get, default=torch.float32)


def _dtype(text: str | None) -> str | None:
    from ftc.errors import nearest

    if text is None:
        return None
    known = DTYPES | {name: name for name in DTYPES.values()}
    if text not in known:
        raise FtcError(f"--dtype {text!r} is not known; {nearest(text, known)}")
    return known[text]


def _show(found: Any, measured: dict | None) -> None:
    from ftc.memory.picture import headline
    from ftc.memory.text import rows_of, window_note

    columns, rows = rows_of(found)
    console().print(f"{found.model}: {headline(found)}", markup=False)
    latent = "" if found.weight_bytes_latent is None else f"; {bytes_text(found.weight_bytes_latent)} with latent attention"
    console().print(f"weights: {bytes_text(found.weight_bytes)}{latent}", markup=False)
    table(columns, rows, right=range(1, len(columns)))
    for note in [*found.notes, *filter(None, [window_note(found)])]:
        console().print(f"note: {note}", markup=False)
    if measured is not None:
        lines = [(name, f"{m['predicted']:,}", f"{m['measured']:,}", f"{m['ratio']:.4f}") for name, m in measured.items()]
        table(("bytes", "predicted", "measured", "ratio"), lines, right=(1, 2, 3))

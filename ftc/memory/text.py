"""What the tables of `ftc memory` say: forms of a cache by name, and their rows."""

from __future__ import annotations

from ftc.commands.output import bytes_text
from ftc.memory.predict import Memory


def label(memory: Memory, form: str) -> str:
    """A form's name, such as "GQA, FP8" or "MLA 448 + 64"."""
    latents = {(layer.latent, layer.rope) for layer in memory.layers if layer.latent}
    kinds = dict.fromkeys(layer.kind.split(",")[0] for layer in memory.layers)
    own = " and ".join(kinds)
    if len(latents) == 1 and len(kinds) == 1:
        own = "MLA {} + {}".format(*latents.pop())
    asked = f"MLA {memory.plan.rank} + {memory.plan.rope}"
    names = {"mha": "MHA", "model": own, "fp8": f"{own}, FP8", "int8": f"{own}, INT8", "latent": asked, "latent-fp8": f"{asked}, FP8"}
    return names[form]


def rows_of(memory: Memory) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and a row for each form: bytes of its cache, and what a call takes beside it."""
    columns = ("cache", "bytes a token and layer", "a token, all layers", "in all", "below MHA", "prefill chunk", "decode step", "with weights")
    rows = []
    for form in memory.forms:
        found = [layer.bytes_per_token(form, memory.plan.rank, memory.plan.rope) for layer in memory.layers]
        sizes = sorted({layer.bytes_per_token("model") if n is None else n for n, layer in zip(found, memory.layers, strict=True)})
        runs = memory.activations.get(form)
        weights = memory.weight_bytes_latent if form.startswith("latent") else memory.weight_bytes
        total = None if runs is None else weights + memory.cache_bytes(form) + max(runs.values())
        own = " (as it is)" if form == memory.stored else ""
        rows.append(
            (
                label(memory, form) + own,
                f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}",
                f"{memory.bytes_per_token(form):,}",
                bytes_text(memory.cache_bytes(form)),
                f"{memory.below_mha(form):.1f}x",
                *(("-", "-") if runs is None else (bytes_text(runs[name]) for name in ("prefill", "decode"))),
                "-" if total is None else bytes_text(total),
            )
        )
    return columns, rows


def window_note(memory: Memory) -> str | None:
    """What layers with a window keep, and what of it they read; None without such layers."""
    if memory.windows is None:
        return None
    kept, needed = (bytes_text(memory.windows[name]) for name in ("kept", "needed"))
    return f"layers with a window keep every block, {kept}, and at the end of the context still read {needed}: a sequence has one list of blocks for all layers"

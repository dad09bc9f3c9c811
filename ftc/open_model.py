"""What a user may name as MODEL on the command line and in recipes: a folder, a file, or `preset:NAME`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftc.errors import FtcError
from ftc.files import MARKER, folder_kind

PRESET = "preset:"
EXAMPLE_SHAPE = (2, 12)  # batch and tokens of the random example; capture makes both sizes dynamic
_INSIDE_A_RUN = ("program", "model")  # where a training run keeps what it made, the rewritten model first


def is_preset(spec: str | Path) -> bool:
    """Whether `spec` names a preset (random weights) rather than a place on disk."""
    return str(spec).startswith(PRESET)


def model_path(spec: str | Path) -> Path:
    """The folder or file that `spec` stands for; a training run's folder stands for the model it made.

    Raises FtcError when nothing is there.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise FtcError(
            f"there is no model at {spec}; name a folder that ftc saved, a Hugging Face folder, a llama2.c file, or {PRESET}NAME"
        )
    if path.is_dir() and folder_kind(path) not in (None, "program") and not (path / "config.json").is_file():
        inside = next((path / name for name in _INSIDE_A_RUN if (path / name).is_dir()), None)
        if inside is not None:
            return inside
    return path


def is_program(path: str | Path) -> bool:
    """Whether `path` is a folder that `program.save` wrote."""
    return Path(path).is_dir() and folder_kind(path) == "program"


def checked_program(spec: str | Path) -> Path:
    """The folder of the saved program that `spec` names. Raises FtcError when it names something else."""
    if is_preset(spec) or not (path := Path(spec).expanduser()).is_dir():
        raise FtcError(f"{spec} is not a folder; name one that ftc rewrite or program.save wrote")
    path = model_path(path)
    if is_program(path):
        return path
    if (path / MARKER).is_file() and folder_kind(path) is None:
        raise FtcError(f"{path / MARKER} cannot be read as JSON, so nothing can be verified; copy the folder again")
    raise FtcError(f"{path} holds no certificates; name a folder that ftc rewrite or program.save wrote")


def check_tokenizer(spec: str | Path, given: str | Path | None, base: Path) -> None:
    """`find_tokenizer` for a stage of a recipe, before it runs: what earlier stages make ("@stage") is not looked at."""
    if given and str(given).startswith("@"):
        return
    if given:
        find_tokenizer(spec, base / Path(given).expanduser())
    elif not str(spec).startswith("@"):
        find_tokenizer(spec if is_preset(spec) else base / Path(spec).expanduser())


def check_model(spec: str | Path) -> None:
    """Raise FtcError when `spec` cannot name a model, without reading any weights."""
    if is_preset(spec):
        from ftc.models.presets import preset

        preset(str(spec).removeprefix(PRESET))
    else:
        model_path(spec)


def open_model(spec: str | Path, *, seed: int = 0) -> Any:
    """The model that `spec` names, in eval mode: a Program for a folder that ftc saved, else an nn.Module.

    `seed` draws the weights of a preset. Raises FtcError when there is none, or it is corrupt.
    """
    if is_preset(spec):
        import torch

        from ftc.models.decoder import Decoder
        from ftc.models.presets import preset

        config = preset(str(spec).removeprefix(PRESET))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Decoder(config).eval()
    path = model_path(spec)
    if is_program(path):
        import ftc

        return ftc.load(path).eval()
    import ftc.models

    return ftc.models.load(path)


def open_blueprint(spec: str | Path) -> Any:
    """What `open_model(spec)` gives without its weights: parameters on the meta device, buffers real; of a preset nothing."""
    path = model_path(spec)
    if not is_program(path):
        from ftc.models import blueprint

        return blueprint(path)
    from torch import nn

    import ftc

    program, made = ftc.load(path).eval(), {}
    for module in program.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = made.setdefault(id(parameter), nn.Parameter(parameter.to("meta"), parameter.requires_grad))
                module._parameters[name] = meta
    return program


def find_tokenizer(spec: str | Path, given: str | Path | None = None) -> Path:
    """The tokenizer's file or folder: `given`, or what lies in or beside the model. Raises FtcError when there is none."""
    if given is not None:
        if not Path(given).exists():
            raise FtcError(
                f"there is no tokenizer at {given}; name a tokenizer.json, a tokenizer.bin or a folder with one"
            )
        return Path(given)
    if is_preset(spec):
        raise FtcError(f"{spec} has random weights and no tokenizer; name one with --tokenizer PATH (in a recipe: tokenizer)")
    path = model_path(spec)
    folders = [path, path.parent] if path.is_dir() else [path.parent]
    for folder in folders:
        for place in (folder, folder / "tokenizer"):
            for name in ("tokenizer.json", "tokenizer.bin"):
                if (place / name).is_file():
                    return place / name
    raise FtcError(f"no tokenizer.json and no tokenizer.bin lies in or beside {path}; name one with --tokenizer PATH (in a recipe: tokenizer)")


def open_tokenizer(spec: str | Path, given: str | Path | None = None) -> Any:
    """The tokenizer that belongs to the model `spec`, or the one at `given`."""
    from ftc.data.tokenizer import load_tokenizer

    return load_tokenizer(find_tokenizer(spec, given))


def vocab_size(model: Any) -> int:
    """Number of token ids that the model knows: from its configuration, else from its embedding."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None)
    for source in (config, text_config):
        size = source.get("vocab_size") if isinstance(source, dict) else getattr(source, "vocab_size", None)
        if isinstance(size, int):
            return size
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    pattern = re.compile(r"(embed|wte|tok_emb|lm_head)")
    sizes = [p.shape[0] for name, p in model.named_parameters() if p.ndim == 2 and pattern.search(name)]
    if not sizes:
        raise FtcError(
            "the model has no configuration and no embedding to read a vocabulary from; use the Python interface"
        )
    return sizes[0]


def example_inputs(model: Any, *, seed: int = 0, ids: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Keyword inputs to capture with: `ids`, or random token ids [2, 12] int64 drawn with `seed`."""
    import torch

    if ids is not None:
        return {"input_ids": torch.tensor(ids, dtype=torch.long)}
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(vocab_size(model), EXAMPLE_SHAPE, generator=generator)}

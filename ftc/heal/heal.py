"""Healing a converted model: the closed form, then distillation from the original through the trainer, measured before and after.

    folder/text.jsonl     text drawn from the original, where none is given
    folder/fitted/        the converted model after the closed form
    folder/teacher/       the original's likeliest tokens, where they are stored
    folder/train/         the run, with its checkpoints; train/program is the healed model
    folder/heal.json      what was measured

Every part that is done is kept, so a command that is repeated goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftc.errors import FtcError
from ftc.files import atomic_folder, atomic_write
from ftc.heal.settings import HealSettings

SELF = "self"  # as data: text drawn from the original
TEXT, FITTED, TEACHER, RUN, RESULT = "text.jsonl", "fitted", "teacher", "train", "heal.json"
_FIT_SEQUENCES, _APART_SEQUENCES = 96, 24


def heal(
    converted: str | Path,
    original: str | Path,
    folder: str | Path,
    settings: HealSettings | None = None,
    *,
    data: str = SELF,
    tokenizer: str = "",
    quiet: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Heal the program in `converted` towards the model `original`; returns what heal.json holds, `program` naming the healed program's folder.

    Raises FtcError where `converted` is no program of ftc, and for data and settings that do not fit.
    """
    from ftc.commands.output import working
    from ftc.open_model import checked_program, find_tokenizer, open_model, open_tokenizer
    from ftc.rewrite.calibration import kl_divergence

    settings = settings or HealSettings()
    converted, folder = checked_program(converted), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tokenizer_path = tokenizer or str(find_tokenizer(converted))
    with working(not quiet) as tell:
        tell(f"reading {original}")
        teacher = open_model(original).eval()
        if data == SELF:
            data = str(_drawn_text(teacher, open_tokenizer(converted, tokenizer_path), folder, settings, tell))
        fitting, apart = _sequences(data, tokenizer_path, settings)
        measured = _fitted(converted, teacher, folder, settings, fitting, apart, tell)
        loss = {"name": "kl", "teacher": str(Path(original).resolve())}
        if settings.store:
            loss = {"name": "kl", "teacher_logits": str(_stored(teacher, folder, data, tokenizer_path, settings, tell))}
    start = folder / FITTED if settings.closed_form else converted
    trained = _distil(start, folder, settings, data, tokenizer_path, loss, quiet, changes or {})
    with working(not quiet) as tell:
        tell("measuring")
        healed = kl_divergence(teacher, open_model(trained.program_folder).eval(), apart)
    measured |= {"healed": healed, "tokens": trained.tokens, "steps": trained.steps}
    measured |= {"seconds": round(time.perf_counter() - started, 1), "program": str(trained.program_folder)}
    atomic_write(folder / RESULT, json.dumps(measured, indent=2) + "\n")
    return measured


def _drawn_text(teacher, tokenizer, folder: Path, settings: HealSettings, tell) -> Path:
    """Sequences of `seq_len` from the original, about a quarter of the tokens of the run."""
    from ftc.data.tokens import start_id
    from ftc.heal.sampling import sample

    path, start = folder / TEXT, start_id(tokenizer)
    if path.is_file():
        return path
    if start is None:
        raise FtcError("the tokenizer has no token that begins a text, so none can be drawn from the model: name data")
    count = max(settings.tokens // 4 // settings.seq_len, _FIT_SEQUENCES + _APART_SEQUENCES)
    rows = sample(teacher, start, count, settings.seq_len, seed=settings.seed, tell=tell)
    atomic_write(path, "".join(json.dumps({"text": tokenizer.decode(row[1:].tolist())}) + "\n" for row in rows))
    return path


def _sequences(data: str, tokenizer: str, settings: HealSettings) -> tuple[list, list]:
    """Windows to fit on, and others to measure on, from the beginning of the text: batches {"input_ids" [B, T]}."""
    from ftc.data.tokenizer import load_tokenizer
    from ftc.data.tokens import start_id
    from ftc.rewrite.calibration import as_batches
    from ftc.texts import first_tokens

    loaded = load_tokenizer(tokenizer)
    ids = first_tokens([data], loaded, (_FIT_SEQUENCES + _APART_SEQUENCES) * settings.seq_len, start_id(loaded))
    windows = torch.tensor(ids[: len(ids) // settings.seq_len * settings.seq_len], dtype=torch.long).view(-1, settings.seq_len)
    if len(windows) < 4:
        raise FtcError(f"the text has {len(ids)} tokens; healing needs at least 4 windows of {settings.seq_len}")
    count = max(len(windows) // 5, 1)
    return as_batches(windows[count:]), as_batches(windows[:count])


def _fitted(converted: Path, teacher, folder: Path, settings: HealSettings, fitting, apart, tell) -> dict[str, Any]:
    """KL before and after the closed form, whose result stands in folder/fitted; read back where that is done."""
    from ftc.heal.closed_form import fit_outputs
    from ftc.open_model import open_model
    from ftc.rewrite.calibration import kl_divergence
    from ftc.rewrite_folder import copy_tokenizer

    record = folder / FITTED / "fit.json"
    if record.is_file():
        return json.loads(record.read_text())
    program = open_model(converted).eval()
    measured: dict[str, Any] = {"converted": kl_divergence(teacher, program, apart)}
    if not settings.closed_form:
        return measured
    rows = fit_outputs(teacher, program, fitting, tell=tell)
    measured |= {"fitted": kl_divergence(teacher, program, apart), "closed_form": rows}
    with atomic_folder(folder / FITTED, "program") as place:
        program.save(place)
        copy_tokenizer(converted, place)
        atomic_write(place / "fit.json", json.dumps(measured) + "\n")
    return measured


def _stored(teacher, folder: Path, data: str, tokenizer: str, settings: HealSettings, tell) -> Path:
    """The original's likeliest tokens for the run's text, stored once."""
    from ftc.data.prepare import prepare
    from ftc.data.source_table import Source
    from ftc.train.stored_teacher import INDEX, store_teacher

    if not (folder / TEACHER / INDEX).is_file():
        tell("running the original once")
        prepared = prepare(folder / "prepared", [Source(data)], tokenizer=tokenizer)
        store_teacher(teacher, prepared.train.stream(prepared.tokenizer), folder / TEACHER, k=settings.store, context=settings.seq_len)
    return folder / TEACHER


def _distil(start: Path, folder: Path, settings: HealSettings, data: str, tokenizer: str, loss: dict, quiet: bool, changes: Mapping[str, Any]):
    from ftc.train.launch import train

    section = {"model": str(Path(start).resolve()), "data": data, "tokenizer": tokenizer, "loss": loss, "validate": False}
    section |= {"stop_below": settings.stop_below}
    if Path(data).name == TEXT and "teacher" in loss:  # drawn text is windows from their beginning; a stored teacher knows one stream
        section |= {"packing": "documents"}
    if settings.parameters == "converted":
        section |= {"trainable": _converted_parameters(start)}
    tables = {
        "job": {"description": "heal"},
        "ftc": section,
        "training": {"seq_len": settings.seq_len, "local_batch_size": max(settings.batch // settings.nproc, 1), "steps": settings.steps, "mixed_precision_param": "float32"},
        "optimizer": {"lr": settings.learning_rate, "weight_decay": 0.0},
        "lr_scheduler": {"warmup_steps": min(10, settings.steps // 10 + 1), "decay_type": "linear"},
        "metrics": {"log_freq": 5, "disable_color_printing": True},
        "checkpoint": {"enable": True, "interval": max(settings.steps // 4, 1), "keep_latest_k": 2, "last_save_model_only": False},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": settings.seed},
    }
    return train(tables, folder / RUN, dict(changes), quiet=quiet, num_processes=settings.nproc)


def _converted_parameters(folder: Path) -> list[str]:
    """The matrices that a latent attention is computed from, by name."""
    from ftc.open_model import open_blueprint
    from ftc.rewrite.attention_site import latent_nodes
    from ftc.rewrite.edit import is_parameter
    from ftc.rewrite.shell_parts import ancestors

    found = set()
    for region in open_blueprint(folder).regions:
        read = [n for n in ancestors(latent_nodes(region.code)) if is_parameter(n)]
        found |= {f"{region.name}.{n.target}" for n in read if region.fetch(str(n.target)).dim() > 1}
    if not found:
        raise FtcError(f"{folder} has no latent attention, so none of its parameters is a converted one")
    return sorted(found)

"""The stage `train`: a run of torchtitan, which continues from its checkpoint when it was interrupted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ftc.data.huggingface import PREFIX
from ftc.errors import FtcError
from ftc.recipes.stage import Context, Result, Stage, place

_PATHS = ("data", "validation_data", "tokenizer", "model")  # keys of [ftc] that may name a place on disk
_SOURCE_PATHS = ("path", "validation")  # and of [[ftc.sources]]
_MAX_POINTS = 400  # of the loss curve that go into the report


@dataclass(frozen=True)
class Train(Stage):
    """`config`: a torchtitan TOML file with a section [ftc], or "quickstart". `set`: keys to change in it."""

    config: str = "quickstart"
    set: dict[str, Any] = field(default_factory=dict)
    model: str = place("model", "")  # start from these weights

    kind: ClassVar[str] = "train"
    summary: ClassVar[str] = "train a model through torchtitan"
    outputs: ClassVar[tuple[str, ...]] = ("model", "original", "tokenizer", "run")
    resumable: ClassVar[bool] = True

    def check(self, base: Path) -> None:
        from ftc.train.launch import check_run

        check_run(self._tables(base))

    def depends_on(self, base: Path) -> Any:
        from ftc.recipes.fingerprint import named_hash

        tables = self._tables(base)
        section = tables.get("ftc", {})
        files = {key: named_hash(section[key], base) for key in _PATHS if section.get(key)}
        for number, table in enumerate(section.get("sources", []), 1):
            files |= {f"source {number} {key}": named_hash(table[key], base) for key in _SOURCE_PATHS if table.get(key)}
        files.setdefault("data", named_hash("stdlib", base))
        return {"tables": tables, "files": files}

    def run(self, context: Context) -> Result:
        from ftc.train.launch import train
        from ftc.train.metrics_file import METRICS_FILE, curve, curves, read_metrics

        base = context.base
        trained = train(
            self._tables(base), context.folder, {"ftc.model": self.model} if self.model else None, quiet=context.quiet
        )
        rows = read_metrics(context.folder / METRICS_FILE)
        validation = trained.validation or {}
        facts = {"steps": trained.steps, "tokens": trained.tokens, "training seconds": round(trained.seconds, 1)}
        facts |= {f"tokens of {name}": given["tokens"] for name, given in trained.data.items() if len(trained.data) > 1}
        loss = {"train": curve(rows, "loss", _MAX_POINTS), "sources": curves(rows, "validation_loss", _MAX_POINTS)}
        report: dict[str, Any] = {"loss": loss | {"validation": []}, "facts": facts}
        baselines = validation.get("curve", {})
        report["curve"] = {
            name: {
                "points": points,
                "baseline": baselines.get(name, {}).get("trigram_bits_per_byte"),
                "bytes": baselines.get(name, {}).get("bytes"),
            }
            for name, points in curves(rows, "validation_bits_per_byte", _MAX_POINTS).items()
        }
        if validation:
            report["loss"]["validation"] = [[trained.steps, validation["nats_per_token"]]]
            report["validation"] = validation
        resolved = context.folder / "resolved.toml"
        if resolved.is_file():
            report["configuration"] = resolved.read_text()
        return Result(self._outputs(trained, context.folder), report)

    def _outputs(self, trained: Any, folder: Path) -> dict[str, str]:
        made = trained.program_folder or trained.model_folder
        outputs = {
            "model": made,
            "original": trained.model_folder,
            "tokenizer": trained.tokenizer_folder,
            "run": folder,
        }
        return {name: str(path.relative_to(folder)) for name, path in outputs.items() if path is not None}

    def _tables(self, base: Path) -> dict[str, Any]:
        """The run's tables with paths made absolute: those in a run file start at its folder, those in `set` at the recipe's."""
        from ftc.train.launch import resolve

        config, config_base = self.config, base
        if config != "quickstart":
            config = base / Path(config).expanduser()
            config_base = config.parent
            if not config.is_file():
                raise FtcError(f"config = {self.config!r}: there is no such run file in {base}")
        changed = {dotted: value for dotted, value in _dotted(self.set)}
        tables = resolve(config, changed)
        section = tables.setdefault("ftc", {})
        for key in _PATHS:
            if section.get(key):
                section[key] = _absolute(section[key], base if f"ftc.{key}" in changed else config_base)
        for table in section.get("sources", []):
            for key in _SOURCE_PATHS:
                if table.get(key):
                    table[key] = _absolute(table[key], base if "ftc.sources" in changed else config_base)
        return tables


def _absolute(value: str, start: Path) -> str:
    """A path that exists below `start` made absolute; a word, or the name of a dataset, as it is."""
    prefix = PREFIX if value.startswith(PREFIX) else ""
    place = start / Path(value.removeprefix(prefix)).expanduser()
    return f"{prefix}{place.resolve()}" if place.exists() else value


def _dotted(values: dict[str, Any], prefix: str = ""):
    """{"training": {"steps": 1}} and {"training.steps": 1} both as ("training.steps", 1)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""The stage `rewrite`: passes applied to a model, each with its certificate."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.recipes.stage import Context, Result, Stage, place

PROGRAM = "program"


@dataclass(frozen=True)
class Rewrite(Stage):
    """`passes`: names, or tables with `name` and options. `data`: text for passes that calibrate, or "self": drawn from the model."""

    model: str = place("model", words=("preset:",))
    passes: list[Any] = field(default_factory=list)
    data: list[str] = place("run", [], words=("stdlib", "self"))
    tokenizer: str = place("tokenizer", "")
    seed: int = 0
    check_contracts: bool = True

    kind: ClassVar[str] = "rewrite"
    summary: ClassVar[str] = "rewrite a model with passes, each proved"
    outputs: ClassVar[tuple[str, ...]] = ("model", "report")

    def check(self, base: Path) -> None:
        from ftc.open_model import PRESET, check_model
        from ftc.rewrite.registry import parse_passes

        if not self.passes:
            raise FtcError('passes is empty; write passes = ["raise", "fuse-qkv"], say')
        parse_passes(self.passes)
        if self.model.startswith(PRESET):
            check_model(self.model)

    def run(self, context: Context) -> Result:
        from ftc.rewrite_folder import rewrite_folder

        report = rewrite_folder(
            self.model,
            self.passes,
            context.folder / PROGRAM,
            data=self.data,
            tokenizer=self.tokenizer or None,
            seed=self.seed,
            check=self.check_contracts,
            progress=not context.quiet,
        )
        atomic_write(context.folder / "report.json", json.dumps(report, indent=2, default=str) + "\n")
        facts = {f"{name}: KL, nats a token": round(e["metric"]["value"], 4) for name, e in report["passes"].items() if "metric" in e}
        return Result({"model": PROGRAM, "report": "report.json"}, {"rewrite": report} | ({"facts": facts} if facts else {}))

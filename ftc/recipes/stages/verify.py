"""The stage `verify`: every certificate of a rewritten model run again from the files alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftc.commands.output import working
from ftc.errors import FtcFailure
from ftc.files import atomic_write
from ftc.recipes.stage import REFERENCE, Context, Result, Stage, place


@dataclass(frozen=True)
class Verify(Stage):
    model: str = place("model")

    kind: ClassVar[str] = "verify"
    summary: ClassVar[str] = "run every certificate of a rewritten model again"
    outputs: ClassVar[tuple[str, ...]] = ("results",)

    def check(self, base: Path) -> None:
        if not self.model.startswith(REFERENCE):
            from ftc.open_model import checked_program

            checked_program(base / Path(self.model).expanduser())

    def run(self, context: Context) -> Result:
        import ftc

        with working(not context.quiet) as tell:
            verification = ftc.verify(self.model, tell)
        if not verification.ok:
            failed = [f"{row['name']} ({row['detail']})" for row in verification.rows if not row["ok"]]
            raise FtcFailure(f"{self.model} does not verify: {'; '.join(failed)}")
        values = verification.as_dict()
        atomic_write(context.folder / "verification.json", json.dumps(values, indent=2, default=str) + "\n")
        rows = [dict(row) for row in verification.rows]
        return Result({"results": "verification.json"}, {"verification": {"ok": True, "rows": rows}})

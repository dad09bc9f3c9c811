"""The stage `heal`: a converted model brought back to its original, in closed form and by distillation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftc.heal.settings import HealSettings
from ftc.recipes.stage import Context, Result, Stage, place


@dataclass(frozen=True, kw_only=True)
class Heal(HealSettings, Stage):
    """`model`: the converted program, `original`: what it was converted from; `data`: text, or "self" for text drawn from the original.

    Other fields are those of `HealSettings`, which checks them.
    """

    model: str = place("model")
    original: str = place("model")
    data: str = place("run", "self", words=("self", "stdlib"))
    tokenizer: str = place("tokenizer", "")

    kind: ClassVar[str] = "heal"
    summary: ClassVar[str] = "bring a converted model back to its original"
    outputs: ClassVar[tuple[str, ...]] = ("model", "run")
    resumable: ClassVar[bool] = True

    def run(self, context: Context) -> Result:
        from ftc.heal.heal import RUN, heal

        found = heal(self.model, self.original, context.folder, self, data=self.data, tokenizer=self.tokenizer, quiet=context.quiet)
        facts: dict[str, Any] = {"KL before": round(found["converted"], 4)}
        if "fitted" in found:
            facts["KL after the closed form"] = round(found["fitted"], 4)
        facts |= {"KL healed": round(found["healed"], 4), "tokens": found["tokens"], "seconds": found["seconds"]}
        program = Path(found["program"]).relative_to(context.folder)
        return Result({"model": str(program), "run": RUN}, {"facts": facts, "heal": found})

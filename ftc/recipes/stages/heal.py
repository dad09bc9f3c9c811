"""The stage `heal`: a converted model brought back to its original, in closed form and by distillation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftc.recipes.stage import Context, Result, Stage, place


@dataclass(frozen=True)
class Heal(Stage):
    """`model`: the converted program, `original`: what it was converted from; `data`: text, or "self" for text drawn from the original.

    Other fields as in `ftc.heal.heal.HealSettings`.
    """

    model: str = place("model")
    original: str = place("model")
    data: str = place("run", "self", words=("self", "stdlib"))
    tokenizer: str = place("tokenizer", "")
    tokens: int = 1_000_000
    seq_len: int = 256
    batch: int = 16
    parameters: str = "all"
    learning_rate: float = 1e-3
    closed_form: bool = True
    stop_below: float = 0.0
    store: int = 0
    nproc: int = 1
    seed: int = 0

    kind: ClassVar[str] = "heal"
    summary: ClassVar[str] = "bring a converted model back to its original"
    outputs: ClassVar[tuple[str, ...]] = ("model", "run")
    resumable: ClassVar[bool] = True

    def check(self, base: Path) -> None:
        self._settings()

    def _settings(self):
        import dataclasses

        from ftc.heal.heal import HealSettings

        return HealSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(HealSettings)})

    def run(self, context: Context) -> Result:
        from ftc.heal.heal import RUN, heal

        found = heal(self.model, self.original, context.folder, self._settings(), data=self.data, tokenizer=self.tokenizer, quiet=context.quiet)
        facts: dict[str, Any] = {"KL before": round(found["converted"], 4)}
        if "fitted" in found:
            facts["KL after the closed form"] = round(found["fitted"], 4)
        facts |= {"KL healed": round(found["healed"], 4), "tokens": found["tokens"], "seconds": found["seconds"]}
        program = Path(found["program"]).relative_to(context.folder)
        return Result({"model": str(program), "run": RUN}, {"facts": facts, "heal": found})

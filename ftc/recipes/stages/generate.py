"""The stage `generate`: a model's continuations of given prompts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ftc.commands.output import working
from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.recipes.stage import Context, Result, Stage, place


@dataclass(frozen=True)
class Generate(Stage):
    model: str = place("model", words=("preset:",))
    prompts: list[str] = field(default_factory=list)
    tokenizer: str = place("tokenizer", "")
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0: from all tokens
    seed: int = 0

    kind: ClassVar[str] = "generate"
    summary: ClassVar[str] = "continue prompts"
    outputs: ClassVar[tuple[str, ...]] = ("samples",)

    def check(self, base: Path) -> None:
        from ftc.open_model import check_tokenizer

        if not self.prompts:
            raise FtcError('prompts is empty; write prompts = ["Once upon a time"], say')
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise FtcError(
                f"max_tokens {self.max_tokens}, temperature {self.temperature}, top_k {self.top_k}: "
                "max_tokens must be at least 1, the others not negative"
            )
        check_tokenizer(self.model, self.tokenizer or None, base)

    def run(self, context: Context) -> Result:
        from ftc.generate import generate
        from ftc.open_model import open_model, open_tokenizer

        tokenizer = open_tokenizer(self.model, self.tokenizer or None)
        model = open_model(self.model, seed=self.seed)
        samples = []
        with working(not context.quiet) as tell:
            for number, prompt in enumerate(self.prompts, 1):
                tell(f"prompt {number} of {len(self.prompts)}")
                text = generate(
                    model,
                    tokenizer,
                    prompt,
                    self.max_tokens,
                    temperature=self.temperature,
                    top_k=self.top_k or None,
                    seed=self.seed,
                )
                samples.append({"prompt": prompt, "text": text, "temperature": self.temperature})
        atomic_write(context.folder / "samples.json", json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
        return Result({"samples": "samples.json"}, {"samples": samples})

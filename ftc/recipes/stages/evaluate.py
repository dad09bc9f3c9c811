"""The stage `evaluate`: bits per byte of a model on text, per source, beside those of a trigram model if asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.recipes.stage import Context, Result, Stage, place

_MAX_SOURCES = 8  # of a training run's held-out text; the smaller folders are put together


@dataclass(frozen=True)
class Evaluate(Stage):
    """`data`: files, folders, stdlib, or "@train": the text that the run held out, by folder.

    `baseline` adds a smoothed trigram model of that run's training tokens. `max_bytes`: of each source; 0: all.
    """

    model: str = place("model", words=("preset:",))
    data: list[str] = place("run", words=("stdlib",))
    tokenizer: str = place("tokenizer", "")
    baseline: bool = False
    max_bytes: int = 0
    context: int = 256
    batch: int = 16

    kind: ClassVar[str] = "evaluate"
    summary: ClassVar[str] = "bits per byte and perplexity per source"
    outputs: ClassVar[tuple[str, ...]] = ("results",)

    def check(self, base: Path) -> None:
        from ftc.open_model import check_tokenizer

        if not self.data:
            raise FtcError('data is empty; write data = ["book.txt"], data = ["stdlib"] or data = ["@train"]')
        if self.context < 1 or self.batch < 1 or self.max_bytes < 0:
            raise FtcError(
                f"context {self.context}, batch {self.batch}, max_bytes {self.max_bytes}: they must be positive"
            )
        if self.baseline and not any(entry.startswith("@") for entry in self.data):
            raise FtcError('baseline needs the tokens of a training run; write data = ["@train"]')
        check_tokenizer(self.model, self.tokenizer or None, base)

    def run(self, context: Context) -> Result:
        from ftc.evaluate import evaluate
        from ftc.open_model import open_model, open_tokenizer
        from ftc.texts import texts_of

        limit = self.max_bytes or None
        sources: dict[str, list[str]] = {}
        baseline: dict[str, float] = {}
        for entry in self.data:
            if is_run(entry):
                held_out = held_out_texts(Path(entry), limit)
                sources |= held_out
                if self.baseline:
                    baseline |= trigram_bits_per_byte(Path(entry), held_out)
            else:
                sources |= texts_of([entry], limit)
        tokenizer = open_tokenizer(self.model, self.tokenizer or None)
        results = evaluate(
            open_model(self.model),
            tokenizer,
            sources,
            context=self.context,
            batch=self.batch,
            progress=not context.quiet,
        )
        report: dict[str, Any] = {"sources": results, "baseline": baseline}
        atomic_write(context.folder / "results.json", json.dumps(report, indent=2) + "\n")
        return Result({"results": "results.json"}, {"evaluation": report})


def is_run(path: str | Path) -> bool:
    """Whether `path` is the folder of a training run, with its tokens."""
    return (Path(path) / "tokens" / "key.json").is_file()


def held_out_texts(run: Path, max_bytes: int | None) -> dict[str, list[str]]:
    """The validation texts of a training run: by source, or of a single one by first folder, largest first, the smallest
    ones as "(other)"."""
    from ftc.data.prepare import validation_documents
    from ftc.texts import by_folder, first_bytes
    from ftc.train.config import Ftc, read_toml, sources_of

    section = read_toml(run / "run.toml").get("ftc", {})
    fraction = section.get("validation_fraction", Ftc.validation_fraction)
    held_out = {name: found for name, found in validation_documents(sources_of(section), fraction).items() if found}
    if not held_out:
        raise FtcError(f"the run in {run} held out no text; set ftc.validation_fraction or ftc.validation_data in it")
    groups = {name: [document.text for document in documents] for name, documents in held_out.items()}
    if len(groups) == 1:
        (documents,) = held_out.values()
        groups = {name: [documents[index].text for index in indices] for name, indices in by_folder(documents).items()}
    order = sorted(groups, key=lambda name: -sum(map(len, groups[name])))
    if len(order) > _MAX_SOURCES:
        kept, rest = order[: _MAX_SOURCES - 1], order[_MAX_SOURCES - 1 :]
        groups = {name: groups[name] for name in kept} | {"(other)": [text for name in rest for text in groups[name]]}
        order = [*kept, "(other)"]
    return {name: first_bytes(groups[name], max_bytes) for name in order}


def trigram_bits_per_byte(run: Path, sources: dict[str, list[str]]) -> dict[str, float]:
    """Bits per byte on each source of a smoothed trigram model counted on the run's training tokens."""
    from ftc.data.ngram import Trigram
    from ftc.data.prepare import training_tokens
    from ftc.data.tokenizer import load_tokenizer
    from ftc.data.tokens import text_ids

    tokenizer = load_tokenizer(run / "tokenizer")
    boundary = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.vocab_size
    trigram = Trigram(training_tokens(run).documents(), max(tokenizer.vocab_size, boundary + 1), boundary)
    return {
        name: trigram.bits_per_byte(
            [text_ids(tokenizer, text) for text in texts], sum(len(text.encode()) for text in texts)
        )
        for name, texts in sources.items()
    }

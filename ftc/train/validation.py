"""Bits per byte on what a run held out: of each source and of all together, beside those of a trigram model."""

from typing import Any

from ftc.data.ngram import Trigram
from ftc.data.prepare import Prepared
from ftc.evaluate import evaluate_ids, summary


def validate(model: Any, prepared: Prepared, context: int, trigram: Trigram | None) -> dict[str, Any]:
    """{"bits_per_byte", "perplexity", ...} of all sources, and under "sources" the same for each that held out text.

    "trigram_bits_per_byte" is that of `trigram`; it is left out where there is none.
    """
    sources = {}
    for each in prepared.sources:
        text = each.validation
        if text.num_bytes:
            measured = evaluate_ids(
                model, prepared.tokenizer, text.documents(), text.num_bytes, context=context, progress=False
            )
            if trigram is not None:
                measured["trigram_bits_per_byte"] = trigram.bits_per_byte(text.documents(), text.num_bytes)
            sources[each.source.name] = measured
    nats, tokens, size = (sum(each[key] for each in sources.values()) for key in ("nats", "tokens", "bytes"))
    whole = summary(nats, tokens, size)
    if trigram is not None:
        bits = sum(each["trigram_bits_per_byte"] * each["bytes"] for each in sources.values())
        whole["trigram_bits_per_byte"] = bits / size
    return whole | {"sources": sources}


def count_trigram(prepared: Prepared) -> Trigram | None:
    """A trigram model of the training tokens of all sources; None where all of them are streamed."""
    tokenizer, text = prepared.tokenizer, prepared.train
    if not len(text.ids):
        return None
    boundary = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.vocab_size
    return Trigram(text.documents(), max(tokenizer.vocab_size, boundary + 1), boundary)

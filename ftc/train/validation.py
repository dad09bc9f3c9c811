"""Bits per byte on all of the held-out text, when training has ended, beside those of a trigram model."""

from typing import Any

from ftc.data.ngram import Trigram
from ftc.data.tokens import Prepared
from ftc.evaluate import evaluate_ids


def validate(model: Any, prepared: Prepared, context: int, trigram: Trigram) -> dict[str, Any]:
    """{"bits_per_byte", "perplexity", ...} of the model, and "trigram_bits_per_byte"."""
    held_out = prepared.validation
    documents = held_out.documents()
    measured = evaluate_ids(model, prepared.tokenizer, documents, held_out.num_bytes, context=context, progress=False)
    return measured | {"trigram_bits_per_byte": trigram.bits_per_byte(documents, held_out.num_bytes)}


def count_trigram(prepared: Prepared) -> Trigram:
    """A trigram model of the training tokens."""
    tokenizer = prepared.tokenizer
    boundary = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.vocab_size
    return Trigram(prepared.train.documents(), max(tokenizer.vocab_size, boundary + 1), boundary)

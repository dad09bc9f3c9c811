"""Train a byte-level BPE tokenizer, so that any text is representable and no token is unknown."""

import json
from collections.abc import Iterable
from pathlib import Path

from ftc.errors import FtcError
from ftc.files import atomic_write

END_OF_TEXT = "<|endoftext|>"  # separates documents, begins a prompt and ends a generation
MIN_VOCAB_SIZE = 257  # 256 bytes and END_OF_TEXT


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path, *, quiet: bool = True) -> Path:
    """Train on `texts` and write `path`/tokenizer.json and tokenizer_config.json; returns the folder.

    Deterministic. The vocabulary may come out smaller than `vocab_size` where the text has too few pairs to merge.
    Raises FtcError for a vocabulary below 257 or empty text. Source: Sennrich et al. 2016; byte level: GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise FtcError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB_SIZE}")
    texts = [text for text in texts if text]
    if not texts:
        raise FtcError("there is no text to train a tokenizer on; give `data` at least one non-empty document")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=not quiet,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    path = Path(path)
    atomic_write(path / "tokenizer.json", tokenizer.to_str(pretty=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    atomic_write(path / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return path

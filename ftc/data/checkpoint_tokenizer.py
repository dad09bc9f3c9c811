"""The tokenizer of a run that starts from a checkpoint: the checkpoint's own, or one that is seen to be the same."""

from pathlib import Path

from ftc.data.llama2c_tokenizer import Llama2cTokenizer
from ftc.data.tokenizer import Tokenizer, load_tokenizer
from ftc.errors import FtcError
from ftc.open_model import find_tokenizer

# Words, numbers, code and other scripts: what tokenizers cut differently.
_PROBE = "Once upon a time, in 1984, it's “quoted” — naïve café.\n\ndef f(x):\n\treturn x[-1] != 0x2A\n  日本語 Привет мир ∑ 🙂"


def checkpoint_tokenizer(model: str, given: str) -> str:
    """Where the tokenizer is for training the checkpoint `model`: `given`, or the one in or beside the checkpoint.

    Raises FtcError when there is none, and when `given` is another one than the checkpoint's.
    """
    try:
        own = find_tokenizer(model)
    except FtcError as error:
        if given:
            return given
        raise FtcError(f"no tokenizer lies in or beside the checkpoint {model}; name its own in [ftc] tokenizer") from error
    if given and Path(given).resolve() != own.resolve():
        difference = first_difference(load_tokenizer(given), load_tokenizer(own))
        if difference:
            raise FtcError(
                f"the tokenizer {given} is not that of the checkpoint {model}: {difference}; leave [ftc] tokenizer out"
            )
    return given or str(own)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, from_checkpoint: bool) -> None:
    """Raise FtcError for a tokenizer that a model with `vocab_size` ids cannot have been trained with.

    Embeddings are padded, by 3% in published checkpoints, so a checkpoint may know somewhat more ids than its tokenizer.
    """
    if tokenizer.vocab_size > vocab_size:
        raise FtcError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows {vocab_size}; set [ftc] tokenizer to the "
            "model's own"
        )
    if from_checkpoint and tokenizer.vocab_size < 0.9 * vocab_size:
        raise FtcError(
            f"the tokenizer has only {tokenizer.vocab_size} ids of the {vocab_size} that the checkpoint knows, so it is not the "
            "checkpoint's; set [ftc] tokenizer to its own"
        )


def first_difference(one: Tokenizer, other: Tokenizer) -> str:
    """In what two tokenizers differ, "" where no difference is found."""
    if one.vocab_size != other.vocab_size:
        return f"it has {one.vocab_size} ids, the checkpoint's has {other.vocab_size}"
    for name in ("bos_id", "eos_id"):
        if getattr(one, name) != getattr(other, name):
            return f"its {name} is {getattr(one, name)}, the checkpoint's is {getattr(other, name)}"
    pieces, own = _pieces(one), _pieces(other)
    if type(one) is type(other) and pieces != own:
        piece = min(piece for piece in {**pieces, **own} if pieces.get(piece) != own.get(piece))
        return f"{piece!r} is {_name(pieces.get(piece))} in it, and {_name(own.get(piece))} in the checkpoint's"
    return "" if one.encode(_PROBE) == other.encode(_PROBE) else "it gives other ids for the same text"


def _pieces(tokenizer: Tokenizer) -> dict:
    if isinstance(tokenizer, Llama2cTokenizer):
        return {piece: token for token, piece in enumerate(tokenizer.pieces)}
    return tokenizer.vocabulary()


def _name(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"

"""One interface for all tokenizers, whatever file they come from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ftc.data.llama2c_tokenizer import Llama2cTokenizer
from ftc.errors import FtcError

_COMMON_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<|startoftext|>", "<|endoftext|>")
_COMMON_EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|endoftext|>")


class Tokenizer(Protocol):
    """What `load_tokenizer` returns."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no special tokens are added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""


class JsonTokenizer:
    """A tokenizer.json, run by the `tokenizers` library; the special tokens come from the files beside it."""

    def __init__(self, path: str | Path):
        """`path`: a tokenizer.json. Raises FtcError when it is missing or cannot be read."""
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        if not path.is_file():
            raise FtcError(f"{path} does not exist")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise FtcError(f"{path} is not a valid tokenizer.json ({error}); copy it again") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id = self._special("bos", path.parent, _COMMON_BOS)
        self.eos_id = self._special("eos", path.parent, _COMMON_EOS)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        # A batch of one, since the library holds Python's lock in `encode`: other threads would stand still. No offsets: faster.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, special tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def special_tokens(self) -> dict[str, str | None]:
        """The tokens of `bos_id` and `eos_id`, as tokenizer_config.json names them."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {name: None if token is None else self._backend.id_to_token(token) for name, token in ids.items()}

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _special(self, which: str, folder: Path, common: tuple[str, ...]) -> int | None:
        """The id that the folder's settings name, else that of a customary spelling which the vocabulary has."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = _settings(folder / file)
            if f"{which}_token" in settings:
                token = settings[f"{which}_token"]
                if token is None:
                    return None
                return self._backend.token_to_id(token["content"] if isinstance(token, dict) else token)
        for file in ("generation_config.json", "config.json"):
            token = _settings(folder / file).get(f"{which}_token_id")
            if token is not None:
                return token[0] if isinstance(token, list) else token
        return next(
            (self._backend.token_to_id(token) for token in common if self._backend.token_to_id(token) is not None), None
        )


def _settings(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FtcError(f"{path} is not valid JSON ({error}); copy it again") from error
    return settings if isinstance(settings, dict) else {}


def tokenizer_file(place: str | Path) -> Path:
    """The tokenizer.json or tokenizer.bin that `place`, a file or a folder, stands for. Raises FtcError when there is none."""
    place = Path(place)
    files = [place] if not place.is_dir() else [place / "tokenizer.json", place / "tokenizer.bin"]
    found = next((file for file in files if file.is_file()), None)
    if found is None and place.is_dir():
        raise FtcError(f"{place} holds no tokenizer.json and no tokenizer.bin; put the model's tokenizer there")
    if found is None:
        raise FtcError(f"there is no tokenizer at {place}; name a tokenizer.json, a tokenizer.bin or a folder with one")
    return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json or llama2.c tokenizer.bin, or in a folder that holds one of these names.

    Raises FtcError when there is none, or it is corrupt.
    """
    path = tokenizer_file(path)
    return Llama2cTokenizer.from_file(path) if path.suffix == ".bin" else JsonTokenizer(path)

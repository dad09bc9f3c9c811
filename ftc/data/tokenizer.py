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
        return self._backend.encode(text, add_special_tokens=False).ids

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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json or llama2.c tokenizer.bin, or in a folder that holds one of these names.

    Raises FtcError when there is none, or it is corrupt.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.bin") if (path / name).is_file()]
        if not found:
            raise FtcError(f"{path} holds no tokenizer.json and no tokenizer.bin; put the model's tokenizer there")
        path = found[0]
    if path.suffix == ".bin":
        return Llama2cTokenizer.from_file(path)
    return JsonTokenizer(path)

"""A run's data, made ready before the first step: its tokenizer, the tokens of what is held, a look at what is streamed."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftc.data.bpe import train_bpe
from ftc.data.source_table import Source, check_sources
from ftc.data.sources import Document, good_documents, split_documents
from ftc.data.tokenizer import load_tokenizer, tokenizer_file
from ftc.data.tokens import EMPTY, TokenizedText, join, load, store, tokenize
from ftc.errors import FtcError
from ftc.files import atomic_write

TOKENS, TOKENIZER = "tokens", "tokenizer"
SAMPLE_BYTES = 16 << 20  # of a streamed source that a tokenizer is trained on


@dataclass(frozen=True)
class PreparedSource:
    """A source with its tokens: `train` is empty where it is streamed, `validation` where it has none."""

    source: Source
    train: TokenizedText
    validation: TokenizedText
    num_skipped: int = 0  # bad records left out of what was tokenized


@dataclass(frozen=True)
class Prepared:
    """A run's tokenizer and sources."""

    tokenizer: Any
    tokenizer_folder: Path
    sources: tuple[PreparedSource, ...]

    @property
    def train(self) -> TokenizedText:
        """The training documents of all sources that are held."""
        return join([source.train for source in self.sources])

    @property
    def validation(self) -> TokenizedText:
        """The validation documents of all sources."""
        return join([source.validation for source in self.sources])


@dataclass
class _Texts:
    """The documents of one source."""

    source: Source
    train: list[Document] = field(default_factory=list)  # a sample where the source is streamed
    validation: list[Document] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    identity: str = ""  # of a stream


def prepare(
    folder: str | Path,
    sources: Sequence[Source],
    *,
    validation_fraction: float = 0.1,
    tokenizer: str = "",
    vocab_size: int = 4096,
    resuming: bool = False,
    quiet: bool = True,
) -> Prepared:
    """Read the sources, take or train a tokenizer, and tokenize; what `folder` already holds of the same input is used again.

    Writes `folder`/tokenizer and `folder`/tokens; processes that prepare one folder at a time wait for each other. Raises
    FtcError for unreadable or empty data, and, when `resuming`, for data other than the folder was made of.
    """
    folder = Path(folder)
    check_sources(sources)
    with _alone(folder):
        texts = [_read(source, validation_fraction) for source in sources]
        fingerprint = _fingerprint(texts, tokenizer, vocab_size)
        stored = load(folder / TOKENS, fingerprint) if (folder / TOKENIZER).is_dir() else None
        if stored is None:
            if resuming:
                raise FtcError(
                    f"the text or the tokenizer is not what the checkpoints in {folder} were trained on; put it back, or begin "
                    "anew with --restart"
                )
            _make_tokenizer(folder / TOKENIZER, texts, tokenizer, vocab_size, quiet)
        loaded = load_tokenizer(folder / TOKENIZER)
        if stored is None:
            store(folder / TOKENS, fingerprint, _tokenized(loaded, texts, quiet))
            stored = load(folder / TOKENS, fingerprint)
    prepared = [
        PreparedSource(
            each.source,
            stored.get(f"{each.source.name}/train", EMPTY),
            stored[f"{each.source.name}/validation"],
            len(each.skipped),
        )
        for each in texts
    ]
    return Prepared(loaded, folder / TOKENIZER, tuple(prepared))


def training_tokens(folder: Path) -> TokenizedText:
    """The training tokens that `prepare` left in a run's folder. Raises FtcError where all of its text was streamed."""
    stored = load(folder / TOKENS) or {}
    if not any(name.endswith("/train") for name in stored):
        raise FtcError(f"{folder} holds no training tokens: the run streamed all of its text, so there is no baseline")
    return join([part for name, part in stored.items() if name.endswith("/train")])


def validation_documents(sources: Sequence[Source], validation_fraction: float) -> dict[str, list[Document]]:
    """The validation documents of each source, by its name."""
    return {source.name: _read(source, validation_fraction).validation for source in sources}


def _read(source: Source, validation_fraction: float) -> _Texts:
    """All documents of a source, or of a streamed one those at its beginning. Raises FtcError when no training text is left."""
    corpus, own = source.corpus(), source.validation_corpus()
    texts = _Texts(source)
    skipped = texts.skipped if source.bad_records == "skip" else None
    documents = good_documents((record for record, _ in corpus.read()), corpus.title, skipped)
    if source.streaming:
        texts.identity, texts.train = corpus.identity(), list(_first_bytes(documents, SAMPLE_BYTES))
    elif own is None:
        texts.train, texts.validation = split_documents(documents, validation_fraction)
    else:
        texts.train = list(documents)
    if own is not None:
        texts.validation = list(good_documents((record for record, _ in own.read()), own.title, skipped))
    if not texts.train:
        raise FtcError(
            f"{source.path} leaves no training text beside the validation files; lower the validation fraction"
        )
    return texts


def _first_bytes(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode())
        if size >= limit:
            return


def _fingerprint(texts: Sequence[_Texts], tokenizer: str, vocab_size: int) -> str:
    """A hash of all texts (of a stream: its sample and its files), and of the tokenizer or how it is trained."""
    digest = hashlib.sha256()
    for each in texts:
        digest.update(json.dumps([each.source.name, each.source.streaming, each.identity]).encode())
        for part in (each.train, each.validation):
            digest.update(f"{len(part)}\n".encode())
            for document in part:
                digest.update(hashlib.sha256(document.text.encode()).digest())
    digest.update(tokenizer_file(tokenizer).read_bytes() if tokenizer else f"bpe {vocab_size}".encode())
    return digest.hexdigest()


def _make_tokenizer(folder: Path, texts: Sequence[_Texts], given: str, vocab_size: int, quiet: bool) -> None:
    """Train the tokenizer on the training texts, or copy the given one, its special tokens with it."""
    for name in ("tokenizer.json", "tokenizer.bin", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    if not given:
        train_bpe((document.text for each in texts for document in each.train), vocab_size, folder, quiet=quiet)
        return
    main = tokenizer_file(given)
    name = "tokenizer.bin" if main.suffix == ".bin" else "tokenizer.json"
    atomic_write(folder / name, main.read_bytes())
    settings = main.with_name("tokenizer_config.json")
    if settings.is_file():
        atomic_write(folder / settings.name, settings.read_bytes())
    elif name == "tokenizer.json":
        special = load_tokenizer(main).special_tokens()
        atomic_write(folder / settings.name, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special) + "\n")


def _tokenized(tokenizer: Any, texts: Sequence[_Texts], quiet: bool) -> dict[str, TokenizedText]:
    parts = {}
    for each in texts:
        for part in ("train", "validation"):
            if part == "validation" or not each.source.streaming:
                documents = [document.text for document in getattr(each, part)]
                name = f"{each.source.name}/{part}"
                parts[name] = tokenize(tokenizer, documents, name, quiet)
    return parts


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that of several processes one makes the tokens and the others find them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""A run's sources as windows for its data loader, and the checks that can be made before the first step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftc.data.document_stream import DocumentStream
from ftc.data.lanes import WindowSource
from ftc.data.prepare import Prepared, PreparedSource
from ftc.data.source_table import shares
from ftc.data.stored_windows import DocumentWindows, StreamWindows
from ftc.data.streamed_windows import StreamedWindows
from ftc.errors import FtcError


@dataclass(frozen=True)
class Mixture:
    """Sources in a fixed order: names, shares of the tokens (sum 1), and their windows of `seq_len` tokens."""

    names: tuple[str, ...]
    shares: tuple[float, ...]
    windows: tuple[WindowSource, ...]
    seq_len: int
    streams: bool  # whether any of them reads and tokenizes while training


def mixture(
    prepared: Prepared, seq_len: int, *, packing: str = "stream", document_mask: bool = False, seed: int = 0
) -> Mixture:
    """The mixture of all prepared sources.

    packing: "stream" cuts windows from texts one after the other, "documents" fills them with whole ones. document_mask:
    windows have positions, so that documents can be kept apart.
    """
    sources = [each.source for each in prepared.sources]
    windows: list[WindowSource] = []
    place = 0  # in the stream of all held sources
    for each in prepared.sources:
        windows.append(_windows(each, prepared, seq_len, packing, document_mask, seed, place))
        if isinstance(windows[-1], StreamWindows):
            place = windows[-1].next_place
    return Mixture(
        tuple(source.name for source in sources),
        tuple(shares(sources)),
        tuple(windows),
        seq_len,
        any(source.streaming for source in sources),
    )


def _windows(
    prepared: PreparedSource, run: Prepared, seq_len: int, packing: str, apart: bool, seed: int, place: int
) -> WindowSource:
    source = prepared.source
    if source.streaming:
        skip = source.bad_records == "skip"
        stream = DocumentStream(source.corpus(), source.name, seed, skip, source.max_epochs)
        return StreamedWindows(stream, run.tokenizer, seq_len, packing == "documents", apart)
    arguments = (prepared.train, run.tokenizer, seq_len, apart, seed, source.name, source.max_epochs)
    return DocumentWindows(*arguments) if packing == "documents" else StreamWindows(*arguments, place)


def check_size(mixture: Mixture, step_windows: int, steps: int) -> None:
    """Raise FtcError where a source that is held cannot give its share of one step of `step_windows` windows, or of all
    `steps` within its max_epochs."""
    for name, share, windows in zip(mixture.names, mixture.shares, mixture.windows, strict=True):
        if not isinstance(windows, StreamWindows | DocumentWindows):
            continue
        needed = math.ceil(share * step_windows)
        if windows.num_windows(0) < needed:
            raise FtcError(
                f"the training text of {name!r} has {windows.num_tokens} tokens, {windows.num_windows(0)} windows of "
                f"{mixture.seq_len}, but one step takes {needed}; give more text, or lower training.local_batch_size or "
                "training.seq_len"
            )
        epochs = share * steps * step_windows * mixture.seq_len / windows.num_tokens
        if windows.max_epochs and epochs > windows.max_epochs:
            raise FtcError(
                f"the run would read the source {name!r} {epochs:.2f} times, and its max_epochs is {windows.max_epochs}; give "
                "more text, fewer steps or a lower weight"
            )


def tokens_by_source(mixture: Mixture, tokens: Sequence[int]) -> dict[str, dict[str, float]]:
    """{name: {"tokens", "share", and "epochs" where the source is held}} of the tokens that each source has given."""
    total = max(1, sum(tokens))
    report = {}
    for name, windows, count in zip(mixture.names, mixture.windows, tokens, strict=True):
        report[name] = {"tokens": count, "share": count / total}
        if isinstance(windows, StreamWindows | DocumentWindows):
            report[name]["epochs"] = count / windows.num_tokens
    return report

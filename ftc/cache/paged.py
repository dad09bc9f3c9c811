"""The paged cache of a program rewritten by insert-kv-cache: its memory, its sequences, and calls that continue them.

    cache = PagedCache(decoder, num_blocks=512)
    first, second = cache.add(), cache.add()
    logits = cache.forward({first: ids, second: other_ids})     # chunks of any lengths
    logits = cache.forward({first: [token]})                    # one token more; the other sequence waits
    cache.free(second)

Legend: B sequences of a call, T the longest chunk, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ftc.cache.blocks import Blocks
from ftc.capture.program import Program
from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.rewrite.continuation import STATE, is_state

_SHARED = ("block_table", "cached", "new")
PASS = "insert-kv-cache"


def cached_by(program: object) -> dict | None:
    """The report's entry of the pass that made the program's graphs continue texts, None where none did."""
    return next((entry for entry in getattr(program, "_applied", ()) if entry["pass"] == PASS and entry["matches"]), None)


class PagedCache:
    """Memory for the keys and values, or latents, of every layer, in blocks that sequences take as they grow.

    `num_blocks` blocks for all sequences together; `max_tokens` bounds one sequence (the model's own bound where it states one, by its
    configuration's max_position_embeddings). A program has one cache at a time: a new one takes the place of the old. Raises FtcError for a program
    without insert-kv-cache, a full cache (before anything is written), and a sequence past its bound.
    """

    def __init__(self, program: Program, num_blocks: int, max_tokens: int | None = None):
        entry = cached_by(program)
        if entry is None:
            raise FtcError(f'the program has no cache to fill; rewrite it first: ftc.rewrite(program, ["{PASS}"])')
        stated = getattr(getattr(program, "config", None), "max_position_embeddings", None), entry["options"].get("max_tokens")
        own = min((n for n in stated if isinstance(n, int)), default=None)
        if max_tokens is not None and (max_tokens < 1 or (own is not None and max_tokens > own)):
            raise FtcError(f"max_tokens {max_tokens} must be from 1 to the model's {own} positions")
        self.program, self.max_tokens = program, max_tokens or own
        self.blocks = Blocks(num_blocks, int(entry["options"].get("block_size", 16)))
        self.device = next((p.device for p in program.parameters()), torch.device("cpu"))
        self.lengths: dict[int, int] = {}
        self._next = 0
        self._hosts = [*program.regions, program]
        for host in self._hosts:
            host.state = {name: self._allocate(value) for name, value in states_of(host.code).items()}

    def _allocate(self, value: Tensor) -> Tensor:
        return torch.zeros([self.blocks.num_blocks, *map(int, value.shape[1:])], dtype=value.dtype, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for all blocks of all layers."""
        return sum(t.numel() * t.itemsize for name, t in self.tensors().items())

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token takes, all layers together."""
        return self.num_bytes / (self.blocks.num_blocks * self.blocks.block_size)

    def tensors(self) -> dict[str, Tensor]:
        """The caches by region and name, without the tables that all share."""
        found = {}
        for host in self._hosts:
            prefix = f"{host.ftc_name}." if host is not self.program else ""
            found |= {prefix + name: t for name, t in host.state.items() if name.removeprefix(STATE) not in _SHARED}
        return found

    def add(self) -> int:
        """A new, empty sequence; its number."""
        self._next += 1
        self.lengths[self._next - 1] = 0
        return self._next - 1

    def free(self, sequence: int) -> None:
        """Forget a sequence; its blocks go to others."""
        self._length(sequence)
        del self.lengths[sequence]
        self.blocks.release(sequence)

    def _length(self, sequence: int) -> int:
        if sequence not in self.lengths:
            raise FtcError(f"there is no sequence {sequence} in the cache; it has {sorted(self.lengths) or 'none'}: add one with cache.add()")
        return self.lengths[sequence]

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Give sequences blocks for these lengths in tokens; all or, with FtcError, none."""
        for sequence, length in lengths.items():
            self._length(sequence)
            if self.max_tokens is not None and length > self.max_tokens:
                raise FtcError(f"sequence {sequence} would be {length} tokens long, more than the {self.max_tokens} positions there are; end it, or give the model fewer")
        self.blocks.grow(dict(lengths))

    def table(self, sequences: Sequence[int], columns: int | None = None) -> Tensor:
        """int32 [B, columns]: the blocks of each sequence in order, -1 behind them."""
        columns = columns or max((len(self.blocks.of.get(s, ())) for s in sequences), default=0) or 1
        rows = [[*self.blocks.of.get(s, ()), *[-1] * columns][:columns] for s in sequences]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def place(self, table: Tensor, cached: Tensor, new: Tensor) -> None:
        """Let all graphs read these tensors: block table [B, columns], tokens cached [B] and new [B], all int32."""
        for host in self._hosts:
            host.state |= {STATE + name: value for name, value in zip(_SHARED, (table, cached, new), strict=True)}

    @torch.no_grad()
    def forward(self, chunks: Mapping[int, Sequence[int] | Tensor], run=None) -> dict[int, Tensor]:
        """Continue sequences by the given token ids; logits [tokens, V] of each. Chunks may have different lengths, an empty one writes nothing.

        Nothing is written when the cache is too small. `run` takes the place of the program's own call (input ids [B, T] to logits [B, T, V])."""
        ids = {s: torch.as_tensor(c, dtype=torch.int64, device=self.device).view(-1) for s, c in chunks.items()}
        self.reserve({s: self._length(s) + len(c) for s, c in ids.items()})
        room = max((len(c) for c in ids.values()), default=0)
        if room == 0:
            return {}
        padded = torch.stack([torch.nn.functional.pad(c, (0, room - len(c))) for c in ids.values()])
        counts = [[self.lengths[s] for s in ids], [len(c) for c in ids.values()]]
        cached, new = (torch.tensor(c, dtype=torch.int32, device=self.device) for c in counts)
        self.place(self.table(list(ids)), cached, new)
        logits = logits_of((run or self._call)(padded))
        for sequence, c in ids.items():
            self.lengths[sequence] += len(c)
        return {s: logits[row, : len(c)] for row, (s, c) in enumerate(ids.items())}

    def _call(self, ids: Tensor):
        return self.program(input_ids=ids)

    def prefill(self, prompts: Mapping[int, Sequence[int]], chunk: int = 512) -> dict[int, Tensor]:
        """Give whole prompts, at most `chunk` tokens of each a call; logits [V] of each prompt's last token."""
        if chunk < 1:
            raise FtcError(f"chunk {chunk} must be at least 1 token")
        empty = [s for s, p in prompts.items() if not len(p)]
        if empty:
            raise FtcError(f"sequence {empty[0]} has an empty prompt; give it at least one token")
        self.reserve({s: self._length(s) + len(p) for s, p in prompts.items()})
        last: dict[int, Tensor] = {}
        for start in range(0, max(map(len, prompts.values()), default=0), chunk):
            parts = {s: p[start : start + chunk] for s, p in prompts.items() if len(p) > start}
            last |= {s: logits[-1] for s, logits in self.forward(parts).items()}
        return last


def states_of(code) -> dict[str, Tensor]:
    """What a code's graphs read and write of a cache, as in their graphs, by name, without what all regions share."""
    found: dict[str, Tensor] = {}
    for variant in code.all_variants():
        for node in variant.captured.graph.nodes:
            name = str(node.target)
            if node.op == "get_attr" and is_state(name) and name.removeprefix(STATE) not in _SHARED:
                found[name] = node.meta["val"]
    return found

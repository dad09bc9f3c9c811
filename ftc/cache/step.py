"""One step of cached generation as one compiled graph: token ids of B sequences in, logits out, the caches written in place.

Sizes are fixed (B sequences, T tokens each, a block table of so many columns), so that there is one compilation, and what the step reads
(parameters, caches, tables) is bound once. A row without a sequence decodes into a block of its own, so that no row is a special case.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ftc.cache.flat import flatten
from ftc.cache.lower import lower_decode
from ftc.cache.paged import PagedCache
from ftc.capture.captured import compile_graph
from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.rewrite.continuation import STATE


def _options(left: int | None) -> dict:
    """What torch.compile is told. The arguments are always the same tensors, so nothing is to be guarded: 30 microseconds a step saved. Where no attention
    is left to Python, the wrapper around the kernels is C++ too: 80 more (4 layers of width 256 on 1 core)."""
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return {"dynamic": False, "fullgraph": True, "options": options | ({"cpp_wrapper": True} if left == 0 else {})}


def _end(graph: fx.Graph, logits: fx.Node, num_tokens: int) -> None:
    """The results, logits and the likeliest next tokens [B]; what the next step reads is brought up to date: the counts, and for single tokens the ids."""
    aten, call = torch.ops.aten, graph.call_function
    likeliest = call(aten.argmax.default, (call(aten.select.int, (logits, 1, -1)), -1))
    if num_tokens == 1:
        ids = next(node for node in graph.nodes if node.op == "placeholder")
        call(aten.copy_.default, (ids, call(aten.unsqueeze.default, (likeliest, 1))))
    cached = next((node for node in graph.nodes if node.op == "get_attr" and str(node.target).endswith(STATE + "cached")), None)
    assert cached is not None, "a graph that continues texts reads how long they are"
    call(aten.add_.Tensor, (cached, num_tokens))
    graph.output((logits, likeliest))


class CompiledStep:
    """Runs `num_tokens` tokens of each of `batch` sequences through the whole model.

    `join` gives a row a sequence of the cache, whose blocks must be reserved already, and `leave` takes it away; `forward` continues all of them.
    The compilation happens on the first call; `options` go to torch.compile. `compiled=False` runs the same graph without it.
    """

    def __init__(self, cache: PagedCache, batch: int, num_tokens: int, columns: int, compiled: bool = True, **options):
        if batch < 1 or num_tokens < 1 or columns < 1:
            raise FtcError(f"a step of {batch} sequences, {num_tokens} tokens and {columns} blocks a sequence does nothing; all must be at least 1")
        self.cache, self.batch, self.num_tokens = cache, batch, num_tokens
        device = cache.device
        self.ids = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
        self.cached = torch.zeros(batch, dtype=torch.int32, device=device)
        self.new = torch.full((batch,), num_tokens, dtype=torch.int32, device=device)
        self.rows: list[int | None] = [None] * batch
        self._likeliest: Tensor | None = None
        self._follows = False
        self._own = cache.add()
        cache.reserve({self._own: num_tokens})
        self.table = cache.table([self._own], columns).repeat(batch, 1)
        program = cache.program
        shell, _ = program.code.find(program, (), program.bind((), {"input_ids": self.ids}))
        flat = flatten(program, shell)
        logits = flat.result if isinstance(flat.result, fx.Node) else logits_of(flat.result)
        _end(flat.graph, logits, num_tokens)
        flat.graph.eliminate_dead_code()
        left = lower_decode(flat.graph, device) if num_tokens == 1 else None
        function, names, self.source = compile_graph(flat.graph, flat.constants, "step")
        found = dict(program.named_parameters(remove_duplicate=False)) | dict(program.named_buffers(remove_duplicate=False))
        self._values = [self._value(name, flat.constants, found) for name in names]
        self._function = torch.compile(function, **(_options(left) | options)) if compiled else function

    def _value(self, name: str, constants: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
        if name in constants:
            return constants[name].to(self.cache.device)
        region, state, leaf = name.rpartition(STATE)
        if not state:
            return found[name]
        own = {"block_table": self.table, "cached": self.cached, "new": self.new}
        host = self.cache.program._regions.get(region.rstrip("."), self.cache.program)
        return own[leaf] if leaf in own else host.state[STATE + leaf]

    def join(self, row: int, sequence: int) -> None:
        """Let a row continue a sequence from where it stands."""
        self.rows[row] = sequence
        self.table[row] = self.cache.table([sequence], self.table.shape[1])[0]
        self.cached[row] = self.cache.lengths[sequence]

    def leave(self, row: int) -> None:
        """Take a row's sequence away; the row runs on by itself, into a block that nobody reads."""
        if self.rows[row] is not None:
            self.rows[row] = None
            self.table[row] = self.cache.table([self._own], self.table.shape[1])[0]
        self.cached[row] = 0

    @torch.no_grad()
    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Logits [B, V] after one token more of each row. Raises FtcError where a sequence has no room for it."""
        self.ids.copy_(torch.tensor(tokens, dtype=torch.int64).view(self.batch, self.num_tokens))
        return self._run()[:, -1]

    @torch.no_grad()
    def follow(self) -> list[int]:
        """The likeliest next token of each row after the likeliest one of the call before is appended: greedy decoding without a way through Python."""
        if self._likeliest is None:
            raise FtcError("there is no call before whose likeliest tokens could be followed; give tokens to forward first")
        if not self._follows:
            self.ids.copy_(self._likeliest.view(self.batch, 1))
        self._run()
        return self._likeliest.tolist()

    def _run(self) -> Tensor:
        lengths, room = self.cache.lengths, self.cache.blocks.room
        for row, sequence in enumerate(self.rows):
            if sequence is None:
                self.cached[row] = 0
            elif lengths[sequence] + self.num_tokens > room(sequence):
                raise FtcError(f"cache full: sequence {sequence} has {lengths[sequence]} tokens and room for no more; reserve it first")
        logits, self._likeliest = self._function(None, *self._values, self.ids)
        self._follows = self.num_tokens == 1  # the graph has put them into `ids`
        for sequence in self.rows:
            if sequence is not None:
                lengths[sequence] += self.num_tokens
        return logits

"""What graphs are that continue texts from a cache: their sizes, and the proof that chunks of a text give what the whole text gives.

The graph before is run on whole texts [B, T]. The graph after gets the same tokens in random chunks, ragged (each sequence a length of its own, padding
behind what is new), over a shuffled block table in a cache full of garbage. Outputs are compared token by token.
"""

import random
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor, fx

from ftc.errors import FtcError, FtcFailure
from ftc.rewrite import probe
from ftc.rewrite.opened import has_calls, open_calls
from ftc.rewrite.token_positions import Texts, expressions, has_batch

STATE = "ftc_cache."
_LONG = (257, 1_000, 1_001, 4_096, 100_003, 1 << 20, (1 << 20) + 1)
_SHARED = ("block_table", "cached", "new")


def is_state(name: str) -> bool:
    """Whether a graph's attribute belongs to the cache, not to the model."""
    return name.startswith(STATE)


def texts_of(graph: fx.Graph, most: int | None = None) -> Texts | str:
    """The sizes of a graph's sequences and tokens, or why it does not hold for any number of both (any up to `most` tokens)."""
    found = None
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["val"].dim() >= 2:
            batch, tokens = expressions(node.meta["val"])[:2]
            if batch.is_Symbol and tokens.is_Symbol and batch != tokens:
                found = Texts(batch, tokens)
                break
    if found is None:
        return "it was captured for one sequence, one token or a fixed number; give an example of at least 2 sequences of several tokens"
    limit = longest(probe.shape_env(graph), found)
    return found if limit is None or (most is not None and most <= limit) else f"it holds only for texts of at most {limit} tokens; rewrite with a longer example"


def longest(env, texts: Texts) -> int | None:
    """The largest number of tokens for which the trace holds, None where there is no such bound."""
    bounds = env.var_to_range.get(texts.tokens)
    if bounds is not None and bounds.upper.is_finite and bounds.upper < 1 << 20:
        return int(bounds.upper)
    for guard in env.guards:
        expr = env.replace(guard.expr)
        if texts.tokens in expr.free_symbols and expr.free_symbols <= {texts.batch, texts.tokens}:
            for length in _LONG:
                if expr.subs({texts.tokens: length, texts.batch: 3}) is sympy.false:
                    return length - 1
    return None


def longer_texts(program) -> int | None:
    """Capture graphs of the program's present mode that hold for texts of any length and number, where the original code is at hand.

    Returns how many positions the model has where its graphs show an end of them: it cannot be run on longer texts, or looks positions up in a table.
    """
    from ftc.rewrite.store import Absent

    code, ends = program.code, []
    for variant in code.all_variants():
        for _ in range(4):
            why = texts_of(variant.captured.graph)
            if isinstance(why, Texts) or variant.key[3] != program.mode_key() or variant.call is None:
                break
            longer = _longer(variant)
            if longer is None or any(v.accepts(longer) for v in code.variants.get(variant.key, ())):
                break
            call = type(variant.call)(longer, variant.call.leaves, variant.call.spec)
            limit = _limit(variant)
            if isinstance(code.module, Absent):
                break
            try:
                code.capture(program, variant.key, call)
            except FtcError:
                ends += [] if limit is None else [limit]
                break
            variant = code.variants[variant.key][-1]
    for graph in [variant.captured.graph for each in program.codes for variant in each.all_variants()]:
        ends += _rows_of_tables(graph)
    return min(ends, default=None)


def _rows_of_tables(graph: fx.Graph) -> list[int]:
    """The rows of the parameters in which positions are looked up."""
    texts = texts_of(graph, 1)
    if isinstance(texts, str):
        return []
    lookups = [n for n in graph.nodes if n.target is torch.ops.aten.embedding.default and n.args[0].op == "get_attr"]
    by_place = [n for n in lookups if not has_batch(n.args[1], texts) and texts.tokens in expressions(n.args[1].meta["val"])]
    return [int(n.args[0].meta["val"].shape[0]) for n in by_place]


def _limit(variant) -> int | None:
    texts = texts_of(variant.captured.graph, 1)
    return None if isinstance(texts, str) else longest(probe.shape_env(variant.captured.graph), texts)


def _longer(variant) -> list[Tensor] | None:
    """Inputs like the variant's, of two sequences more and past its longest text; None where not all are [B, T]."""
    tensors = variant.call.tensors
    if any(t.dim() != 2 or t.dtype.is_floating_point for t in tensors):
        return None
    length = tensors[0].shape[1]
    tokens = max(int(length.node.hint if isinstance(length, torch.SymInt) else length), 5) + 2  # not the number of sequences
    tokens = max(tokens, (_limit(variant) or 0) + 2)
    return [torch.ones(2 + 1, tokens, dtype=t.dtype, device="meta" if t.device.type == "meta" else t.device) for t in tensors]


# ------------------------------------------------------------------------------------------------------------------ the proof


def prove(before: fx.Graph, after: fx.Graph, block_size: int, allowed: float | None = None, most: int | None = None) -> list[dict]:
    """Trials of chunks against whole texts: two sizes in float64 with pinned dtypes lifted, one in the model's dtype.

    `most` is the number of the model's positions, where it has an end; `allowed` is the bound where the cache itself rounds (None: that of an exact rewrite). Each trial holds its seed and sizes, the block size and the
    chunks: for every call, how many tokens it has room for and how many of each sequence are new.
    """
    from ftc.rewrite.certificate import _NAMES, model_dtype

    before, after = (open_calls(graph)[0] if has_calls(graph) else graph for graph in (before, after))
    texts = texts_of(before, most)
    if isinstance(texts, str):
        raise FtcFailure(f"the graph before is none that can be continued: {texts}")
    own, trials = model_dtype(before), []
    allowed = allowed if _rounds(after) else None
    for seed, (batch, tokens) in enumerate(((3, 23), (2, 41))):
        tokens = tokens if most is None else min(tokens, most)
        trials.append({"seed": seed, "sizes": [batch, tokens], "dtype": "float64", "lifted": True})
        if seed == 0 and own != torch.float64:
            trials.append({"seed": seed, "sizes": [batch, tokens], "dtype": _NAMES[own], "lifted": False})
    for trial in trials:
        trial |= {"block_size": block_size, "chunks": chunks_of(trial["seed"], *trial["sizes"]), "gradients": "none: the cache is written in place"}
        _run(before, after, texts, trial, allowed)
    return trials


def prove_cached(before: fx.Graph, after: fx.Graph) -> list[dict]:
    """Trials of two graphs that both continue texts: the same chunks through each, each with a cache of its own."""
    from ftc.rewrite.certificate import _DTYPES, _LOW_PRECISION_FLOOR, _NAMES, BOUNDS, model_dtype

    before, after = (open_calls(graph)[0] if has_calls(graph) else graph for graph in (before, after))
    texts = texts_of(before, 1)
    if isinstance(texts, str):
        raise FtcFailure(f"the graph before is none that can be continued: {texts}")
    own, trials = model_dtype(before), []
    for dtype in dict.fromkeys((torch.float64, own)):
        lifted = dtype == torch.float64
        trial = {"seed": 0, "sizes": [3, 23], "dtype": _NAMES[dtype], "lifted": lifted, "block_size": _block_size(before)}
        trials.append(trial | {"chunks": chunks_of(0, 3, 23), "gradients": "none: the cache is written in place"})
    with torch.no_grad():
        for trial in trials:
            kind = torch.float64 if trial["lifted"] else None
            sizes = dict(zip((texts.batch, texts.tokens), trial["sizes"], strict=True))
            inputs, parameters = probe.random_inputs(before, sizes, 0, kind), _parameters(before, kind)
            expected, found = (chunked(before, graph, texts, inputs, dict(parameters), trial) for graph in (before, after))
            trial["output_error"] = max((probe.relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
            trial["gradient_error"], trial["bound"] = 0.0, BOUNDS.get(_DTYPES[trial["dtype"]], _LOW_PRECISION_FLOOR)
    return trials


def _block_size(graph: fx.Graph) -> int:
    states = [n for n in graph.nodes if n.op == "get_attr" and is_state(str(n.target)) and str(n.target).removeprefix(STATE) not in _SHARED]
    return int(states[0].meta["val"].shape[1]) if states else 16


def _parameters(graph: fx.Graph, kind: torch.dtype | None) -> dict[str, Tensor]:
    """Random values of what belongs to the model."""
    shapes = {str(n.target): torch.Size([1]) for n in graph.nodes if n.op == "get_attr" and is_state(str(n.target))}
    return {name: value for name, value in probe.random_parameters(graph, 0, shapes, kind).items() if not is_state(name)}


def chunks_of(seed: int, batch: int, tokens: int) -> list[list]:
    """Calls that give texts of random lengths up to `tokens`: [room of the call, new tokens of each sequence], ... Prefill chunks, single tokens,
    sequences that wait. The first sequence is as long as it can be."""
    choices = random.Random(seed)
    left = [tokens, *(choices.randint(1, tokens) for _ in range(batch - 1))]
    calls = []
    while any(left):
        room = choices.choice((1, 1, 2, 3, 5, 8, 13))
        new = [choices.randint(0, min(room, rest)) for rest in left]
        if not any(new):
            continue
        calls.append([room, new])
        left = [rest - n for rest, n in zip(left, new, strict=True)]
    return calls


def _rounds(graph: fx.Graph) -> bool:
    """Whether the graph keeps something in fewer bits than it is given."""
    narrow = (torch.uint8, torch.int8, torch.float8_e4m3fn)
    return any(n.op == "get_attr" and is_state(str(n.target)) and n.meta["val"].dtype in narrow for n in graph.nodes)


def _run(before: fx.Graph, after: fx.Graph, texts: Texts, trial: dict, allowed: float | None) -> None:
    from ftc.rewrite.certificate import _DTYPES, _LOW_PRECISION_FLOOR, BOUNDS

    lifted, seed = trial["lifted"], trial["seed"]
    kind = torch.float64 if lifted else None
    sizes = {texts.batch: trial["sizes"][0], texts.tokens: trial["sizes"][1]}
    inputs = probe.random_inputs(before, sizes, seed, kind)
    parameters = probe.random_parameters(before, seed, dtype=kind)
    with torch.no_grad():
        found = chunked(before, after, texts, inputs, dict(parameters), trial)
        reference = probe.run(before, inputs, dict(parameters), lifted=lifted)
        trial["output_error"], trial["gradient_error"] = _worst(before, texts, found, reference, trial), 0.0
        bound = trial["bound"] = allowed if allowed is not None else BOUNDS.get(_DTYPES[trial["dtype"]], 0.0)
        if lifted or allowed is not None or trial["output_error"] <= bound:
            return
        wide = {name: v.double() if v.is_floating_point() else v for name, v in parameters.items()}
        true = probe.run(before, [i.double() if i.is_floating_point() else i for i in inputs], wide, lifted=True)
        own = trial["own_rounding"] = _worst(before, texts, _rows(before, texts, reference, trial), true, trial)
        trial["output_error"] = _worst(before, texts, found, true, trial)
        trial["bound"] = max(2 * max(own, 0.0 if bound else _LOW_PRECISION_FLOOR), bound)


def _worst(before: fx.Graph, texts: Texts, found: list[Tensor], reference: Sequence[Tensor], trial: dict) -> float:
    expected = _rows(before, texts, reference, trial)
    return max((probe.relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _order(trial: dict) -> list[tuple[int, int, int, int]]:
    """(call, sequence, place in the call, position in the text) of every real token, as the calls give them."""
    at, found = [0] * trial["sizes"][0], []
    for number, (_, new) in enumerate(trial["chunks"]):
        for b, count in enumerate(new):
            found += [(number, b, t, at[b] + t) for t in range(count)]
            at[b] += count
    return found


def _rows(before: fx.Graph, texts: Texts, results: Sequence[Tensor], trial: dict) -> list[Tensor]:
    """Results for whole texts as one row a token, in the order of the calls."""
    order = _order(trial)
    sequences, positions = torch.tensor([b for _, b, _, _ in order]), torch.tensor([p for _, _, _, p in order])
    nodes = next(node for node in before.nodes if node.op == "output").args[0]
    rows = []
    for node, result in zip(nodes, results, strict=True):
        dim = tokens_at(node, texts)
        moved = result.movedim(dim, 0)[positions]
        rows.append(moved[torch.arange(len(order)), sequences] if has_batch(node, texts) else moved)
    return rows


def tokens_at(node: fx.Node, texts: Texts) -> int:
    """The dim of tokens of an input or result; batch is dim 0 where there is one. FtcFailure where it is not one value a token."""
    sizes = expressions(node.meta["val"])
    if has_batch(node, texts):
        if len(sizes) >= 2 and sizes[0] == texts.batch and sizes[1] == texts.tokens:
            return 1
    for size in (texts.tokens, texts.row):
        if not has_batch(node, texts) and sizes.count(size) == 1:
            return sizes.index(size)
    raise FtcFailure(f"{node.name} of sizes {[str(s) for s in sizes]} is not one value for each token, so no cache can continue it")


def chunked(before: fx.Graph, after: fx.Graph, texts: Texts, inputs: list[Tensor], parameters: dict[str, Tensor], trial: dict) -> list[Tensor]:
    """The results of the calls that a trial lists, as one row a token, in their order."""
    generator = torch.Generator().manual_seed(trial["seed"] + 99)
    state = fresh_state(after, trial, generator)
    holders = [node for node in before.nodes if node.op == "placeholder"]
    ends = next(node for node in before.nodes if node.op == "output").args[0]
    rows: list[list[Tensor]] = [[] for _ in ends]
    at = [0] * trial["sizes"][0]
    for room, new in trial["chunks"]:
        state["cached"], state["new"] = torch.tensor(at, dtype=torch.int32), torch.tensor(new, dtype=torch.int32)
        places = torch.tensor([[c + t if t < n else 0 for t in range(room)] for c, n in zip(at, new, strict=True)])
        given = [_chunk(node, value, texts, places, new) for node, value in zip(holders, inputs, strict=True)]
        values = parameters | {STATE + name: value for name, value in state.items()}
        for node, result, kept in zip(ends, probe.run(after, given, values, lifted=trial["lifted"]), rows, strict=True):
            dim, batched = tokens_at(node, texts), has_batch(node, texts)
            result = result if batched else result.movedim(dim, 0).unflatten(0, (len(new), room))
            result = result.movedim(dim, 1) if batched else result
            kept += [result[b, :n] for b, n in enumerate(new) if n]
        at = [a + n for a, n in zip(at, new, strict=True)]
    return [torch.cat(kept) for kept in rows]


def _chunk(node: fx.Node, value: Tensor, texts: Texts, places: Tensor, new: list[int]) -> Tensor:
    """An input's share in one call; padding holds what it may."""
    sizes = expressions(node.meta["val"])
    if not has_batch(node, texts) and texts.tokens not in sizes and texts.row not in sizes:
        return value
    dim = tokens_at(node, texts)
    if texts.row in sizes:  # the tokens of all sequences in a row
        whole = value.shape[dim] // len(new)
        return value.index_select(dim, (places + whole * torch.arange(len(new))[:, None]).flatten())
    if not has_batch(node, texts):
        return value.index_select(dim, places.flatten())
    rows = value[torch.arange(len(new))[:, None], places]
    if value.is_floating_point():
        padding = torch.arange(places.shape[1]) >= torch.tensor(new)[:, None]
        rows = rows.masked_fill(padding.view(*padding.shape, *[1] * (rows.dim() - 2)), 3.7)
    return rows


def fresh_state(graph: fx.Graph, trial: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of the graph's cache for a trial, without `cached` and `new`: blocks in random order, spare ones among them, all full of garbage."""
    batch, tokens = trial["sizes"]
    columns = -(-tokens // trial["block_size"])
    num_blocks = batch * columns + 3
    order = torch.randperm(num_blocks, generator=generator)[: batch * columns]
    state = {"block_table": order.view(batch, columns).to(torch.int32)}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and is_state(name) and name.removeprefix(STATE) not in _SHARED:
            value = node.meta["val"]
            shape = [num_blocks, *map(int, value.shape[1:])]
            dtype = torch.float64 if trial["lifted"] and value.dtype in probe.LIFTED_DTYPES and "scale" not in name else value.dtype
            garbage = torch.full(shape, float("nan") if dtype.is_floating_point and dtype.itemsize > 1 else 7.0)
            state[name.removeprefix(STATE)] = garbage.to(dtype)
    return state

"""insert-kv-cache: chunks of texts of different lengths, over shuffled blocks, give what the whole texts give; what cannot follow is declined."""

import random

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.rope import RopeConfig
from ftc.passes.insert_kv_cache import InsertKvCache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.cache import PagedCache
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.certificate import model_dtype
from ftc.rewrite.continuation import chunks_of
from ftc.rewrite.opened import has_calls, open_calls
from ftc.rewrite.pipeline import copy_graph

VOCABULARY = 61


def decoder(seed: int = 0, **changes) -> Decoder:
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    return model.eval()


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def cached(model, **options):
    return ftc.rewrite(model, [("insert-kv-cache", options)], example={"input_ids": ids(2, 7)})


def in_chunks(program, texts: list[torch.Tensor], seed: int, spare: int = 2) -> list[torch.Tensor]:
    """Logits of texts that are given in random chunks, beside sequences that come, take blocks and go."""
    choices = random.Random(seed)
    size = program._applied[-1]["options"]["block_size"]
    cache = PagedCache(program, sum(-(-len(t) // size) for t in texts) + spare)
    sequences = [cache.add() for _ in texts]
    done, kept = [0] * len(texts), [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        visitor = cache.add()
        counts = [choices.randint(0, min(choices.choice((1, 3, 9)), len(t) - d)) for d, t in zip(done, texts, strict=True)]
        chunks = {s: t[d : d + n] for s, t, d, n in zip(sequences, texts, done, counts, strict=True) if n}
        for s, logits in cache.forward(chunks | {visitor: [5]}).items():
            if s != visitor:
                kept[sequences.index(s)].append(logits)
        cache.free(visitor)
        done = [d + n for d, n in zip(done, counts, strict=True)]
    return [torch.cat(k) for k in kept]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@settings(max_examples=5, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    interleaved=st.booleans(),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_chunks_give_what_whole_texts_give(heads, interleaved, block_size, seed, dtype):
    model = decoder(seed, num_attention_heads=heads[0], num_key_value_heads=heads[1], rope_interleaved=interleaved).to(dtype)
    texts = [ids(1, n, seed + n)[0] for n in (23, 1, 9 + seed % 20)]
    found = in_chunks(cached(model, block_size=block_size), texts, seed)
    for text, logits in zip(texts, found, strict=True):
        assert error(logits, model(text[None])[0]) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_the_certificate_names_chunks_and_says_why_there_are_no_gradients():
    program = cached(decoder(), block_size=4)
    entry = program._applied[-1]
    assert entry["contract"] == "exact" and [c["code"] for c in entry["certificates"]] == ["layers.0", "shell"]
    for trial in (t for c in entry["certificates"] for t in c["trials"]):
        assert trial["block_size"] == 4 and "in place" in trial["gradients"]
        assert trial["chunks"] == chunks_of(trial["seed"], *trial["sizes"])
        assert any(room == 1 for room, _ in trial["chunks"]) and any(room > 4 for room, _ in trial["chunks"])


@pytest.mark.parametrize("dtype", ["model", "fp8"])
def test_a_saved_program_is_verified_and_continues_texts(tmp_path, dtype):
    program = cached(decoder(), block_size=4, dtype=dtype)
    program.save(tmp_path / "saved")
    verified = ftc.verify(tmp_path / "saved")
    assert verified.ok, str(verified)
    text = ids(1, 11)[0]
    assert torch.equal(*(in_chunks(p, [text], 3)[0] for p in (program, ftc.load(tmp_path / "saved"))))


def test_a_changed_record_is_found(tmp_path):
    import json

    cached(decoder()).save(tmp_path / "saved")
    path = tmp_path / "saved" / "certificates.json"
    applied = json.loads(path.read_text())
    applied["applied"][-1]["certificates"][0]["trials"][0]["output_error"] = 0.5
    path.write_text(json.dumps(applied))
    assert not ftc.verify(tmp_path / "saved").ok


@pytest.mark.parametrize("dtype, most", [("fp8", 0.1), ("int8", 0.03)])
def test_quantised_caches_are_lossy_within_their_bound_and_smaller(dtype, most):
    model = decoder()
    program = cached(model, dtype=dtype)
    entry = program._applied[-1]
    assert entry["contract"] == "lossy" and 1e-4 < entry["max_output_error"] < most
    shell = next(c for c in entry["certificates"] if c["code"] == "shell")
    assert shell["max_output_error"] < 1e-12  # nothing is rounded there
    elements, layers, groups = 2 * 2 * 8, 2, 2
    assert PagedCache(program, 4).bytes_per_token == layers * (elements + 2 * groups * 4)
    assert PagedCache(cached(model), 4).bytes_per_token == layers * elements * 4


class LearnedPositions(nn.Module):
    """A table of positions, read by slice or by lookup, in front of blocks that know none."""

    def __init__(self, spelling: str, rank: int = 2):
        super().__init__()
        self.spelling, self.wte, self.wpe = spelling, nn.Embedding(VOCABULARY, 16), nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        positions = torch.arange(length)
        places = {
            "slice": lambda: self.wpe.weight[:length],
            "slice with a batch": lambda: self.wpe.weight[None, :length],
            "lookup": lambda: self.wpe(positions),
            "lookup with a batch": lambda: self.wpe(positions[None]),
            "computed": lambda: torch.sin(positions[:, None] * torch.exp(-torch.arange(16) / 4)),
            "from the end": lambda: self.wpe(length - 1 - positions),
            "relative to the length": lambda: self.wpe(positions) * (positions / length)[:, None],
            "reversed": lambda: self.wpe(positions).flip(0),
        }[self.spelling]()
        x = self.wte(input_ids) + places
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PlainBlock(nn.Module):
    causal = True

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("spelling", ["slice", "slice with a batch", "lookup", "lookup with a batch", "computed"])
def test_positions_in_every_spelling_continue(spelling):
    torch.manual_seed(1)
    model = LearnedPositions(spelling).double()
    texts = [ids(1, n, n)[0] for n in (31, 12)]
    for text, logits in zip(texts, in_chunks(cached(model, block_size=4), texts, 5), strict=True):
        assert error(logits, model(text[None])[0]) < 1e-12


@pytest.mark.parametrize("spelling", ["from the end", "relative to the length", "reversed"])
def test_positions_that_hang_on_the_length_are_declined(spelling):
    torch.manual_seed(1)
    with pytest.raises((FtcError, FtcFailure), match="insert-kv-cache"):
        cached(LearnedPositions(spelling))


def test_a_base_that_grows_with_the_text_is_declined():
    with pytest.raises(FtcError, match="length of the text"):
        cached(decoder(rope=RopeConfig(rope_type="dynamic", factor=4.0)))


def test_attention_that_is_not_causal_is_declined():
    model = LearnedPositions("slice")
    for block in model.blocks:
        block.causal = False
    with pytest.raises(FtcError, match="attention is not causal"):
        cached(model)


class MeanOfAll(LearnedPositions):
    """Tokens mixed outside attention."""

    def forward(self, input_ids):
        return super().forward(input_ids) + self.head(self.wte(input_ids).mean(1, keepdim=True))


def test_tokens_mixed_outside_attention_fail_the_proof():
    with pytest.raises(FtcFailure, match="contract"):
        cached(MeanOfAll("slice"))


def test_padding_masks_and_models_cached_already_are_declined_with_their_place():
    padded = {"input_ids": ids(2, 7), "attention_mask": torch.tensor([[0] * 2 + [1] * 5, [1] * 7])}
    with pytest.raises(FtcError, match=r"padding.*decoder\.py:\d+"):
        ftc.rewrite(decoder(), ["insert-kv-cache"], example=padded)
    with pytest.raises(FtcError, match=r"cached already.*decoder\.py:\d+"):
        ftc.rewrite(cached(decoder()), ["insert-kv-cache"])


def test_graphs_of_training_have_no_place_and_calls_of_them_say_so():
    program = ftc.capture(decoder(), {"input_ids": ids(2, 7), "labels": ids(2, 7)})
    with pytest.raises(FtcError, match="graph of training"):
        ftc.rewrite(program, ["insert-kv-cache"])
    program.run_example({"input_ids": ids(2, 7)})
    rewritten = ftc.rewrite(program, ["insert-kv-cache"])
    assert len(rewritten.code.all_variants()) == 1
    with pytest.raises(FtcError, match="graph of training"):
        rewritten(input_ids=ids(2, 7), labels=ids(2, 7))


@pytest.mark.parametrize("size", [(1, 7), (2, 1), (1, 1)])
def test_an_example_of_one_sequence_or_token_is_enough(size):
    model = decoder().double()
    program = ftc.rewrite(model, [("insert-kv-cache", {"block_size": 4})], example={"input_ids": ids(*size)})
    text = ids(1, 20)[0]
    assert error(in_chunks(program, [text], 1)[0], model(text[None])[0]) < 1e-12


@pytest.mark.parametrize("fault", ["scale", "window", "softcap", "positions"])
def test_the_proof_finds_a_fault(fault):
    program = ftc.rewrite(decoder(), ["raise"], example={"input_ids": ids(2, 7)})
    code = program.code if fault == "positions" else program.codes[0]
    graph = code.all_variants()[0].captured.graph
    before = open_calls(graph)[0] if has_calls(graph) else graph
    after, pass_ = copy_graph(before), InsertKvCache(block_size=4)
    assert pass_.apply(after).matches
    assert all(t["output_error"] < t["bound"] for t in pass_.prove(before, after))
    for node in after.nodes:
        if node.target is torch.ops.ftc.paged_attention.default and fault in ("scale", "window", "softcap"):
            node.kwargs = dict(node.kwargs) | {fault: {"scale": 1.01 * node.kwargs["scale"], "window": 20, "softcap": 50.0}[fault]}
        if node.target is torch.ops.ftc.token_positions.default and fault == "positions":
            node.args = (node.args[1], *node.args[1:])
    trials = pass_.prove(before, after)
    assert all(t["output_error"] > 1e3 * t["bound"] or t["dtype"] != "float64" for t in trials)
    assert model_dtype(before) == torch.float32


def test_bad_options_name_what_is_valid():
    with pytest.raises(ValueError, match="block_size = 0"):
        InsertKvCache(block_size=0)
    with pytest.raises(FtcError, match="fp8"):
        ftc.rewrite(decoder(), [("insert-kv-cache", {"dtype": "fp7"})], example={"input_ids": ids(2, 7)})

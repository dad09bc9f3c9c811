"""The paged cache and generation from it: the tokens of recomputing the whole text, whatever the batch; clear errors where there is no room."""

import functools
import random

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import PRESETS
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
import ftc.cache.generation as generation
from ftc.cache import Blocks, CompiledStep, PagedCache, continue_text, generate_batch, with_cache
from ftc.capture.program import Program
from ftc.errors import FtcError
from ftc.generate import generate
from ftc.kernels import cpu_decode


def decoder(name: str = "tiny", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(PRESETS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)  # so that texts vary
    return model


@functools.cache
def made(name: str):
    model = decoder(name)
    return model, with_cache(model)


@pytest.fixture(params=["tiny", "tiny-mla"])
def pair(request):
    return made(request.param)


def recomputed(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 1)]


@pytest.mark.parametrize("graph", ["program", "step"])
def test_greedy_tokens_are_those_of_recomputing(pair, graph, monkeypatch):
    model, program = pair
    expected = [recomputed(model, prompt, 18) for prompt in PROMPTS]
    monkeypatch.setattr(generation, "CompiledStep", lambda *given: CompiledStep(*given, compiled=False))
    assert generate_batch(program, PROMPTS, 18, compiled=graph == "step", chunk=7) == expected
    end = expected[1][4]  # a sequence that ends early, beside others that go on
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert generate_batch(program, PROMPTS, 18, end=end, compiled=graph == "step") == cut


def test_one_text_is_that_of_the_batch(pair):
    model, program = pair
    tokens = list(continue_text(program, PROMPTS[1], 9, lambda logits: int(logits.argmax())))
    assert tokens == recomputed(model, PROMPTS[1], 9)


def _bfloat16():
    return with_cache(decoder().bfloat16())


def _packed():
    return with_cache(made("tiny-mla")[0], [("insert-kv-cache", {"dtype": "fp8"}), ("absorb-mla", {"up_to": 1})])


CASES = {
    "heads": (lambda: made("tiny")[1], 1e-5), "latent": (lambda: made("tiny-mla")[1], 1e-5), "bfloat16": (_bfloat16, 0.03), "packed": (_packed, 1e-4)
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_lowered_step_gives_the_logits_of_the_program(case):
    program, most = CASES[case][0](), CASES[case][1]
    whole = program.fork()
    cache = PagedCache(program, 12)
    rows = {cache.add(): prompt for prompt in PROMPTS}
    cache.prefill(rows, chunk=16)
    cache.reserve({s: len(p) + 4 for s, p in rows.items()})
    step = CompiledStep(cache, 4, 1, 4, compiled=False)
    assert ("paged_decode" in step.source) == (cpu_decode.library() is not None) and step.num_tokens == 1
    for row, sequence in zip((2, 0, 3), rows, strict=True):  # row 1 has no sequence
        step.join(row, sequence)
    for token in (7, 8, 9):
        texts = [rows[s] + [token] for s in rows]
        for s, text in zip(list(rows), texts, strict=True):
            rows[s] = text
        logits = step.forward([token] * 4)
        for row, text in zip((2, 0, 3), texts, strict=True):
            other = PagedCache(whole, 4)
            expected = other.prefill({other.add(): text})[0]  # all of it anew, uncompiled
            assert float((logits[row] - expected).abs().max() / expected.abs().max()) < most
    assert cache.lengths[list(rows)[1]] == 43


@settings(max_examples=20, deadline=None)
@given(num_blocks=st.integers(1, 12), size=st.sampled_from([1, 4]), seed=st.integers(0, 10_000))
def test_blocks_are_never_shared_nor_lost(num_blocks, size, seed):
    choices, blocks, lengths = random.Random(seed), Blocks(num_blocks, size), {}
    for _ in range(40):
        sequence = choices.randrange(4)
        if choices.random() < 0.3:
            blocks.release(sequence)
            lengths.pop(sequence, None)
        else:
            wanted = lengths.get(sequence, 0) + choices.randint(1, 2 * size)
            needed = -(-wanted // size) - len(blocks.of.get(sequence, ()))
            before = {s: list(b) for s, b in blocks.of.items()}
            if needed > len(blocks.free):
                with pytest.raises(FtcError, match="cache full"):
                    blocks.grow({sequence: wanted})
                assert {s: b for s, b in blocks.of.items() if b} == {s: b for s, b in before.items() if b}
            else:
                blocks.grow({sequence: wanted})
                lengths[sequence] = wanted
        held = [block for own in blocks.of.values() for block in own]
        assert sorted([*held, *blocks.free]) == list(range(num_blocks))
        assert all(len(blocks.of[s]) == -(-n // size) for s, n in lengths.items())


def test_no_room_is_an_error_that_writes_nothing(pair):
    _, program = pair
    cache = PagedCache(program, 3)
    first, second = cache.add(), cache.add()
    cache.forward({first: list(range(30))})
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    with pytest.raises(FtcError, match="cache full: 2 more blocks of 16 tokens are needed and 1 of 3 are free"):
        cache.forward({second: list(range(17))})
    assert all(torch.equal(before[name], tensor) for name, tensor in cache.tensors().items()) and cache.lengths[second] == 0
    cache.free(first)
    cache.forward({second: list(range(17))})
    with pytest.raises(FtcError, match="no sequence 0"):
        cache.forward({first: [1]})


def test_texts_longer_than_the_model_has_positions_are_an_error(pair):
    _, program = pair
    cache = PagedCache(program, 40)
    sequence = cache.add()
    with pytest.raises(FtcError, match="257 tokens long, more than the 256 positions"):
        cache.prefill({sequence: [1] * 257})
    with pytest.raises(FtcError, match="max_tokens 300"):
        PagedCache(program, 40, max_tokens=300)
    with pytest.raises(FtcError, match="260 tokens long"):
        generate_batch(program, [[1] * 250], 11)
    bounded = PagedCache(program, 40, max_tokens=8)
    with pytest.raises(FtcError, match="9 tokens long, more than the 8 positions"):
        bounded.forward({bounded.add(): [1] * 9})


def test_a_program_without_a_cache_says_what_it_lacks(pair):
    model, program = pair
    with pytest.raises(FtcError, match=r'ftc.rewrite\(program, \["insert-kv-cache"\]\)'):
        PagedCache(ftc.capture(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)}), 4)
    with pytest.raises(FtcError, match="has none yet"):
        program.fork()(input_ids=torch.ones(2, 5, dtype=torch.long))
    for bad in (lambda: PagedCache(program, 0), lambda: PagedCache(program, 4).prefill({0: []}), lambda: generate_batch(program, [[]], 3)):
        with pytest.raises(FtcError):
            bad()


def test_bytes_a_token_are_those_allocated():
    plain, latent = (PagedCache(made(name)[1], 10) for name in ("tiny", "tiny-mla"))
    config = PRESETS["tiny"]
    assert plain.bytes_per_token == config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert latent.bytes_per_token == PRESETS["tiny-mla"].num_hidden_layers * (16 + 8) * 4
    assert plain.num_bytes == plain.bytes_per_token * 160


class Letters:
    bos_id, eos_id, vocab_size = None, None, 512

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def test_generate_uses_the_cache_and_gives_the_same_text(pair, monkeypatch):
    model, program = pair
    expected = generate(model, Letters(), "The", 12)
    given, forward = [], Program.forward
    monkeypatch.setattr(Program, "forward", lambda self, **inputs: given.append(inputs["input_ids"].shape[1]) or forward(self, **inputs))
    assert generate(program, Letters(), "The", 12) == expected
    assert given == [3] + [1] * 11  # the prompt, then single tokens
    assert generate(program, Letters(), "The", 0) == ""
    with pytest.raises(FtcError, match="context 5"):
        generate(program, Letters(), "The", 12, context=5)
    with pytest.raises(FtcError, match="with_cache"):
        generate(model, Letters(), "The", 12, compiled=True)





def test_sampling_with_a_seed_draws_what_recomputing_draws(pair):
    model, program = pair
    options = dict(temperature=0.8, top_k=20, seed=3)
    assert generate(program, Letters(), "abc", 15, **options) == generate(model, Letters(), "abc", 15, **options)


def test_stories_are_told_from_the_cache(shared_data):
    from ftc.data.tokenizer import load_tokenizer

    model, tokenizer = ftc.models.load(shared_data / "stories260k").eval(), load_tokenizer(shared_data / "stories260k")
    program = with_cache(model)
    assert generate(program, tokenizer, "Once upon a time", 60) == generate(model, tokenizer, "Once upon a time", 60)


@pytest.mark.slow
def test_compiled_generation_gives_the_same_tokens():
    model = decoder()
    program = with_cache(model, fused=True)
    assert generate_batch(program, PROMPTS, 12, compiled=True) == [recomputed(model, prompt, 12) for prompt in PROMPTS]

"""Speculative decoding gives the text of plain greedy decoding; acceptance equals a plain loop over the text."""

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
from ftc.acceptance import acceptance, costs, speed_up
from ftc.draft import Drafter
from ftc.errors import FtcError
from ftc.generate import generate
from ftc.speculative import generate_speculatively

DEPTH = 2


class ByteTokenizer:
    vocab_size, bos_id, eos_id = 130, 128, 129

    def encode(self, text):
        return [min(b, 127) for b in text.encode()]

    def decode(self, ids):
        return bytes(i for i in ids if i < 128).decode()


@pytest.fixture(scope="module", params=["sequential", "parallel"])
def program(request):
    """Trained for a moment on a text that repeats, so that drafts are right now and then."""
    torch.manual_seed(0)
    model = Decoder(preset("tiny", vocab_size=130, hidden_size=32, intermediate_size=48, head_dim=8))
    ids = torch.tensor(ByteTokenizer().encode("the cat sat on the mat and the rat ate. " * 8))[: 4 * 65].view(4, 65)
    call = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    program = ftc.rewrite(model, [("add-mtp", {"depth": DEPTH, "kind": request.param, "weight": 1.0})], example=call)
    optimizer = torch.optim.Adam(program.parameters(), 0.01)
    for _ in range(25):
        optimizer.zero_grad()
        program(**call).backward()
        optimizer.step()
    return ftc.rewrite(program, ["mtp-draft"]).eval()


@settings(deadline=None, max_examples=15)
@given(prompt=st.sampled_from(["", "t", "the cat ", "mat and", "xyz"]), count=st.integers(0, 30), depth=st.integers(1, 3))
def test_the_text_is_that_of_greedy_decoding(program, prompt, count, depth):
    tokenizer, pieces = ByteTokenizer(), []
    expected = generate(program, tokenizer, prompt, count)
    text, counts = generate_speculatively(program, tokenizer, prompt, count, depth=depth, on_text=pieces.append)
    assert text == expected == "".join(pieces)
    assert counts.tokens == len(expected) <= count and counts.accepted <= counts.drafted
    assert counts.runs <= max(1, counts.tokens)


def test_drafts_are_accepted_and_save_runs(program):
    _, counts = generate_speculatively(program, ByteTokenizer(), "the cat ", 60)
    row = counts.as_dict()
    assert row["accepted"] > 10 and row["tokens_per_run"] == row["tokens"] / row["runs"] > 1.2


def test_a_loaded_program_drafts_the_same(program, tmp_path):
    program(input_ids=torch.zeros(1, 12, dtype=torch.long))
    program.save(tmp_path / "draft")
    loaded = ftc.load(tmp_path / "draft").eval()
    first, again = (generate_speculatively(p, ByteTokenizer(), "on the ", 20) for p in (program, loaded))
    assert first == again


def test_end_of_text_stops_as_in_greedy_decoding(program):
    class Ending(ByteTokenizer):
        eos_id = ord("a")

    for prompt in ("the c", "on the m"):
        assert generate_speculatively(program, Ending(), prompt, 30)[0] == generate(program, Ending(), prompt, 30)


def test_a_step_of_the_draft_is_the_module_of_the_graph(program):
    ids = torch.randint(0, 128, (1, 11), generator=torch.Generator().manual_seed(3))
    found, drafter = program.with_extras(input_ids=ids)[1], Drafter(program)
    seen = 11 - DEPTH  # every token that the modules read is in the text
    known = ids[0].tolist()
    if drafter.is_sequential:
        look = drafter.look(known[:seen])
        first = drafter.propose(look, known[: seen + 1], 1)
        assert first == [int(found["mtp_logits_1"][0, seen - 1].argmax())]
    else:
        look = drafter.look(known[:seen])
        expected = [int(found[f"mtp_logits_{k}"][0, seen - 1].argmax()) for k in (1, 2)]
        assert drafter.propose(look, known[: seen + 1]) == expected


@torch.no_grad()
def test_acceptance_equals_a_loop_over_the_text(program):
    text, tokenizer = "the rat sat on the cat and ate the mat", ByteTokenizer()
    ids = [128, *tokenizer.encode(text)]
    logits, found = program.with_extras(input_ids=torch.tensor([ids[:-1]]))
    own, length = logits[0].argmax(-1).tolist(), len(ids) - 1
    drafts = [found[f"mtp_logits_{k}"][0].argmax(-1).tolist() for k in range(1, DEPTH + 1)]
    measured = acceptance(program, tokenizer, {"text": [text]}, context=64)["text"]
    for k in range(1, DEPTH + 1):
        pairs = [(drafts[k - 1][i], own[i + k], ids[i + k + 1]) for i in range(length - k)]
        assert measured["acceptance"][k - 1] == pytest.approx(sum(d == o for d, o, _ in pairs) / len(pairs))
        assert measured["accuracy"][k - 1] == pytest.approx(sum(d == t for d, _, t in pairs) / len(pairs))
        chains = [all(drafts[m - 1][i] == own[i + m] for m in range(1, k + 1)) for i in range(length - DEPTH)]
        assert measured["chain"][k - 1] == pytest.approx(sum(chains) / len(chains))
    assert measured["places"] == length - 1


def test_windows_count_every_place_once(program):
    text = "the cat sat on the mat and the rat ate. " * 5
    whole, cut = (acceptance(program, ByteTokenizer(), {"t": [text]}, context=c)["t"] for c in (250, 32))
    assert whole["places"] == len(text) - 1
    assert cut["places"] >= 0.9 * whole["places"]


def test_the_speed_up_follows_from_acceptance_and_costs(program):
    cost = costs(program, context=16, rounds=2)
    assert len(cost["verify"]) == len(cost["draft"]) == DEPTH and min(cost["verify"] + cost["draft"]) > 0
    gain = speed_up({"chain": [0.8, 0.5]}, {"verify": [1.0, 1.1], "draft": [0.2, 0.4]})
    assert gain == pytest.approx([1.8 / 1.2, 2.3 / 1.5])


def test_a_model_without_modules_is_an_error():
    with pytest.raises(FtcError, match="rewrite it with add-mtp"):
        generate_speculatively(Decoder(preset("tiny")), ByteTokenizer(), "a", 3)

"""Generation: greedy follows the model, sampling follows its seed, streaming adds up, end-of-text stops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.errors import FtcError
from ftc.generate import _choose, generate


class ByteTokenizer:
    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Script(nn.Module):
    """Greedily spells `text` after a prompt of known length, then ends it."""

    def __init__(self, text, prompt_length=1):
        super().__init__()
        self.ids, self.prompt_length, self.longest = [*text.encode(), 257], prompt_length, 0

    def forward(self, input_ids):
        self.longest = max(self.longest, input_ids.shape[1])
        step = min(input_ids.shape[1] - self.prompt_length, len(self.ids) - 1)
        logits = torch.zeros(1, input_ids.shape[1], 258)
        logits[0, -1, self.ids[step]] = 5.0
        return logits


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.randn(258, 258, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids):
        return self.table(input_ids)


@settings(deadline=None)
@given(text=st.text(max_size=12))
def test_greedy_spells_what_the_model_wants_and_the_pieces_join(text):
    pieces = []
    assert generate(Script(text), ByteTokenizer(), "", 100, on_text=pieces.append) == text
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_it_stops_at_the_token_limit_and_leaves_out_the_prompt():
    assert generate(Script("hello", prompt_length=4), ByteTokenizer(), "abc", 3) == "hel"


def test_a_seed_repeats_and_another_differs():
    runs = [generate(Noise(), ByteTokenizer(), "a", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@given(top_k=st.integers(1, 10), seed=st.integers(0, 1000))
def test_top_k_draws_only_from_the_k_likeliest(top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator)
    token = _choose(logits, 1.5, top_k, generator)
    assert token in logits.topk(top_k).indices.tolist()


def test_top_one_is_greedy():
    greedy = generate(Noise(), ByteTokenizer(), "a", 10)
    assert generate(Noise(), ByteTokenizer(), "a", 10, temperature=2.0, top_k=1) == greedy


def test_context_bounds_the_input_and_the_mode_is_kept():
    model = Script("x" * 30).train()
    generate(model, ByteTokenizer(), "", 20, context=5)
    assert model.longest == 5 and model.training


def test_bad_settings_are_named():
    with pytest.raises(FtcError, match="temperature -1"):
        generate(Noise(), ByteTokenizer(), "a", temperature=-1.0)
    bare = ByteTokenizer()
    bare.bos_id = bare.eos_id = None
    with pytest.raises(FtcError, match="prompt is empty"):
        generate(Noise(), bare, "")

"""Evaluation counts every token once and equals the plain sum of log-probabilities."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.errors import FtcError
from ftc.evaluate import _windows, evaluate, logits_of

VOCAB = 259


class ByteTokenizer:
    """Bytes as tokens, 256 begins and 257 ends a text."""

    vocab_size, bos_id, eos_id = VOCAB, 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Bigram(nn.Module):
    """Logits depend on the current token alone, so any window gives the same answer."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(VOCAB, VOCAB, generator=generator))
        self.wrap = wrap

    def forward(self, input_ids):
        return self.wrap(self.table(input_ids))


class Recorder(nn.Module):
    """Predicts uniformly and remembers the longest input."""

    longest = 0

    def forward(self, input_ids):
        self.longest = max(self.longest, input_ids.shape[1])
        return torch.zeros(*input_ids.shape, VOCAB)


def direct_nats(model, text):
    ids = torch.tensor([256, *text.encode()])
    return -model.table(ids[:-1]).double().log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum().item()


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=4),
    context=st.integers(1, 12),
    batch=st.integers(1, 5),
    data=st.data(),
)
def test_the_result_is_the_plain_sum_for_any_context_stride_and_batch(texts, context, batch, data):
    stride = data.draw(st.integers(1, context))
    model = Bigram()
    got = evaluate(model, ByteTokenizer(), {"s": texts}, context=context, batch=batch, stride=stride, progress=False)[
        "s"
    ]
    num_bytes = sum(len(text.encode()) for text in texts)
    nats = sum(direct_nats(model, text) for text in texts)
    assert got["tokens"] == got["bytes"] == num_bytes
    assert got["nats_per_token"] == pytest.approx(nats / num_bytes, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-4)


@given(length=st.integers(1, 60), context=st.integers(1, 20), data=st.data())
def test_windows_score_each_target_once_with_enough_before_it(length, context, data):
    stride = data.draw(st.integers(1, context))
    ids = list(range(length + 1))
    scored = []
    for window in _windows(ids, context, stride):
        assert len(window.ids) - 1 <= context
        scored += window.ids[-window.num_scored :]
        assert window.ids[-window.num_scored] - window.ids[0] >= min(window.ids[-window.num_scored], context - stride)
    assert scored == ids[1:]


def test_the_model_never_sees_more_than_the_context_and_keeps_its_mode():
    model = Recorder().train()
    result = evaluate(model, ByteTokenizer(), {"a": ["x" * 50], "b": ["y"]}, context=8, progress=False)
    assert model.longest == 8 and model.training
    assert set(result) == {"a", "b"}
    assert result["a"]["bits_per_byte"] == pytest.approx(math.log2(VOCAB))


@pytest.mark.parametrize("wrap", [lambda x: SimpleNamespace(logits=x), lambda x: (x, None), lambda x: {"logits": x}])
def test_any_usual_output_gives_its_logits(wrap):
    sources = {"s": ["some text"]}
    plain, wrapped = (evaluate(Bigram(w), ByteTokenizer(), sources, progress=False) for w in (lambda x: x, wrap))
    assert plain == wrapped


def test_bad_input_is_named():
    with pytest.raises(FtcError, match="'empty' holds no text"):
        evaluate(Bigram(), ByteTokenizer(), {"empty": [""]}, progress=False)
    with pytest.raises(FtcError, match="stride 9"):
        evaluate(Bigram(), ByteTokenizer(), {"s": ["x"]}, context=8, stride=9, progress=False)
    with pytest.raises(FtcError, match="without logits"):
        logits_of("text")
    small = nn.Embedding(300, 100)
    small.forward = lambda input_ids: nn.Embedding.forward(small, input_ids)
    with pytest.raises(FtcError, match="vocabulary has 100"):
        evaluate(small, ByteTokenizer(), {"s": ["\u00ff"]}, progress=False)

"""Held-out text during training: when it is measured, on what, and that what is measured is what evaluation measures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.ngram import Trigram
from ftc.data.tokens import TokenizedText
from ftc.evaluate import IGNORED
from ftc.train.losses import parse_loss
from ftc.train.objective import Objective
from ftc.train.validation_curve import ValidationCurve, choose_sample, measured_steps


class Bytes:
    """A tokenizer whose tokens are bytes; 0 ends a text."""

    bos_id, eos_id = None, 0

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


def text(*lengths):
    parts = [np.arange(length, dtype=np.int32) % 90 + 33 for length in lengths]
    ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return TokenizedText(ids, np.array(lengths, dtype=np.int64), len(ids))


@given(steps=st.integers(1, 5000), points=st.integers(1, 30))
def test_measured_early_and_at_the_end_and_never_more_often_than_asked(steps, points):
    chosen = measured_steps(steps, points)
    assert steps in chosen and min(chosen) <= max(1, steps // 50) and len(chosen) <= points + 1
    assert all(1 <= step <= steps for step in chosen)


def test_no_points_are_no_measurements():
    assert measured_steps(100, 0) == frozenset()


@given(
    lengths=st.lists(st.integers(0, 900), max_size=8),
    num_tokens=st.integers(0, 2000),
    batch=st.integers(1, 5),
    length=st.sampled_from([8, 33, 128]),
)
def test_a_sample_is_as_large_as_asked_in_whole_batches_and_counts_what_it_scores(lengths, num_tokens, batch, length):
    sample = choose_sample(text(*lengths), Bytes(), num_tokens, batch, length)
    if not sum(lengths):
        assert sample is None
        return
    assert len(sample.scored) <= batch * max(1, math.ceil(num_tokens / length / batch))
    assert all(tokens.shape == labels.shape == (batch, length) for tokens, labels in sample.batches)
    labels = torch.cat([labels for _, labels in sample.batches])
    assert int((labels != IGNORED).sum()) == sum(count for _, count in sample.scored) == sample.num_bytes
    for ids, count in sample.scored:
        assert count <= len(ids) - 1 and (ids[0] == 0 or len(ids) - 1 - count == length // 2)
    again = choose_sample(text(*lengths), Bytes(), num_tokens, batch, length)
    assert all(torch.equal(a, b) for one, two in zip(sample.batches, again.batches, strict=True) for a, b in zip(one, two, strict=True))


def test_a_sample_comes_from_all_parts_of_the_text():
    marked = TokenizedText(np.repeat(np.arange(1, 51, dtype=np.int32), 1000), np.full(50, 1000), 50_000)
    windows = choose_sample(marked, Bytes(), 1000, 2, 100).scored
    documents = [int(ids[-1]) for ids, _ in windows]
    assert len(windows) == 10 and documents == sorted(documents) and documents[0] < 10 and documents[-1] >= 40


def curve_of(texts, steps=20):
    config = SimpleNamespace(
        training=SimpleNamespace(steps=steps, local_batch_size=2, seq_len=16),
        ftc=SimpleNamespace(validate=True, validation_points=4),
    )
    return ValidationCurve(texts, Bytes(), config), config


@pytest.fixture
def uniform_trainer(monkeypatch):
    """A trainer whose model finds every one of 128 tokens as likely as the others."""

    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 128)

    monkeypatch.setattr("ftc.train.adapter.objective_of", lambda config: Objective(parse_loss({"name": "next-token"})))
    model = torch.nn.Module()
    model.body, model.apart_names = Uniform(), ()
    return SimpleNamespace(
        model_parts=[model],
        job_config=None,
        maybe_enable_amp=torch.autocast("cpu", enabled=False),
        device="cpu",
        context=None,  # no ranks share a sequence
        pipelined_forward=None,  # nor a model
    )


def test_each_source_has_its_own_curve_and_a_uniform_model_seven_bits_a_byte(uniform_trainer):
    curve, _ = curve_of({"books": text(500, 300), "code": text(200), "nothing": text()})
    state = torch.random.get_rng_state()
    measured = curve.measure(uniform_trainer)
    assert set(measured) == {"books", "code"} and torch.equal(torch.random.get_rng_state(), state)
    for values in measured.values():
        assert values["bits_per_byte"] == pytest.approx(7.0) and values["nats_per_token"] == pytest.approx(math.log(128))


def test_the_baseline_is_the_trigram_on_the_scored_tokens_after_what_stands_before_them():
    train = text(400)
    curve, _ = curve_of({"books": text(300)})
    trigram = Trigram(train.documents(), 128, 0)
    found = curve.baselines(trigram)["books"]
    windows = curve.samples["books"].scored
    expected = sum(
        -math.log2(float(trigram.probability(*(np.array([x]) for x in (ids[i - 2] if i > 1 else 0, ids[i - 1], ids[i])))[0]))
        for ids, count in windows
        for i in range(len(ids) - count, len(ids))
    )
    assert found["bytes"] == curve.samples["books"].num_bytes
    assert found["trigram_bits_per_byte"] == pytest.approx(expected / found["bytes"])

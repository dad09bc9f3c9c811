"""Losses against plain PyTorch in float64, values and gradients; the registry's errors; schedules."""

import pytest
import torch
import torch.nn.functional as F
from ftc.models.mtp import same_document
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.train import losses
from ftc.train.losses import chunked_cross_entropy, kl, model, mtp, next_token, options_of, parse_loss
from ftc.train.schedule import at, check_schedule


@st.composite
def batches(draw):
    """Logits [B, T, V] and labels [B, T] of which some are ignored, float64, with a generator for more."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    B, T, V = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(2, 9))
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = -100
    return noise((B, T, V), generator).requires_grad_(), labels, generator


def noise(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3


def same(loss, reference, *inputs):
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(reference, inputs, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@settings(deadline=None)
@given(batches(), st.integers(1, 30))
def test_next_token_and_chunked_are_cross_entropy(batch, chunk):
    logits, labels, generator = batch
    same(next_token(logits, labels), cross_entropy(logits, labels), logits)
    same(chunked_cross_entropy({"logits": logits}, labels, chunk=chunk), cross_entropy(logits, labels), logits)
    hidden, head = noise((*labels.shape, 5), generator).requires_grad_(), noise((4, 5), generator).requires_grad_()
    few = labels.clamp(max=3)
    outputs = {"hidden": hidden, "head": head}
    same(chunked_cross_entropy(outputs, few, chunk=chunk), cross_entropy(hidden @ head.T, few), hidden, head)


@settings(deadline=None)
@given(batches(), st.integers(1, 3), st.floats(0, 2))
def test_mtp_is_the_weighted_sum_over_depths(batch, depth, weight):
    logits, labels, generator = batch
    further = [noise(logits.shape, generator).requires_grad_() for _ in range(depth)]
    ids = torch.randint(3, labels.shape, generator=generator)
    joined = same_document(ids, end_of_text=0)
    reference = cross_entropy(logits, labels)
    B, T = labels.shape
    for k, scores in enumerate(further, 1):
        for b in range(B):
            for i in range(T - k):
                if all(labels[b, i + j] >= 0 for j in range(k + 1)) and all(ids[b, i + j] != 0 for j in range(1, k + 1)):
                    reference = reference - weight / depth * scores[b, i].log_softmax(-1)[labels[b, i + k]]
    outputs = {"logits": logits, "mtp_logits": further, "joined": joined}
    same(mtp(outputs, labels, weight=weight), reference, logits, *further)


@settings(deadline=None)
@given(batches(), st.floats(0.5, 4), st.floats(0, 1))
def test_kl_is_that_of_the_tempered_distributions(batch, temperature, weight):
    logits, labels, generator = batch
    teacher = noise(logits.shape, generator)
    p, q = (t[labels != -100].div(temperature).softmax(-1) for t in (teacher, logits))
    reference = weight * temperature**2 * (p * (p / q).log()).sum() + (1 - weight) * cross_entropy(logits, labels)
    same(kl({"logits": logits, "teacher_logits": teacher}, labels, temperature=temperature, weight=weight), reference, logits)


@settings(deadline=None)
@given(batches(), st.data())
def test_kl_to_the_likeliest_tokens_sums_up_the_rest(batch, data):
    logits, labels, generator = batch
    teacher, V = noise(logits.shape, generator), logits.shape[-1]
    K = data.draw(st.integers(1, V))
    logprobs, ids = teacher.log_softmax(-1).topk(K, -1)
    found = kl({"logits": logits, "teacher_ids": ids.int(), "teacher_logprobs": logprobs}, labels)
    p, q = teacher.softmax(-1).gather(-1, ids), logits.softmax(-1).gather(-1, ids)
    terms = (p * (p / q).log()).sum(-1)
    if K < V:
        terms = terms + (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
    reference = terms[labels != -100].sum()
    torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-8)  # 1 - p loses digits, in the reference
    (a,), (b,) = (torch.autograd.grad(t, [logits], retain_graph=True) for t in (found, reference))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    whole = kl({"logits": logits, "teacher_logits": teacher}, labels)
    assert found <= whole + 1e-9 * (1 + whole.abs())
    if K == V:
        same(found, whole, logits)


@settings(deadline=None)
@given(batches())
def test_a_batch_cut_up_gives_the_same_sum(batch):
    logits, labels, generator = batch
    teacher = noise(logits.shape, generator)
    for function in (next_token, chunked_cross_entropy, kl):
        whole = function({"logits": logits, "teacher_logits": teacher}, labels)
        parts = [
            function({"logits": logits[b : b + 1], "teacher_logits": teacher[b : b + 1]}, labels[b : b + 1])
            for b in range(len(labels))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


def test_losses_of_the_model_itself_are_scaled_to_sums():
    labels = torch.tensor([[1, -100, 2]])
    assert model({"loss": torch.tensor(1.5)}, labels) == 3.0
    outputs = {n: torch.tensor(v) for n, v in (("next_token_loss", 1.0), ("mtp_loss_1", 2.0), ("mtp_loss_2", 4.0), ("mtp_total_loss", 9.0))}
    assert mtp(outputs, labels) == 18.0 and mtp(outputs, labels, weight=0.5) == pytest.approx(2 * (1 + 0.25 * 6))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mpt", "no loss 'mpt'; did you mean 'mtp'"),
        ({"name": "mtp", "wieght": 1}, "no option 'wieght'; did you mean 'weight'"),
        ({"name": "kl", "temperature": "hot"}, "temperature = 'hot' is of the wrong type"),
        ({"name": "chunk-cross-entropy", "chunk": 1.5}, "chunk = 1.5"),
        ({"name": "mtp", "weight": [[0.5, 1], [0.2, 0]]}, "must rise"),
        ({"name": "mtp", "weight": [0.5]}, "neither a number nor a list"),
        ({"weight": 1}, "no loss None"),
    ],
)
def test_a_wrong_name_or_option_is_named(value, message):
    with pytest.raises(FtcError, match=message):
        parse_loss(value)


def test_what_a_loss_lacks_is_named():
    with pytest.raises(FtcError, match="add the pass add-mtp"):
        mtp({"logits": torch.zeros(1, 1, 2)}, torch.zeros(1, 1).long())
    with pytest.raises(FtcError, match="needs a teacher"):
        kl({"logits": torch.zeros(1, 1, 2)}, torch.zeros(1, 1).long())
    with pytest.raises(FtcError, match="reads 'loss', but the model gave logits"):
        model({"logits": torch.zeros(1)}, torch.zeros(1))


def test_another_package_may_add_a_loss(monkeypatch):
    class Point:
        name, value = "twice", "package:twice"

        def load(self):
            return lambda outputs, labels, *, factor=2.0: next_token(outputs, labels) * factor

    monkeypatch.setattr(losses, "entry_points", lambda group: [Point()])
    losses.losses.cache_clear()
    try:
        loss = parse_loss({"name": "twice", "factor": 3.0})
        assert loss.options() == {"factor": 3.0} and not loss.with_labels
        assert options_of(loss.function)().factor == 2.0
    finally:
        losses.losses.cache_clear()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-9, 9)), min_size=1, max_size=4), st.floats(0, 1))
def test_a_schedule_passes_through_its_points_and_stays_between_them(points, progress):
    points = sorted(points, key=lambda p: p[0])
    check_schedule(points, "weight")
    values = [value for _, value in points]
    assert min(values) - 1e-9 <= at(points, progress) <= max(values) + 1e-9
    last = {fraction: value for fraction, value in points}
    for fraction, value in last.items():
        assert at(points, fraction) == pytest.approx(value)


def test_a_schedule_may_step():
    steps = [[0, 0.3], [0.5, 0.3], [0.5, 0.1]]
    assert [at(steps, x) for x in (0.0, 0.49, 0.5, 1.0)] == pytest.approx([0.3, 0.3, 0.1, 0.1]) and at(2, 0.7) == 2.0

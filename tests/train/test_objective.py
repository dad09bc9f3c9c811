"""What a run minimises: the loss that goes by default, teachers live and stored, what is refused before the run starts."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset

import ftc
from ftc.errors import FtcError
from ftc.train import stored_teacher
from ftc.train.launch import resolve
from ftc.train.losses import parse_loss
from ftc.train.objective import Objective, build_objective, first_loss, parse_objective
from ftc.train.stored_teacher import StoredTeacher, store_teacher

V = 32


def decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder(preset("tiny", vocab_size=V, hidden_size=16, intermediate_size=24, head_dim=8, num_attention_heads=2))


def tokens(batch=2, length=8, seed=0):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("value", "passes", "name"),
    [
        ("auto", [], "next-token"),
        ("auto", ["fuse-qkv", {"name": "add-mtp", "depth": 2}], "mtp"),
        ("model", ["add-mtp"], "model"),
        ("auto", ["chunk-cross-entropy"], "model"),
        ("auto", ["chunk-cross-entropy", "add-mtp"], "mtp"),
        ({"name": "mtp", "weight": [[0, 0.3], [1, 0.1]]}, ["add-mtp"], "mtp"),
        ("cross-entropy", ["fuse-qkv"], "cross-entropy"),
    ],
)
def test_the_loss_that_is_taken(value, passes, name):
    assert parse_objective(value, passes)[0].name == name


@pytest.mark.parametrize(
    ("ftc_section", "message"),
    [
        ({"loss": "next-token", "passes": ["add-mtp"]}, "add-mtp and the loss 'next-token' do not go together"),
        ({"loss": "kl", "passes": ["chunk-cross-entropy"]}, "needs one teacher|do not go together"),
        ({"loss": "kl"}, "needs one teacher"),
        ({"loss": {"name": "kl", "teacher": "a", "teacher_logits": "b"}}, "needs one teacher"),
        ({"loss": {"name": "mtp", "teacher": "a"}}, "has no option 'teacher'"),
        ({"loss": "nxt-token"}, "did you mean 'next-token'"),
        ({"loss": 3}, "ftc.loss is 3"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(ftc_section, message):
    with pytest.raises(FtcError, match=message):
        resolve({"ftc": ftc_section})


def test_the_losses_of_a_program_with_modules_follow_the_schedule():
    ids, labels = tokens(), tokens(seed=1)
    program = ftc.rewrite(decoder(), [("add-mtp", {"depth": 2, "weight": 0.3})], example={"input_ids": ids, "labels": labels})
    objective = Objective(parse_loss({"name": "mtp", "weight": [[0, 1.0], [1, 0.0]]}))
    outputs = objective.outputs(program, ids, labels)
    for progress in (0.0, 0.5, 1.0):
        objective.progress = lambda p=progress: p
        expected = outputs["next_token_loss"] + (1 - progress) / 2 * (outputs["mtp_loss_1"] + outputs["mtp_loss_2"])
        torch.testing.assert_close(objective(outputs, labels), expected * labels.numel())
    assert objective.with_labels and objective.parts["mtp_loss_2"] == outputs["mtp_loss_2"]
    plain = Objective(parse_loss("mtp"))
    torch.testing.assert_close(plain(outputs, labels), program(input_ids=ids, labels=labels) * labels.numel())
    whole = Objective(parse_loss("model"))
    torch.testing.assert_close(whole(whole.outputs(program, ids, labels), labels), plain(outputs, labels))


def test_a_live_teacher_runs_beside_the_model_and_is_not_trained():
    student, teacher, ids, labels = decoder(0), decoder(1), tokens(), tokens(seed=2)
    objective = Objective(parse_loss("kl"), teacher=teacher)
    loss = objective(objective.outputs(student, ids, labels), labels)
    p, q = (m(ids).log_softmax(-1) for m in (teacher, student))
    torch.testing.assert_close(loss, (p.exp() * (p - q)).sum())
    loss.backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())
    same = objective(objective.outputs(copy.deepcopy(teacher), ids, labels), labels)
    assert abs(float(same)) < 1e-4


def test_a_stored_teacher_gives_what_the_live_one_gave(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_teacher, "PLACES_PER_FILE", 20)
    teacher, student = decoder(1), decoder(0)
    stream = tokens(1, 50)[0].numpy().astype(np.int32)
    store_teacher(teacher, stream, tmp_path / "stored", k=V, context=64)
    stored = StoredTeacher(tmp_path / "stored", stream)
    assert stored.num_tokens == 50 and len(stored.files) == 3
    places = torch.stack([torch.arange(12), torch.arange(15, 27)])  # the second row spans two files
    found = stored.lookup(places)
    expected = teacher(torch.from_numpy(stream).long()[None]).log_softmax(-1)[0]
    dense = torch.zeros(2, 12, V).scatter_(-1, found["teacher_ids"].long(), found["teacher_logprobs"])
    torch.testing.assert_close(dense, expected[places], rtol=1e-4, atol=1e-5)

    objective = Objective(parse_loss("kl"), stored=stored)
    ids = torch.from_numpy(stream).long()[places]
    loss = objective(objective.outputs(student, ids, None, places), torch.ones_like(ids))
    reference = F.kl_div(student(ids).log_softmax(-1), expected[places], reduction="sum", log_target=True)
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-3)
    assert objective.with_places and not objective.with_labels


def test_windows_of_a_stored_teacher_see_half_a_context_at_least(tmp_path):
    teacher, stream = decoder(1), tokens(1, 41)[0].numpy()
    store_teacher(teacher, stream, tmp_path / "stored", k=3, context=16, batch=2)
    found = StoredTeacher(tmp_path / "stored").lookup(torch.arange(41)[None])
    ids = torch.from_numpy(stream).long()
    for place in (0, 7, 15, 16, 23, 24, 40):  # windows begin at 0, 8, 16, ...; all but the first skip their first half
        start = 0 if place < 16 else (place // 8) * 8 - 8
        logprobs = teacher(ids[None, start : start + 16]).log_softmax(-1)[0, place - start]
        torch.testing.assert_close(found["teacher_logprobs"][0, place], logprobs.topk(3).values, rtol=1e-4, atol=1e-5)


def test_a_stored_teacher_of_something_else_is_refused(tmp_path):
    stream = tokens(1, 20)[0].numpy()
    store_teacher(decoder(), stream, tmp_path / "stored", k=2, context=8, temperature=2.0)
    with pytest.raises(FtcError, match="stored for another stream"):
        StoredTeacher(tmp_path / "stored", stream[:-1])
    with pytest.raises(FtcError, match="has temperature 2.0, the loss 1.0"):
        build_objective({"name": "kl", "teacher_logits": str(tmp_path / "stored")}, [], lambda: stream)
    with pytest.raises(FtcError, match="holds no stored teacher"):
        StoredTeacher(tmp_path / "nothing")
    with pytest.raises(FtcError, match="more than the teacher's vocabulary"):
        store_teacher(decoder(), stream, tmp_path / "other", k=99)
    with pytest.raises(FtcError, match="none fits"):
        store_teacher(decoder(), stream, tmp_path / "other", k=0)


def test_the_loss_of_any_model_is_found():
    one = torch.tensor(1.0)
    assert all(first_loss(out) is one for out in (one, {"loss": one}, (one, torch.zeros(2, 3))))
    with pytest.raises(FtcError, match="without a loss"):
        first_loss((torch.zeros(2, 3),))


class Shifting(torch.nn.Module):
    """Shifts the labels itself, and cannot be told not to."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, input_ids, labels=None):
        logits = self.body(input_ids)
        return logits if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_model_that_shifts_labels_itself_is_told_not_to_or_refused():
    objective = Objective(parse_loss("mtp"))
    objective.learn_call(decoder(), V)
    assert objective.label_names == ("labels",)
    with pytest.raises(FtcError, match="does not return the cross-entropy of its logits"):
        objective.learn_call(Shifting(decoder()), V)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    objective.learn_call(model, V)
    assert objective.label_names == ("labels", "shift_labels")
    ids, labels = tokens(), tokens(seed=1)
    program = ftc.rewrite(model, ["add-mtp"], example=objective.call(ids, ids))
    found = objective.outputs(program, ids, labels)
    logits = program.with_extras(input_ids=ids)[1]["mtp_logits_1"]
    torch.testing.assert_close(found["next_token_loss"], F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()))
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / labels.numel()
    torch.testing.assert_close(found["mtp_loss_1"], by_hand)

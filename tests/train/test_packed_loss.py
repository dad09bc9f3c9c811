"""Packed documents are trained on as if each stood alone: the loss of a window is the sum of its documents' own losses."""

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.mtp import same_document, shifted_labels
from ftc.models.presets import preset
from helpers_data import Bytes, stored, texts
from torch import nn

from ftc.data.document_mask import document_mask
from ftc.data.source_table import Source
from ftc.data.stored_windows import DocumentWindows, StreamWindows
from ftc.data.tokens import Framing, start_id
from ftc.data.windows import IGNORED
from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.train.documents_apart import apart_inputs, check_apart, packed_inputs
from ftc.train.objective import Objective, check_windows, parse_objective

VOCAB = 258


def decoder():
    torch.manual_seed(0)
    model = Decoder(preset("tiny", vocab_size=VOCAB))
    return lively(model)


def huggingface(kind, attention, **changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes, use_cache=False)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention)
    return lively(model)


def lively(model):
    """Weights large enough that every token that is seen shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 * parameter.shape[1] ** -0.5)
    return model.double().eval()


MODELS = {
    "decoder": decoder,
    "llama sdpa": lambda: huggingface("Llama", "sdpa"),
    "llama eager": lambda: huggingface("Llama", "eager"),
    "mistral with a window": lambda: huggingface("Mistral", "eager", sliding_window=4),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]()


def total_loss(model, ids_BT, labels_BT, inputs):
    logits_BTV = logits_of(model(input_ids=ids_BT, **inputs))
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum", ignore_index=IGNORED)


def tensors(windows):
    return (torch.tensor([getattr(w, name).tolist() for w in windows]) for name in ("inputs", "labels", "positions"))


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents(model):
    tokenizer, documents = Bytes(256, 257), texts(14, 20)
    windows = DocumentWindows(stored(documents, tokenizer), tokenizer, 32, True, 0, "t")
    batch = [windows.cut(0, index) for index in range(windows.num_windows(0))]
    assert len(batch) < 8 and any(window.num_tokens < 32 for window in batch)
    ids_BT, labels_BT, positions_BT = tensors(batch)
    packed = total_loss(model, ids_BT, labels_BT, packed_inputs(positions_BT, apart_inputs(model)))

    framing, alone = Framing.of_documents(tokenizer), 0.0
    for document in documents:
        ids = torch.tensor([[*framing.before, *document.encode(), *framing.after]])
        alone = alone + total_loss(model, ids[:, :-1], ids[:, 1:], {})
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)  # transformers' norms and softmax are float32
    for one, other in zip(gradients(model, packed), gradients(model, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    leaking = total_loss(model, ids_BT, labels_BT, {})
    assert abs(leaking - alone) > 1e-5 * alone


def test_a_window_of_a_stream_has_the_loss_of_the_pieces_it_cuts(model):
    tokenizer = Bytes(None, 257)
    windows = StreamWindows(stored(texts(14, 20), tokenizer), tokenizer, 24, True, 0, "t")
    batch = [windows.cut(0, index) for index in range(windows.num_windows(0))]
    ids_BT, labels_BT, positions_BT = tensors(batch)
    packed = total_loss(model, ids_BT, labels_BT, packed_inputs(positions_BT, apart_inputs(model)))
    alone = 0.0
    for ids_T, labels_T, positions_T in zip(ids_BT, labels_BT, positions_BT, strict=True):
        borders = [*(positions_T == 0).nonzero().flatten().tolist(), len(ids_T)]
        for start, stop in zip(borders, borders[1:], strict=False):
            alone = alone + total_loss(model, ids_T[None, start:stop], labels_T[None, start:stop], {})
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_models_that_keep_documents_apart_pass_and_others_are_refused(model):
    training = model.training
    check_apart(model, VOCAB, apart_inputs(model))
    assert model.training == training

    class Leaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, position_ids=None, attention_mask=None):
            return self.inner(input_ids=input_ids)

    with pytest.raises(FtcError, match="Leaking does not keep the documents of a window apart"):
        check_apart(Leaking(), VOCAB, apart_inputs(Leaking()))

    class Deaf(nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(FtcError, match="Deaf takes no position_ids; set document_mask = false"):
        apart_inputs(Deaf())


def test_the_mask_is_causal_inside_each_document():
    mask = document_mask(torch.tensor([[0, 1, 2, 0, 1, 0]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("tokenizer", [Bytes(256, 257), Bytes(None, 257)], ids=["start and end", "end alone"])
@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_further_tokens_of_packed_documents_have_the_loss_of_each_alone(tokenizer, kind):
    import ftc

    documents = texts(9, 40)  # some longer than a window
    windows = DocumentWindows(stored(documents, tokenizer), tokenizer, 24, True, 0, "t")
    ids_BT, labels_BT, positions_BT = tensors([windows.cut(0, index) for index in range(windows.num_windows(0))])
    model = decoder()
    packed = packed_inputs(positions_BT, apart_inputs(model))
    options = {"depth": 2, "kind": kind, "end_of_text": start_id(tokenizer)}
    example = {"input_ids": ids_BT, "labels": labels_BT, **packed}
    program = ftc.rewrite(model, [("add-mtp", options)], example=example, check=False)

    def terms(ids_BT, labels_BT, inputs):
        found = program.with_extras(input_ids=ids_BT, labels=labels_BT, **inputs)[1]
        return torch.stack([found[f"mtp_loss_{k}"] for k in (1, 2)]) * (labels_BT != IGNORED).sum()

    together, alone = terms(ids_BT, labels_BT, packed), 0.0
    framing = Framing.of_documents(tokenizer)
    for document in documents:
        ids_1T = torch.tensor([[*framing.before, *document.encode(), *framing.after]])
        for start in range(0, ids_1T.shape[1] - 1, 24):
            piece_1T = ids_1T[:, start : start + 25]
            one = packed_inputs(torch.arange(piece_1T.shape[1] - 1)[None], apart_inputs(model))
            alone = alone + terms(piece_1T[:, :-1], piece_1T[:, 1:], one)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)
    crossing = terms(ids_BT, labels_BT, {})
    assert (abs(crossing - alone) > 1e-5 * alone).all()


@pytest.mark.parametrize("tokenizer", [Bytes(256, 257), Bytes(None, 257), Bytes(256, None)])
def test_in_one_stream_no_further_token_of_the_next_document_is_predicted(tokenizer):
    windows = StreamWindows(stored(texts(14, 20), tokenizer), tokenizer, 24, True, 0, "t")
    ids_BT, labels_BT, positions_BT = tensors([windows.cut(0, index) for index in range(windows.num_windows(0))])
    document_BT = (positions_BT == 0).cumsum(1)
    for k, shifted_BT in enumerate(shifted_labels(labels_BT, 3, same_document(ids_BT, start_id(tokenizer))), 1):
        for row, at in (shifted_BT != IGNORED).nonzero().tolist():
            assert document_BT[row, at] == document_BT[row, at + k]  # what it is given
            target = document_BT[row, at + k + 1] if at + k + 1 < 24 else document_BT[row, at]
            assert target == document_BT[row, at] or shifted_BT[row, at] == start_id(tokenizer)


def test_a_live_teacher_sees_documents_apart_as_the_model_does():
    tokenizer, teacher = Bytes(256, 257), decoder()
    windows = DocumentWindows(stored(texts(9, 20), tokenizer), tokenizer, 24, True, 0, "t")
    ids_BT, labels_BT, positions_BT = tensors([windows.cut(0, index) for index in range(windows.num_windows(0))])
    apart = packed_inputs(positions_BT, apart_inputs(teacher))
    objective = Objective(parse_objective({"name": "kl", "teacher": "path"})[0], teacher, apart=True)
    outputs = objective.outputs(decoder(), ids_BT, labels_BT, None, apart)
    assert torch.equal(outputs["logits"], outputs["teacher_logits"])
    assert abs(float(objective(outputs, labels_BT).detach())) < 1e-9
    assert not torch.equal(outputs["logits"], objective.outputs(teacher, ids_BT, labels_BT)["logits"])


def test_further_tokens_of_packed_documents_need_a_document_mask():
    check_windows(*parse_objective("mtp"), "documents", True, [])
    check_windows(*parse_objective("mtp"), "stream", False, [])
    with pytest.raises(FtcError, match="needs document_mask = true"):
        check_windows(*parse_objective("mtp"), "documents", False, [])


def test_a_stored_teacher_needs_windows_with_places():
    loss = parse_objective({"name": "kl", "teacher_logits": "folder"})
    check_windows(*loss, "stream", False, [Source("a.txt")])
    check_windows(*parse_objective("next-token"), "documents", False, [Source("a.txt", streaming=True)])
    with pytest.raises(FtcError, match='packing = "documents" cuts none; use packing = "stream"'):
        check_windows(*loss, "documents", True, [Source("a.txt")])
    with pytest.raises(FtcError, match="the source 'b' is streamed; leave streaming out"):
        check_windows(*loss, "stream", True, [Source("a.txt"), Source("b.txt", name="b", streaming=True)])

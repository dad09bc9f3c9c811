"""chunk-cross-entropy: the loss without all logits, in our decoder and in models that return the logits too."""

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
from ftc.errors import FtcError


class Head(nn.Module):
    """A head and loss with the variations that the tests draw; returns loss and logits."""

    def __init__(self, softcap=None, scale=1.0, kind="plain"):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.softcap, self.scale, self.kind = softcap, scale, kind
        self.register_buffer("weights", torch.rand(32))

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.embed(ids))) * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.kind == "bent":
            logits = logits.exp()
        weight = self.weights if self.kind == "weighted" else None
        loss = F.cross_entropy(logits.float().view(-1, 32), labels.view(-1), weight=weight, ignore_index=-1)
        return loss, logits


def batch(length=7):
    ids = torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(length))
    labels = ids.roll(-1, 1)
    labels[0, -2:] = -1
    return ids, labels


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.25), (3.0, 1.0), (5.0, 0.5)])
def test_loss_and_gradients_are_those_of_the_plain_spelling(softcap, scale):
    torch.manual_seed(0)
    net = Head(softcap, scale)
    program = ftc.rewrite(net, ["chunk-cross-entropy"], example=dict(zip(("ids", "labels"), batch(), strict=True)))
    ids, labels = batch(11)
    loss, logits = program(ids, labels)
    expected, _ = net(ids, labels)
    assert logits is None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, list(program.parameters()))
    plain = torch.autograd.grad(expected, list(net.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_logits_stay_when_asked_for():
    net = Head()
    example = dict(zip(("ids", "labels"), batch(), strict=True))
    program = ftc.rewrite(net, [("chunk-cross-entropy", {"keep_logits": True})], example=example)
    assert torch.equal(program(*batch(9))[1], net(*batch(9))[1])


@pytest.mark.parametrize(("kind", "reason"), [("bent", "exp.* stands between"), ("weighted", "weighs its classes")])
def test_other_losses_are_declined_with_the_reason(kind, reason):
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(Head(kind=kind), ["chunk-cross-entropy"], example=dict(zip(("ids", "labels"), batch(), strict=True)))


def test_our_decoder_with_labels_and_without():
    torch.manual_seed(0)
    model = Decoder(preset("tiny")).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with pytest.raises(FtcError, match="found no site"):
        ftc.rewrite(model, ["chunk-cross-entropy"], example={"input_ids": ids})
    program = ftc.rewrite(model, ["chunk-cross-entropy"], example={"input_ids": ids, "labels": ids.roll(-1, 1)})
    torch.testing.assert_close(program(ids, labels=ids), model(ids, labels=ids), rtol=1e-5, atol=1e-6)
    assert torch.equal(program(ids), model(ids))

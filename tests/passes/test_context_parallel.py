"""context-parallel: the ranks' tokens put together are the model's; masks that are not made of positions are declined."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.passes.context_parallel import ContextParallel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request

VOCABULARY, T = 40, 16


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4)
    return Decoder(preset("tiny", **(sizes | changes))).double()


def batch(tokens: int = T) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(0, VOCABULARY, (2, tokens), generator=generator) for _ in range(2))
    labels[0, 2:7] = -100
    return {"input_ids": ids, "labels": labels}


def assert_equals(program, model, given: dict) -> None:
    """Loss, logits and gradients of an unbound program, run on all its ranks, against the model."""
    loss, expected = program(**given), model(**given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    model.zero_grad()
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(program.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    inputs = {name: value for name, value in given.items() if name != "labels"}
    torch.testing.assert_close(program(**inputs), model(**inputs), rtol=1e-12, atol=1e-12)


@settings(max_examples=6)
@given(
    degree=st.sampled_from([2, 4]),
    balanced=st.booleans(),
    chunked=st.booleans(),
    positions=st.booleans(),
    tensor=st.booleans(),
)
def test_all_ranks_together_are_the_model(degree, balanced, chunked, positions, tensor):
    model, given = decoder(), batch()
    if positions:
        given["position_ids"] = torch.arange(T)[None] + torch.tensor([[0], [3]])
    passes = ["chunk-cross-entropy"] * chunked + [("context-parallel", {"degree": degree, "balanced": balanced})]
    passes += [("tensor-parallel", {"degree": 2})] * tensor
    assert_equals(ftc.rewrite(model, passes, example=given, check=False), model, given)


def test_certificates_and_the_other_order():
    program = ftc.rewrite(decoder(), [("tensor-parallel", {"degree": 2}), ("context-parallel", {"degree": 2})], example=batch())
    assert all(entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12 for entry in program._applied)
    assert_equals(program, decoder(), batch())


class Attention(nn.Module):
    """One attention in the variations that the tests draw."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None):
        length = x.shape[1]
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.kind == "window":
            i = torch.arange(length, device=x.device)
            mask = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 3)
        if self.kind == "softcap":
            scores = 7 * torch.tanh(q @ k.transpose(-2, -1) / 2 / 7)
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            out = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal")
        x = x + self.out(out.transpose(1, 2).flatten(-2))
        if self.kind == "mean":
            return x - x.mean(1, keepdim=True)
        return x.roll(1, 1) if self.kind == "roll" else x


class Net(nn.Module):
    """Two attentions."""

    def __init__(self, kind: str):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(kind), Attention(kind)])

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


def net(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind).double()


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("kind", ["causal", "window", "softcap", "unmasked"])
def test_every_kind_of_attention_over_positions(kind, balanced):
    model, x = net(kind), torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
    program = ftc.rewrite(model, [("context-parallel", {"degree": 2, "balanced": balanced})], example=(torch.randn(3, 8, 16, dtype=torch.float64),))
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    (found,), (expected,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (program, model))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "masked", "reason"),
    [("plain", True, "tokens by tokens|neither causal"), ("mean", False, "mean.dim works along"), ("roll", False, "roll.default is not known")],
)
def test_what_mixes_tokens_is_an_error_whatever_is_expected(kind, masked, reason):
    example = {"x": torch.randn(2, 8, 16, dtype=torch.float64)}
    if masked:
        example["mask"] = torch.rand(2, 1, 8, 8) < 0.7
    for expect in ("some", "any"):
        with pytest.raises(FtcError, match=reason):
            ftc.rewrite(net(kind), [("context-parallel", {"degree": 2, "expect": expect})], example=example)
    assert reason.partition("|")[0].split()[0] in str(ftc.explain(net(kind), "context-parallel{degree=2}", example))


def test_a_padded_batch_met_later_is_an_error():
    program = ftc.rewrite(decoder(), [("context-parallel", {"degree": 2})], example=batch(), check=False)
    with pytest.raises(FtcError, match="cannot follow .* tokens by tokens"):
        program(**batch(), attention_mask=torch.ones(2, T, dtype=torch.bool))


def test_a_single_sequence_met_later_is_followed_too():
    model, given = decoder(), batch()
    program = ftc.rewrite(model, [("context-parallel", {"degree": 2})], example=given)
    assert_equals(program, model, {name: value[:1] for name, value in given.items()})


def test_a_length_that_cannot_be_cut_is_an_error():
    program = ftc.rewrite(decoder(), [("context-parallel", {"degree": 2})], example=batch(), check=False)
    with pytest.raises(FtcError, match="10 tokens cannot be cut into 4 equal chunks"):
        program(**batch(10))


@dataclasses.dataclass(frozen=True)
class Sabotaged(ContextParallel):
    """The pass, and then something broken in its result."""

    how: str = ""

    def apply(self, graph):
        outcome = super().apply(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and getattr(node.target, "namespace", None) == "ftc":
                if node.target.name() == "ftc::sequence_attention" and self.how == "order":
                    node.kwargs = node.kwargs | {"balanced": False}
                if node.target.name() == self.how:
                    node.replace_all_uses_with(node.args[0])
                    graph.erase_node(node)
        return outcome


@pytest.mark.parametrize("how", ["order", "ftc::reduce_from_ranks"])
def test_sabotage_does_not_pass(how):
    program = ftc.rewrite(decoder(), ["raise"], example=batch())
    with pytest.raises(FtcFailure, match="does not keep its contract"):
        apply_request(program, Request(Sabotaged(2, how=how), "some"))


def test_a_saved_program_verifies(tmp_path):
    model = decoder()
    program = ftc.rewrite(model, [("context-parallel", {"degree": 2}), ("tensor-parallel", {"degree": 2})], example=batch())
    program.save(tmp_path / "p")
    torch.testing.assert_close(ftc.load(tmp_path / "p")(**batch()), model(**batch()), rtol=1e-12, atol=1e-12)
    found = ftc.verify(tmp_path / "p")
    assert found.ok, str(found)

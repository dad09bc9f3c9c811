"""expert-parallel: ranks with batches of their own together are the model; what is no mixture's own parameter is declined."""

import dataclasses

import helpers_experts as experts
import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.passes.expert_parallel import ExpertParallel
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
from ftc.dialect.collectives import JOINT_DEFINITIONS
from ftc.dialect.expert_ranks import dispatch
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request

X = (torch.randn(2, 5, experts.D, dtype=torch.float64),)


def rewritten(kind: str, degree: int, **options):
    return ftc.rewrite(experts.net(kind), [("expert-parallel", {"degree": degree})], example=X, **options)


@settings(max_examples=10)
@given(kind=st.sampled_from(list(experts.KINDS)), degree=st.sampled_from([2, 4, 8]))
def test_a_certificate_and_all_ranks_in_one_process(kind, degree):
    """Each rank on a batch of its own in the certificate; the same batch on all ranks in an unbound program."""
    model, program = experts.net(kind), rewritten(kind, degree)
    entry = program._applied[-1]
    assert entry["matches"] == 2 and entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12
    x = torch.randn(1, 7, experts.D, dtype=torch.float64)
    found, expected = program(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(experts.loss_of(found), list(program.parameters()))
    for mine, theirs in zip(grads, torch.autograd.grad(experts.loss_of(expected), list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(data=st.data())
def test_the_plain_form_is_the_mixture_of_each_rank_with_all_experts(data):
    """Outputs, and gradients of all tensors: those of experts are sums over ranks; batches of any sizes, none among them."""
    degree, local = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    top_k = data.draw(st.integers(1, degree * local))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=degree, max_size=degree))
    on_input = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    total = degree * local

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    gate_up, down = drawn(total, 4, 3), drawn(total, 3, 2)
    xs, ws = [drawn(n, 3) for n in sizes], [drawn(n, top_k) for n in sizes]
    ids = [torch.stack([torch.randperm(total + 1, generator=generator)[:top_k] for _ in range(n)] or [torch.empty(top_k).long()])[:n] for n in sizes]
    ranks = [
        {"x": x, "indices": i, "weights": w, "gate_up": g, "down": d, "weight_on_input": on_input}
        for x, i, w, g, d in zip(xs, ids, ws, gate_up.chunk(degree), down.chunk(degree), strict=True)
    ]
    found = JOINT_DEFINITIONS["expert_parallel_moe"](ranks)
    expected = [torch.ops.ftc.moe(x, i, w, gate_up, down, weight_on_input=on_input) for x, i, w in zip(xs, ids, ws, strict=True)]
    leaves = [gate_up, down, *xs, *ws]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(sum(o.pow(3).sum() for o in outs), leaves, allow_unused=True, materialize_grads=True) for outs in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(tokens=st.integers(0, 20), local=st.integers(1, 4), degree=st.integers(2, 5), seed=st.integers(0, 99), data=st.data())
def test_a_token_goes_once_to_every_rank_that_holds_a_choice_of_it(tokens, local, degree, seed, data):
    total = local * degree
    top_k = data.draw(st.integers(1, total))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, total + 1, generator=generator).argsort(-1)[:, :top_k]  # `total` among them: no choice
    sent = dispatch(indices, local, degree)
    assert sum(sent.counts) == len(sent.token_R) and len(sent.counts) == degree
    found = set()
    for rank, (token, chosen, slot) in enumerate(zip(*(t.split(sent.counts) for t in (sent.token_R, sent.expert_RJ, sent.slot_RJ)), strict=True)):
        assert len(set(token.tolist())) == len(token)
        for row in range(len(token)):
            for expert, place in zip(chosen[row].tolist(), slot[row].tolist(), strict=True):
                if expert < local:
                    assert indices[token[row], place] == rank * local + expert
                    found.add((int(token[row]), rank * local + expert))
    assert found == {(n, e) for n, row in enumerate(indices.tolist()) for e in row if e < total}


def test_a_number_of_experts_that_the_degree_does_not_divide_is_an_error():
    with pytest.raises(FtcError, match="experts.gate_up holds 8 experts, which an expert-parallel degree of 3 does not divide; use 2, 4, 8"):
        rewritten("gated", 3)


class Shared(experts.Net):
    """Both mixtures of a block in one, and an expert that is computed."""

    def __init__(self, how: str):
        super().__init__()
        self.how, block = how, self.blocks[0]
        self.blocks, self.experts = torch.nn.ModuleList(), block.experts

    def forward(self, x):
        down = self.experts.down * 2 if self.how == "computed" else self.experts.down
        weights, indices = self.experts.router(x[0]).softmax(-1).topk(2, -1)
        out = torch.ops.ftc.moe(x[0], indices, weights, self.experts.gate_up, down)
        return out + self.experts.down.sum() if self.how == "read twice" else out


@pytest.mark.parametrize(("how", "reason"), [("computed", "are computed, not a parameter"), ("read twice", "experts.down is used more than once")])
def test_near_misses_name_what_is_in_the_way(how, reason):
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(Shared(how).double(), [("expert-parallel", {"degree": 2})], example=X)


def test_a_model_without_experts_is_no_site():
    with pytest.raises(FtcError, match="expert-parallel found no site"):
        ftc.rewrite(torch.nn.Linear(8, 8).double(), [("expert-parallel", {"degree": 2})], example=X)


def test_it_stands_once_and_refuses_another_number_of_ranks_on_its_axis():
    program = ftc.rewrite(rewritten("gated", 2, check=False), [("expert-parallel", {"degree": 2})])
    assert program._applied[-1]["already"] == 2 and program._applied[-1]["matches"] == 0
    with pytest.raises(FtcError, match="axis 'expert' has 2 ranks in this program already"):
        ftc.rewrite(program, [("expert-parallel", {"degree": 4})])


@dataclasses.dataclass(frozen=True)
class Sabotaged(ExpertParallel):
    """The pass, and then something broken in its result."""

    how: str = ""

    def apply(self, graph):
        outcome = super().apply(graph)
        for node in [n for n in graph.nodes if "expert_parallel" in str(n.target)]:
            if self.how == "no exchange":  # every rank with its own experts alone, as though they were all there are
                with graph.inserting_before(node):
                    own = graph.call_function(torch.ops.aten.remainder.Scalar, (node.args[1], 4))
                    new = graph.call_function(torch.ops.ftc.moe.default, (node.args[0], own, *node.args[2:5]))
                node.replace_all_uses_with(new)
            elif self.how == "wrong experts":
                with graph.inserting_before(node):
                    node.replace_input_with(node.args[1], graph.call_function(torch.ops.aten.flip.default, (node.args[1], [0])))
        return outcome


@pytest.mark.parametrize("how", ["no exchange", "wrong experts"])
def test_sabotage_does_not_pass(how):
    with pytest.raises(FtcFailure, match="does not keep its contract"):
        apply_request(ftc.capture(experts.net("on input"), X), Request(Sabotaged(2, how=how), "some"))


def test_experts_on_one_axis_and_heads_on_another_are_the_model():
    """A decoder of two layers on 2 x 2 ranks, its experts fused; the certificate of each pass, and all ranks in one process."""
    torch.manual_seed(0)
    moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 8}
    model = Decoder(preset("tiny", vocab_size=40, hidden_size=16, head_dim=4, num_hidden_layers=2, moe=moe)).double()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "labels": ids}
    program = ftc.rewrite(model, ["fuse-moe", ("tensor-parallel", {"degree": 2})], example=given, check=False)
    program = ftc.rewrite(program, [("expert-parallel", {"degree": 2})])
    assert set(program.axes) == {"tensor", "expert"} and program._applied[-1]["max_gradient_error"] <= 1e-12
    found, expected = program(**given), model(**given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    grads = {name: p.grad for name, p in program.named_parameters()}
    for prefix, code in [(f"{r.ftc_name}.", r.code) for r in program.regions]:
        for lens in reversed(code.lenses):
            grads = lens.with_prefix(prefix).backward(grads)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_saved_program_verifies_and_has_the_original_weights(tmp_path):
    model, program = experts.net("biases"), rewritten("biases", 4)
    program.save(tmp_path / "p")
    loaded = ftc.load(tmp_path / "p")
    torch.testing.assert_close(loaded(*X), model(*X), rtol=1e-12, atol=1e-12)
    assert ftc.verify(tmp_path / "p").ok
    for name, value in model.state_dict().items():
        assert torch.equal(program.original_state_dict()[name], value)

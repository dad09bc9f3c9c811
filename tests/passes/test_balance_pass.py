"""The pass balance: every router that is understood gets its losses and its bias, outputs keep their bits, and near misses are told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError
from ftc.rewrite.certificate import digest
from ftc.rewrite.registry import parse_passes
from ftc.rewrite.router_site import find_router, is_mixture

E, D, F, K = 8, 6, 4, 2


class Block(nn.Module):
    """A router of one spelling before `ftc::moe`. [B, T, D] to [B, T, D]."""

    def __init__(self, spelling: str):
        super().__init__()
        self.spelling = spelling
        self.router = nn.Linear(D, E, bias=spelling == "softmax of chosen")
        self.gate_up, self.down = nn.Parameter(torch.randn(E, 2 * F, D) / 3), nn.Parameter(torch.randn(E, D, F) / 3)
        self.register_buffer("correction", torch.randn(E) / 9 if "bias" in spelling else None)

    def forward(self, x_BTD):
        x = x_BTD.flatten(0, 1)
        indices, weights = getattr(self, "route_" + self.spelling.replace(" ", "_"))(x)
        return x_BTD + torch.ops.ftc.moe(x, indices, weights, self.gate_up, self.down).view_as(x_BTD)

    def route_softmax(self, x):
        values, indices = self.router(x).softmax(-1, dtype=torch.float32).topk(K)
        return indices, (values / values.sum(-1, keepdim=True)).to(x.dtype)

    def route_softmax_of_chosen(self, x):
        values, indices = torch.topk(self.router(x), K, dim=-1)
        return indices, values.softmax(-1)

    def route_sigmoid_of_chosen(self, x):
        values, indices = torch.topk(self.router(x), K, dim=-1)
        return indices, values.float().sigmoid().to(x.dtype)

    def route_gathered(self, x):
        scores = (self.router(x).float() * 0.5).sigmoid()
        indices = scores.topk(K).indices
        return indices, scores.gather(1, indices) * 2.5

    def route_bias_in_groups(self, x):
        scores = self.router(x).sigmoid()
        choice = scores.view(-1, E) + self.correction.unsqueeze(0)
        best = choice.view(-1, 2, E // 2).topk(2, -1)[0].sum(-1).topk(1, -1)[1]
        kept = torch.zeros(x.shape[0], 2, dtype=torch.bool).scatter(1, best, True)
        choice = choice.masked_fill(~kept.unsqueeze(-1).expand(-1, -1, E // 2).reshape(-1, E), float("-inf"))
        indices = choice.topk(K)[1]
        return indices, scores.gather(1, indices)

    def route_bias_on_logits(self, x):
        logits = self.router(x)
        indices = (logits + self.correction).topk(K).indices
        return indices, logits.gather(1, indices).softmax(-1)

    def route_in_each_group(self, x):
        scores = self.router(x).softmax(-1)
        indices = (scores.unflatten(-1, (2, -1)).topk(1).indices + torch.arange(2)[:, None] * (E // 2)).flatten(-2)
        return indices, scores.gather(1, indices)

    def route_capacity(self, x):
        scores = self.router(x).softmax(-1)
        values, indices = scores.topk(K)
        kept = (indices.flatten()[:, None] == torch.arange(E)).cumsum(0).amax(-1).view_as(indices) < 99
        return torch.where(kept, indices, E), torch.where(kept, values, 0)

    # ---- near misses

    def route_experts_choose(self, x):
        scores = self.router(x).softmax(-1)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(3, dim=0).indices, True)
        return torch.where(taken, torch.arange(E), E), torch.where(taken, scores, 0)

    def route_noise(self, x):
        scores = (self.router(x) + torch.randn(x.shape[0], E)).softmax(-1)
        values, indices = scores.topk(K)
        return indices, values

    def route_twice(self, x):
        scores = (self.router(x) + x @ self.gate_up[:, 0].t()).softmax(-1)
        values, indices = scores.topk(K)
        return indices, values

    def route_no_gate(self, x):
        values, indices = self.router(x).topk(K)
        return indices, values.tanh()

    def route_masked(self, x):
        scores = self.router(x).softmax(-1)
        values, indices = scores.masked_fill(scores < 0.05, 0.0).topk(K)
        return indices, values


SPELLINGS = {
    "softmax": ("softmax", "added"), "softmax of chosen": ("softmax", "added"), "sigmoid of chosen": ("sigmoid", "added"),
    "gathered": ("sigmoid", "added"), "bias in groups": ("sigmoid", "correction"), "bias on logits": ("softmax", "correction"),
    "in each group": ("softmax", "added"), "capacity": ("softmax", "added"),
}  # fmt: skip
OPTIONS = {"switch": 0.1, "sequence": 0.2, "z": 0.05, "loss_free": 0.01}


def captured(spelling, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(Block(spelling), Block(spelling))
    x = torch.randn(2, 5, D)
    return model, x, ftc.capture(model, (x,))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_outputs_keep_their_bits_and_gradients_gain_the_losses(spelling):
    model, x, program = captured(spelling)
    balanced = ftc.rewrite(program, [("balance", OPTIONS)])
    (entry,) = [entry for entry in balanced._applied if entry["pass"] == "balance"]
    gate, bias = SPELLINGS[spelling]
    detail = entry["sites"]["0"]["matches"][0]["detail"]
    assert entry["matches"] == 2 and (detail["gate"], detail["bias"]) == (gate, bias)
    assert entry["max_output_error"] == entry["max_gradient_error"] == 0
    out = balanced(x)
    assert torch.equal(out, model(x))
    model(x).sum().backward()
    out.sum().backward()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p.grad, balanced.get_parameter(n).grad)]
    assert {n for n in changed if n.startswith("1.")} <= {"1.router.weight", "1.router.bias"} and "1.router.weight" in changed
    assert balanced.state_dict()["1.router.balance_tally"][: E].sum() == 2 * 5 * K


def test_the_gradient_of_the_router_is_that_of_the_losses_written_out():
    model, x, program = captured("softmax")
    model, x = model.double(), x.double()
    program = ftc.rewrite(ftc.capture(model, (x,)), [("balance", {"switch": 0.1, "sequence": 0.2, "z": 0.05})])
    program(x).sum().backward()
    logits = [model[0].router(x.flatten(0, 1)), model[1].router(model[0](x).flatten(0, 1))]
    loss = model(x).sum()
    for l in logits:
        p, chosen = l.softmax(-1), torch.nn.functional.one_hot(l.topk(K).indices, E).sum(1).double()
        loss = loss + 0.1 * E * (chosen.mean(0) / K * p.mean(0)).sum() + 0.05 * l.logsumexp(-1).square().mean()
        by_sequence = E * ((chosen.view(2, 5, E).mean(1) / K) * p.view(2, 5, E).mean(1)).sum(-1)
        loss = loss + 0.2 * by_sequence.mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        expected, found = parameter.grad, program.get_parameter(name).grad
        # "softmax" casts to float32 on its way to the weights, so what the model itself computes is no better
        assert (expected - found).abs().max() <= 1e-6 * expected.abs().max(), name


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 99))
def test_the_added_bias_moves_the_choice_and_not_the_weights(seed):
    model, x, program = captured("gathered", seed)
    balanced = ftc.rewrite(program, [("balance", {"loss_free": 0.1})])
    with torch.no_grad():
        for region in balanced.regions:
            region.fetch("router.balance_bias")[3] = 100.0
    x = x[:1]
    block = model[0]
    scores = (block.router(x.flatten(0, 1)) * 0.5).sigmoid()
    indices = (scores + torch.eye(E)[3] * 100).topk(K).indices
    assert (indices == 3).any(-1).all()
    expected = x + torch.ops.ftc.moe(x.flatten(0, 1), indices, scores.gather(1, indices) * 2.5, block.gate_up, block.down).view_as(x)
    assert torch.allclose(balanced.regions[0](x), expected, rtol=1e-6)


@pytest.mark.parametrize("loss_free", [0.0, 0.1])
def test_tally_and_bias_are_buffers_and_only_without_a_bias_is_there_a_way_back(loss_free):
    model, x, program = captured("softmax")
    balanced = ftc.rewrite(program, [("balance", {"loss_free": loss_free})])
    added = set(balanced.state_dict()) - set(model.state_dict())
    assert added == {f"{i}.router.balance_{word}" for i in (0, 1) for word in (("bias", "tally") if loss_free else ("tally",))}
    assert not added & {n for n, _ in balanced.named_parameters()}
    if loss_free:
        with pytest.raises(FtcError, match="add_buffer lens, which has no inverse"):
            balanced.original_state_dict()
    else:
        assert balanced.original_state_dict().keys() == model.state_dict().keys()
    assert len(balanced.regions[0].code.all_variants()) == 1
    balanced(x)
    assert len(balanced.regions[0].code.all_variants()) == 1  # not captured again for the new dtypes


def test_a_bias_of_the_models_own_goes_back():
    model, _, program = captured("bias on logits")
    balanced = ftc.rewrite(program, [("balance", {"loss_free": 0.1})])
    assert balanced.original_state_dict().keys() == model.state_dict().keys()


def test_the_second_time_finds_it_done():
    _, _, program = captured("softmax")
    again = ftc.rewrite(program, [("balance", OPTIONS), ("balance", OPTIONS)])
    assert [(e["matches"], e["already"]) for e in again._applied if e["pass"] == "balance"] == [(2, 0), (0, 2)]


@pytest.mark.parametrize("spelling", ["softmax", "bias in groups"])
def test_a_saved_program_is_verified_and_balances_on(tmp_path, spelling):
    _, x, program = captured(spelling)
    balanced = ftc.rewrite(program, [("balance", OPTIONS)])
    expected = balanced(x)
    balanced.save(tmp_path / "program")
    found = ftc.verify(tmp_path / "program")
    assert found.ok, str(found)
    loaded = ftc.load(tmp_path / "program")
    out = loaded(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert loaded.state_dict()["0.router.balance_tally"][:E].sum() == 2 * 5 * K


def test_a_changed_coefficient_in_a_saved_certificate_is_another_certificate():
    entries = [ftc.rewrite(captured("softmax")[2], [("balance", {"switch": s})])._applied[-1] for s in (0.1, 0.2)]
    assert digest(entries[0]["certificates"][0]["after"]) != digest(entries[1]["certificates"][0]["after"])


def _mixture(spelling):
    _, _, program = captured(spelling)
    graph = program.regions[0].code.all_variants()[0].captured.graph
    return find_router(next(node for node in graph.nodes if is_mixture(node)))


def test_logits_are_what_the_gate_takes():
    """A factor before the gate belongs to them, a selection bias behind it does not."""
    assert _mixture("gathered").logits.target is torch.ops.aten.mul.Tensor
    router = _mixture("bias in groups")
    assert router.logits is router.product and router.bias.target == "correction" and router.weight.target == "router.weight"
    assert _mixture("bias on logits").logits.target is torch.ops.aten.linear.default


@pytest.mark.parametrize(
    ("spelling", "options", "reason"),
    [
        ("experts choose", {"switch": 0.1}, "experts choose their tokens"),
        ("noise", {"switch": 0.1}, "the choice is random"),
        ("twice", {"switch": 0.1}, "depends on 2 products"),
        ("no gate", {"switch": 0.1}, "pass through 0 softmaxes or sigmoids"),
        ("masked", {"loss_free": 0.1}, "masked_fill stands between"),
    ],
)
def test_near_misses_are_declined_with_their_reason(spelling, options, reason):
    _, x, program = captured(spelling)
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(program, [("balance", options)], check=False)  # what is random has no proof
    graph = program.regions[0].code.all_variants()[0].captured.graph
    assert not any("balance" in str(node.target) for node in graph.nodes)


def test_a_router_without_sequences_is_declined_where_they_are_asked_for():
    class Flat(Block):
        def forward(self, x):
            return x + torch.ops.ftc.moe(x, *self.route_softmax(x), self.gate_up, self.down)

    torch.manual_seed(0)
    program = ftc.capture(nn.Sequential(Flat("softmax"), Flat("softmax")), (torch.randn(5, D),))
    assert ftc.rewrite(program, [("balance", {"switch": 0.1})])._applied[-1]["matches"] == 2
    with pytest.raises(FtcError, match="no view of \\[batch, tokens, width\\]"):
        ftc.rewrite(program, [("balance", {"sequence": 0.1})])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"switch": -0.1}, "switch = -0.1 must be 0 or more"), ({"dead_after": 0}, "use 1 or more"), ({"scope": "global"}, "scope = 'global'")],
)
def test_options_are_checked(options, message):
    with pytest.raises(FtcError, match=message):
        parse_passes([("balance", options)])

"""Loops over the experts that were hit are captured as loops over all of them; other decisions on data stay refused."""

import pytest
import torch
import torch.nn.functional as F
from stacks import Stack
from torch import nn

import ftc

E, K, D = 4, 2, 6


class Experts(nn.Module):
    """A router and a loop over experts; `spelling` is what the loop goes through."""

    def __init__(self, index):
        super().__init__()
        self.router, self.experts = nn.Linear(D, E, bias=False), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def route(self, x):
        weights, indices = self.router(x).softmax(-1).topk(K, -1)
        return weights, indices, F.one_hot(indices, E).permute(2, 1, 0)


class OverHits(Experts):
    def forward(self, x):
        weights, _, mask = self.route(x)
        out = torch.zeros_like(x)
        for hit in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            expert = hit[0]
            if expert == E:
                continue
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out


class OverFlatHits(Experts):
    def forward(self, x):
        weights, indices, mask = self.route(x)
        out = torch.zeros_like(x)
        for expert in mask.sum((-1, -2)).nonzero().flatten().tolist():
            weight = torch.where(indices == expert, weights, 0).sum(-1, keepdim=True)
            out = out + weight * self.experts[expert](x)
        return out


class SkippingEmpty(Experts):
    def forward(self, x):
        weights, indices, _ = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            if token.numel() == 0:
                continue
            out[token] += expert(x[token]) * weights[token, slot, None]
        return out


class AskingForAny(Experts):
    def forward(self, x):
        weights, indices, _ = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = indices == number
            if not chosen.any() or chosen.sum() == 0:
                continue
            out = out + (weights * chosen).sum(-1, keepdim=True) * expert(x)
        return out


class CountingHits(Experts):
    """Adds a one for every expert that was hit: going through all of them is something else."""

    def forward(self, x):
        _, _, mask = self.route(x)
        out = x
        for _ in mask.sum((-1, -2)).nonzero():
            out = out + 1
        return out


class AnyOfTheData(Experts):
    def forward(self, x):
        return -x if (x > 1e9).any() else self.experts[0](x)


@pytest.mark.parametrize("block", [OverHits, OverFlatHits, SkippingEmpty, AskingForAny])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_loop_over_hits_is_a_loop_over_all_experts(block, tokens):
    torch.manual_seed(0)
    model = Stack(block)
    program = ftc.capture(model, (torch.randn(5, D),))
    x = torch.randn(tokens, D)
    torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)
    found, expected = ({n: p.grad for n, p in _differentiated(m, x).named_parameters()} for m in (program, model))
    for name, parameter in model.named_parameters():  # an expert that was not hit has no gradient, or zero
        one, other = (torch.zeros_like(parameter) if g[name] is None else g[name] for g in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _differentiated(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return model


def test_twins_share_the_graph_of_a_loop_over_hits():
    program = ftc.capture(Stack(OverHits), (torch.randn(5, D),))
    assert len({region.code for region in program.regions}) == 1


def test_twins_that_differ_in_a_name_with_their_number_share_a_graph():
    class Named(OverHits):
        def __init__(self, index):
            super().__init__(index)
            self.name = f"layers.{index}.moe"

    class OtherwiseNamed(OverHits):
        def __init__(self, index):
            super().__init__(index)
            self.name = ("one", "two", "three")[index]

    for block, count in ((Named, 1), (OtherwiseNamed, 3)):
        program = ftc.capture(Stack(block), (torch.randn(5, D),))
        assert len({region.code for region in program.regions}) == count


def test_a_loop_that_counts_hits_is_refused():
    with pytest.raises(ftc.FtcError, match="layers.0 goes through the hits of a choice only"):
        ftc.capture(Stack(CountingHits), (torch.randn(1, D),))


def test_a_question_about_other_data_is_refused():
    with pytest.raises(ftc.FtcError, match="takes its control flow or a shape from the values of a tensor"):
        ftc.capture(Stack(AnyOfTheData), (torch.randn(5, D),))


def test_rows_that_data_picks_are_captured_where_only_their_sum_goes_on():
    class Picked(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x):
            return self.inner(x + x[x[:, 0] > 0].sum(0))

    model = Stack(Picked)
    program = ftc.capture(model, (torch.randn(5, D),))
    for x in (torch.randn(4, D), -torch.ones(3, D), torch.ones(1, D)):
        assert torch.equal(program(x), model(x))

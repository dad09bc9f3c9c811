"""Costs of a program's parts: exact where they are modelled, of the right parts where they are measured."""

import pytest
import torch
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ftc
from ftc.errors import FtcError
from ftc.plan.measure import measure
from ftc.plan.roofline import Machine, Roofline

COMPUTE_ONLY = Machine(flops=1e6, bandwidth=1e30)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.linear(x)


class Stack(nn.Module):
    """An embedding, products, and a head: every FLOP is known."""

    def __init__(self, vocabulary: int, width: int, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def captured(model: nn.Module, vocabulary: int, passes=()):
    with torch.device("cpu"):
        example = {"input_ids": torch.randint(vocabulary, (2, 5))}
        return ftc.rewrite(model, list(passes), example=example, check=False)


def step_of(program, vocabulary: int, batch: int, length: int):
    def step(device):
        ids = torch.randint(vocabulary, (batch, length + 1), device=device)
        return nn.functional.cross_entropy(program(input_ids=ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")

    return step


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 64), k=st.integers(1, 64), n=st.integers(1, 64), flops=st.floats(1e3, 1e9), bandwidth=st.floats(1e3, 1e9))
def test_a_product_takes_the_longer_of_its_flops_and_its_bytes(m, k, n, flops, bandwidth):
    with FakeTensorMode(), Roofline(Machine(flops, bandwidth)) as model:
        a, b = torch.empty(m, k), torch.empty(k, n)
        before = model.seconds
        a @ b
        assert model.seconds - before == pytest.approx(max(2 * m * k * n / flops, 4 * (m * k + k * n + m * n) / bandwidth))
        before = model.seconds
        a.t(), a.view(-1)
        assert model.seconds == before, "views take nothing"


@settings(max_examples=4, deadline=None)
@given(width=st.integers(4, 24), batch=st.integers(1, 3), length=st.integers(2, 9))
def test_products_cost_as_much_forward_as_for_each_gradient(width, batch, length):
    program = captured(Stack(11, width, 3), 11)
    costs = measure(program, step_of(program, 11, batch, length), machine=COMPUTE_ONLY)
    seconds = 2 * batch * length * width * width / COMPUTE_ONLY.flops
    for part in costs.regions:
        assert (part.forward, part.input_gradient, part.weight_gradient) == pytest.approx((seconds,) * 3)
        assert part.num_parameters == width * width
    head = 2 * batch * length * width * 11 / COMPUTE_ONLY.flops
    assert (costs.last.forward, costs.last.input_gradient, costs.last.weight_gradient) == pytest.approx((head,) * 3)
    assert (costs.first.forward, costs.first.input_gradient, costs.first.weight_gradient) == pytest.approx((0, 0, 0), abs=1e-12)
    assert costs.first.num_parameters == costs.last.num_parameters == 11 * width


def test_measured_parts_are_those_of_the_model_and_leave_it_as_it_was():
    settings_ = preset("tiny")
    program = captured(meta_decoder(settings_).train(), settings_.vocab_size)
    kept = [region.around for region in program.regions]
    costs = measure(program, step_of(program, settings_.vocab_size, 1, 8), rounds=2)
    assert [part.name for part in costs.regions] == [region.name for region in program.regions]
    assert all(part.forward > 0 and part.input_gradient > 0 for part in costs.regions)
    assert all(p.device.type == "meta" for p in program.parameters()) and [region.around for region in program.regions] == kept
    shared = next(p for n, p in program.named_parameters() if "embed" in n).numel() if settings_.tie_word_embeddings else 0  # the embedding and the head both hold it
    counted = costs.first.num_parameters + sum(p.num_parameters for p in costs.regions) + costs.last.num_parameters
    assert counted == sum(p.numel() for p in program.parameters()) + shared


def test_costs_for_the_planner_have_embedding_and_head_at_their_ends():
    program = captured(Stack(11, 8, 3), 11)
    found = measure(program, step_of(program, 11, 2, 6), machine=COMPUTE_ONLY)
    costs = found.costs(bytes_per_parameter=16, microbatches=4, hop_latency=1e-3, bytes_per_second=1e9)
    assert len(costs) == 3 and costs.microbatches == 4
    assert costs.forward[0] == pytest.approx(found.regions[0].forward + found.first.forward)
    assert costs.forward[2] == pytest.approx(found.regions[2].forward + found.last.forward)
    assert sum(costs.fixed_bytes) == 16 * (found.first.num_parameters + found.last.num_parameters + sum(p.num_parameters for p in found.regions))
    assert costs.boundary_bytes == (2 * 6 * 8 * 4.0,) * 2


class Counting(Block):
    """Writes into a buffer as it runs, so that its backward pass cannot be taken apart."""

    def __init__(self, width: int):
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


def test_a_region_that_cannot_be_split_has_its_whole_backward_in_its_input_gradients():
    model = Stack(11, 8, 3)
    model.blocks = nn.ModuleList(Counting(8) for _ in range(3))
    program = captured(model, 11)
    costs = measure(program, step_of(program, 11, 2, 6), machine=COMPUTE_ONLY)
    seconds = 2 * 2 * 6 * 8 * 8 / COMPUTE_ONLY.flops
    for part in costs.regions:
        assert (part.forward, part.input_gradient, part.weight_gradient) == pytest.approx((seconds, 2 * seconds, 0))


def test_a_model_of_no_blocks_is_refused():
    program = ftc.capture(nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(FtcError, match="no regions"):
        measure(program, lambda device: program(torch.ones(2, 4, device=device)).sum())


@pytest.mark.parametrize("numbers", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_a_machine_without_speed_is_refused(numbers):
    with pytest.raises(FtcError, match="rates are above 0"):
        Machine(*numbers)

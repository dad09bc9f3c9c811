"""What cannot be captured is named: the module, the line of its source, and a way out."""

import re

import pytest
import torch
from stacks import Stack
from torch import nn

import ftc
from ftc.open_model import open_model


class Block(nn.Module):
    """Halves its input; what it does besides is up to `decide`."""

    def __init__(self, index):
        super().__init__()
        self.inner, self.index = nn.Linear(4, 4), index

    def forward(self, x):
        return self.inner(self.decide(x))

    def decide(self, x):
        return x


class Branch(Block):
    def decide(self, x):
        if x.sum() > 0:  # here
            return x
        return -x


class BranchOnAWeight(Block):
    def decide(self, x):
        return x if self.inner.weight.sum() > 0 else -x  # here


class Loop(Block):
    def decide(self, x):
        while x.norm() > 1:  # here
            x = x / 2
        return x


class Number(Block):
    def decide(self, x):
        scale = x.mean().item()  # here
        return x * scale


class Hits(Block):
    def decide(self, x):
        for row in x[:, 0].nonzero():  # here
            x = x + row.sum()
        return x


class ThroughNumpy(Block):
    def decide(self, x):
        return x + torch.from_numpy(x.detach().numpy())  # here


class OnlyTheSecond(Block):
    def decide(self, x):
        return -x if self.index == 1 and x.sum() > 0 else x  # here


def line_of(cls):
    import inspect

    source, first = inspect.getsourcelines(cls)
    return first + next(number for number, text in enumerate(source) if "# here" in text)


@pytest.mark.parametrize("block", [Branch, BranchOnAWeight, Loop, Number, Hits, ThroughNumpy, OnlyTheSecond])
def test_data_dependent_control_flow_names_module_line_and_a_way_out(block):
    name = "layers.1" if block is OnlyTheSecond else "layers.0"
    with pytest.raises(ftc.FtcError) as caught:
        ftc.capture(Stack(block), (torch.randn(2, 4),))
    message = str(caught.value)
    assert message.startswith(f"{name} ({block.__name__}) at {__file__}:{line_of(block)} "), message
    assert "# here" in message and "torch.where" in message and "\n" not in message


def test_a_nested_module_is_named_by_its_path():
    class Outer(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.mlp = Branch(index)

        def forward(self, x):
            return self.mlp(x)

    with pytest.raises(ftc.FtcError, match=r"^layers\.0\.mlp \(Branch\) at "):
        ftc.capture(Stack(Outer), (torch.randn(2, 4),))


def test_a_model_without_blocks_is_named_by_its_class():
    with pytest.raises(ftc.FtcError, match=re.escape(f"BranchOnAWeight at {__file__}:{line_of(BranchOnAWeight)} ")):
        ftc.capture(BranchOnAWeight(0), (torch.randn(2, 4),))


def test_a_decision_on_the_inputs_alone_is_captured():
    class Decides(Stack):
        def forward(self, x):
            return super().forward(-x if x.sum() > 0 else x)

    model = Decides(Block)
    program = ftc.capture(model, (torch.ones(2, 4),))
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        assert torch.equal(program(x), model(x))


def test_a_fault_of_the_model_names_the_place():
    class Faulty(Block):
        def decide(self, x):
            raise RuntimeError("my own fault")

    with pytest.raises(
        ftc.FtcError, match=r"in layers\.0 \(Faulty\) at .*test_blame.py:\d+: RuntimeError: my own fault"
    ):
        ftc.capture(Stack(Faulty), (torch.randn(2, 4),))


def test_inputs_of_another_dtype_name_the_place():
    with pytest.raises(ftc.FtcError, match=r"at .*decoder.py:\d+: .*Long"):
        ftc.capture(open_model("preset:tiny"), {"input_ids": torch.rand(2, 12)})

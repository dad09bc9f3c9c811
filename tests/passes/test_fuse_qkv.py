"""fuse-qkv: matches, near misses that it must decline, and its lens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftc
from ftc.errors import FtcError


class Attention(nn.Module):
    """One attention with the variations that the tests draw."""

    def __init__(self, width=16, heads=4, groups=2, bias=(False, False, False), kind="plain"):
        super().__init__()
        self.heads, self.groups, self.size, self.kind = heads, groups, width // heads, kind
        self.q = nn.Linear(width, heads * self.size, bias=bias[0])
        self.k = nn.Linear(width, groups * self.size, bias=bias[1])
        self.v = nn.Linear(width, groups * self.size, bias=bias[2])
        self.out = nn.Linear(width, width)
        if kind == "shared":
            self.v.weight = self.k.weight

    def forward(self, x):
        batch, length, _ = x.shape
        memory = x + 1 if self.kind == "other input" else x
        q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, self.groups, self.size).transpose(1, 2)
        v = self.v(memory).view(batch, length, self.groups, self.size).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        out = self.out(out.transpose(1, 2).reshape(batch, length, -1))
        return x + out * self.q(x).sum() if self.kind == "used twice" else x + out


def program_of(**options):
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attention(**options), Attention(**options)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    return Net().double()


@pytest.mark.parametrize(
    "options",
    [
        *({"groups": groups, "bias": bias} for groups in (1, 2, 4) for bias in ((False,) * 3, (True,) * 3)),
        {"kind": "used twice"},  # the repeated product is one node by then, and its other reader takes the fused part
    ],
)
def test_fused_equals_unfused_and_the_lens_goes_back(options):
    net, x = program_of(**options), torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    program = ftc.rewrite(net, ["fuse-qkv"], example=(torch.randn(3, 5, 16, dtype=torch.float64),))
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    (found,) = torch.autograd.grad(program(x).square().sum(), x)
    torch.testing.assert_close(program(x), net(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert program.report.as_dict()["passes"]["fuse-qkv"]["matches"] == 2
    back = program.original_state_dict()
    assert set(back) == set(net.state_dict()) and all(torch.equal(back[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": (True, False, False)}, "only some of the products have a bias"),
        ({"kind": "other input"}, "is not .* the input of"),
        ({"kind": "shared"}, "used more than once|same weight|one weight"),
    ],
)
def test_near_misses_are_declined_with_the_reason(options, reason):
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(program_of(**options), ["fuse-qkv"], example=(torch.randn(2, 5, 16, dtype=torch.float64),))

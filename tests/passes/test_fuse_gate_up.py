"""fuse-gate-up: matches for every activation, near misses that it must decline, and its lens."""

import pytest
import torch
from ftc.passes.fuse_gate_up import replacement
from torch import nn

import ftc
from ftc.dialect.gated import ACTIVATIONS
from ftc.errors import FtcError


class Gated(nn.Module):
    """A gated MLP with the variations that the tests draw."""

    def __init__(self, activation="silu", bias=False, kind="plain"):
        super().__init__()
        self.activation, self.kind = activation, kind
        self.gate, self.up = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias and kind != "half biased")
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        up = self.up(x + 1 if self.kind == "other input" else x)
        gate = self.gate(x)
        hidden = ACTIVATIONS[self.activation](gate) * up
        if self.kind == "used twice":
            hidden = hidden + up
        return x + self.down(hidden)


def net_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(Gated(**options), Gated(**options)).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_fused_equals_unfused_and_the_lens_goes_back(activation, bias):
    net, x = net_of(activation=activation, bias=bias), torch.randn(2, 5, 8, dtype=torch.float64)
    program = ftc.rewrite(net, ["fuse-gate-up"], example=(torch.randn(3, 4, 8, dtype=torch.float64),))
    torch.testing.assert_close(program(x), net(x), rtol=1e-12, atol=1e-12)
    entry = program.report.as_dict()["passes"]["fuse-gate-up"]
    assert entry["matches"] == 2 and entry["max_gradient_error"] <= 1e-12
    back = program.original_state_dict()
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "half biased", "bias": True}, "bias|None"),
        ({"kind": "other input"}, "stands elsewhere in the pattern"),
        ({"kind": "used twice"}, "used outside the pattern|other users|resembles"),
    ],
)
def test_near_misses_are_declined_with_the_reason(options, reason):
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(net_of(**options), ["fuse-gate-up"], example=(torch.randn(2, 5, 8, dtype=torch.float64),))


def test_the_replacement_is_the_identity_that_the_pass_claims():
    gate, up, x = (torch.randn(*s, dtype=torch.float64) for s in ((12, 8), (12, 8), (3, 8)))
    fused = replacement(x, torch.cat([gate, up]), None, "silu")
    torch.testing.assert_close(fused, ACTIVATIONS["silu"](x @ gate.T) * (x @ up.T), rtol=1e-12, atol=1e-12)

"""raise-mla: attention expanded from a latent becomes one node, whatever joins its parts; what only looks like it stays."""

import pytest
import torch
import torch.nn.functional as F
from blocks import calls, copied, export, largest_error
from ftc.models.decoder import Decoder
from ftc.models.presets import PRESETS
from ftc.passes.raise_attention import RaiseAttention
from ftc.passes.raise_mla import LATENT, SDPA, RaiseMla
from torch import nn

import ftc

D, H, N, E, M, L = 24, 4, 6, 4, 5, 10


class Latent(nn.Module):
    """Latent attention over x [B, T, D]; `change` is one way of not being it, or of spelling it otherwise. Rotation is left out: any shared part will do."""

    def __init__(self, change: str = "", groups: int = H):
        super().__init__()
        self.change, self.groups = change, groups
        self.q, self.kv_a = nn.Linear(D, H * (N + E)), nn.Linear(D, L + (E if change != "own shared part" else E * groups))
        self.kv_b, self.o = nn.Linear(L, groups * (N + M), bias=change == "bias"), nn.Linear(H * M, D)
        self.other = nn.Linear(L, groups * M, bias=False)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (H, N + E)).transpose(1, 2)
        latent, shared = self.kv_a(x).split([L, self.kv_a.out_features - L], -1)
        latent = torch.tanh(latent)
        if self.change == "4 dims":
            kv = self.kv_b(latent[:, None]).squeeze(1)
        else:
            kv = self.kv_b(latent)
        kv = kv.unflatten(-1, (self.groups, N + M)).transpose(1, 2)
        k, v = kv.split([N, M], -1)
        if self.change == "values first":
            v, k = kv.split([M, N], -1)
        if self.change == "own values":
            v = self.other(latent).unflatten(-1, (self.groups, M)).transpose(1, 2)
        if self.change == "other heads":
            v = v.flip(1)
        if self.change == "next token":
            v = v.roll(1, 2)
        shared = shared.unflatten(-1, (-1, E)).transpose(1, 2).expand(-1, self.groups, -1, -1)
        if self.change == "written into":
            key = k.new_empty(*k.shape[:-1], N + E)
            key[..., :N], key[..., N:] = k, shared
        elif self.change == "shared part first":
            q, key = torch.cat([q[..., N:], q[..., :N]], -1), torch.cat([shared, k], -1)
        elif self.change == "no shared part":
            q, key = q[..., :N], k
        else:
            key = torch.cat([k, shared], -1)
        out = F.scaled_dot_product_attention(q, key, v, is_causal=True, scale=0.3, enable_gqa=self.groups != H)
        return self.o(out.transpose(1, 2).flatten(-2))


def raised(change: str, **sizes):
    torch.manual_seed(0)
    graph = export(Latent(change, **sizes), torch.randn(2, 7, D))
    RaiseAttention().apply(graph)
    before = copied(graph)
    return before, graph, RaiseMla().apply(graph)


@pytest.mark.parametrize("change", ["", "4 dims", "written into", "shared part first"])
@pytest.mark.parametrize("groups", [H, 2])
def test_every_spelling_becomes_one_node_of_equal_values_and_gradients(change, groups):
    before, after, outcome = raised(change, groups=groups)
    assert [m.detail for m in outcome.matches] == [{"latent": L, "rope": E, "nope": N, "groups": groups}], outcome.misses
    assert len(calls(after, LATENT)) == 1 and not calls(after, SDPA)
    assert calls(after, LATENT)[0].args[4].target == "kv_b.weight"
    assert largest_error(before, after) < 1e-12
    assert largest_error(before, after, lifted=False) < 1e-5


@pytest.mark.parametrize(
    "change, reason",
    [
        ("bias", "bias"),
        ("values first", "group by group"),
        ("other heads", "group by group"),
        ("next token", "group by group"),
        ("own shared part", "from head to head"),
    ],
)
def test_near_misses_are_declined_with_the_reason(change, reason):
    before, after, outcome = raised(change)
    assert not outcome.matches and not calls(after, LATENT)
    assert reason in outcome.misses[0].reason
    assert largest_error(before, after) == 0


@pytest.mark.parametrize("change", ["own values", "no shared part"])
def test_what_is_no_latent_attention_is_left_alone(change):
    _, after, outcome = raised(change)
    assert not outcome.matches and not outcome.misses and len(calls(after, SDPA)) == 1


def test_applied_twice_it_reports_what_stands_already():
    _, graph, _ = raised("")
    again = RaiseMla().apply(graph)
    assert again.already == 1 and not again.matches


def test_our_own_latent_decoder_is_raised_and_proved():
    program = ftc.rewrite(Decoder(PRESETS["tiny-mla"]), [("raise-mla", {"expect": "all"})], example={"input_ids": torch.randint(0, 99, (2, 7))})
    entry = program._applied[-1]
    assert entry["matches"] == 2 and max(entry["max_output_error"], entry["max_gradient_error"]) < 1e-12

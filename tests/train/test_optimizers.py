"""Muon and its AdamW half against their definitions."""

import copy

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.train.optimizers import MuonAdamW, orthogonalize, parameter_groups

DTYPES = (torch.float32, torch.float64)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 100), dtype=st.sampled_from(DTYPES))
def test_orthogonalize_keeps_directions_and_evens_their_sizes(rows, columns, seed, dtype):
    size = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=dtype)).Q
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=dtype)).Q
    singular = torch.linspace(1.0, 0.2, size, dtype=dtype)
    inner = u.mT @ orthogonalize(u @ torch.diag(singular) @ v.mT) @ v
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3


@given(lr=st.floats(1e-4, 1e-1), decay=st.floats(0, 0.5), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_its_adamw_is_pytorchs(lr, decay, seed):
    torch.manual_seed(seed)
    ours = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = [
        MuonAdamW([{"params": [ours], "lr": lr, "weight_decay": decay}]),
        torch.optim.AdamW([theirs], lr=lr, weight_decay=decay, betas=(0.9, 0.95), eps=1e-8),
    ]
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    model = Decoder(preset("tiny"))
    groups = parameter_groups(model, lr=1e-3, muon_lr=2e-2, embedding_lr=5e-3, weight_decay=0.1)
    muon = {id(p) for g in groups if g["kind"] == "muon" for p in g["params"]}
    assert muon == {id(p) for p in model.layers.parameters() if p.ndim == 2}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert [g["lr"] for g in groups if any(p is model.embed_tokens.weight for p in g["params"])] == [5e-3]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_restored_state_continues_with_the_same_bits(kind):
    def fresh(weight):
        parameter = nn.Parameter(weight.clone())
        return parameter, MuonAdamW([{"params": [parameter], "kind": kind, "lr": 0.1, "weight_decay": 0.1}])

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(6)]
    straight, optimizer = fresh(torch.ones(4, 6))
    for step, gradient in enumerate(gradients):
        if step == 3:
            resumed, other = fresh(straight.detach())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        straight.grad = gradient
        optimizer.step()
        if step >= 3:
            resumed.grad = gradient
            other.step()
    assert torch.equal(straight, resumed)

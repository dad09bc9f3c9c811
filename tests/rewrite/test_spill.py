"""Gradients kept in a file have the bits of those kept in memory."""

import pytest
import torch

from ftc.rewrite import spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_in_parts_have_the_same_bits(monkeypatch, dtype):
    leaves = {
        name: torch.randn(size, dtype=dtype).requires_grad_() for name, size in (("a", (3, 4)), ("b", (4,)), ("c", ()))
    }
    unused = torch.randn(0, 2, dtype=dtype, requires_grad=True)

    def total():
        return ((leaves["a"] @ leaves["b"]).sin() * leaves["c"]).sum()

    expected = spill.gradients(total(), leaves | {"unused": unused})
    monkeypatch.setattr(spill, "LARGE_BYTES", 0)
    monkeypatch.setattr(spill, "PART_BYTES", 1)
    found = spill.gradients(total(), leaves | {"unused": unused})
    assert isinstance(found, spill.Spilled) and list(found) == list(expected) and len(found) == 4
    for name in expected:
        assert torch.equal(found[name], expected[name]) and found[name].dtype == dtype

"""raise-rope: rotary embedding in any spelling is ftc.rope of the right width and pairing; other mixtures stay."""

import pytest
import torch
from blocks import B, H, K, T, calls, copied, export, largest_error
from ftc.passes.raise_rope import ROPE, RaiseRope
from torch import nn

from ftc.rewrite.residue import residue


class Rotary(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.mix, self.spelling = nn.Linear(K, K), spelling

    def forward(self, x, *tables):
        return self.spelling(self.mix(x), *tables)


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def rotate_half(x):
    first, second = halves(x)
    return torch.cat((-second, first), -1)


def library(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def by_halves(x, cos, sin):
    (a, b), (c, _), (s, _) = halves(x), halves(cos), halves(sin)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def stacked_pairs(x, cos, sin):
    (c, _), (s, _) = halves(cos), halves(sin)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


def complex_pairs(x, cos, sin):
    (c, _), (s, _) = halves(cos), halves(sin)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.complex(c.contiguous(), s.contiguous())
    return torch.view_as_real(turned).flatten(-2)


def part(x, cos, sin):
    cos, sin = cos[..., :4], sin[..., :4]
    return torch.cat((library(x[..., :4], cos, sin), x[..., 4:]), -1)


def split_pairs_first(x, cos, sin):
    batch, heads, length, width = x.shape
    x = x.view(batch, heads, length, width // 2, 2).transpose(4, 3).reshape(batch, heads, length, width)
    return library(x, cos, sin)


def signs_in_a_vector(x, cos, sin):
    signs = torch.cat((-torch.ones(K // 2), torch.ones(K // 2)))
    return x * cos + torch.roll(x, K // 2, -1) * signs * sin


SPELLINGS = [
    (library, K, False), (by_halves, K, False), (stacked_pairs, K, True), (complex_pairs, K, True), (part, 4, False),
    (split_pairs_first, K, False), (signs_in_a_vector, K, False),
]  # fmt: skip


def tables():
    return torch.randn(T, K), torch.randn(T, K)


@pytest.mark.parametrize(("spelling", "width", "interleaved"), SPELLINGS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_a_rotation_is_recognised(spelling, width, interleaved):
    graph = export(Rotary(spelling), torch.randn(B, H, T, K), *tables())
    before = copied(graph)
    outcome = RaiseRope().apply(graph)
    (call,) = calls(graph, ROPE)
    assert len(outcome.matches) == 1 and not outcome.misses and not residue(graph)
    assert call.args[1].meta["val"].shape[-1] == width and call.args[3] is interleaved
    assert largest_error(before, graph) <= 1e-12 and largest_error(before, graph, lifted=False) <= 1e-5


def test_the_inverse_rotation_is_a_rotation_with_a_negated_sine():
    graph = export(Rotary(lambda x, c, s: x * c - rotate_half(x) * s), torch.randn(B, H, T, K), *tables())
    before = copied(graph)
    RaiseRope().apply(graph)
    (call,) = calls(graph, ROPE)
    assert call.args[2].target is torch.ops.aten.neg.default and largest_error(before, graph) <= 1e-12


def without_sign(x, cos, sin):
    first, second = halves(x)
    return x * cos + torch.cat((second, first), -1) * sin


def scaled(x, cos, sin):
    return x * cos + 1.1 * rotate_half(x) * sin


def quarter_pairs(x, cos, sin):
    return x * cos + torch.roll(x, 1, -1) * sin


@pytest.mark.parametrize("spelling", [without_sign, scaled, quarter_pairs], ids=lambda f: f.__name__)
def test_other_mixtures_are_declined_and_named(spelling):
    graph = export(Rotary(spelling), torch.randn(B, H, T, K), *tables())
    before = copied(graph)
    outcome = RaiseRope().apply(graph)
    if not calls(graph, ROPE):
        assert outcome.misses and "rope" in [left.kind for left in residue(graph)]
    assert largest_error(before, graph) <= 1e-12

"""How a mixture's experts may be kept, and the results of each expert on given values: the hypotheses of `raise-moe`.

Legend: N tokens, K experts a token, D model, F an expert's middle, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, fx

from ftc.dialect.gated import ACTIVATIONS
from ftc.dialect.moe import CLAMPED, middle
from ftc.rewrite.expert_families import Family
from ftc.rewrite.lens_experts import Experts
from ftc.rewrite.outcome import Declined


@dataclass(frozen=True)
class Layout:
    """Which families are the experts' input matrices (one fused, or gate and up), which the output matrix and the biases, and how they lie."""

    up: tuple[Family, ...]
    down: Family
    up_bias: tuple[Family, ...]
    down_bias: Family | None
    gated: bool
    transposed: bool
    interleaved: bool
    down_transposed: bool

    def lenses(self, num_experts: int, names: dict[str, str]) -> dict[str, Experts | None]:
        """How each canonical parameter comes of the original ones; None where it is one of them as it stands. `names`: targets by role."""
        found: dict[str, Experts | None] = {}
        for role, families, transposed, interleaved in (
            ("gate_up", self.up, self.transposed, self.interleaved),
            ("down", (self.down,), self.down_transposed, False),
            ("gate_up_bias", self.up_bias, False, self.interleaved),
            ("down_bias", (self.down_bias,) if self.down_bias else (), False, False),
        ):
            if families:
                rows = tuple(family.shape[-1 if transposed or len(family.shape) == 1 else 0] for family in families)
                sources = tuple(name for family in families for name in family.names)
                same = len(sources) == 1 and num_experts > 1 and not transposed and not interleaved
                found[role] = None if same else Experts(sources, names[role], num_experts, rows, transposed, interleaved)
        return found

    def stacked(self, values: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(gate_up, down, gate_up_bias, down_bias) in canonical layout, of values of the families' parameters."""

        def canonical(families: tuple[Family, ...], transposed: bool, interleaved: bool) -> Tensor | None:
            parts = [family.value(values) for family in families]
            parts = [part.mT if transposed else part for part in parts]
            if interleaved:
                parts = [torch.cat([part[:, 0::2], part[:, 1::2]], 1) for part in parts]
            return torch.cat(parts, 1) if parts else None

        down_bias = (self.down_bias,) if self.down_bias else ()
        return (
            canonical(self.up, self.transposed, self.interleaved),
            canonical((self.down,), self.down_transposed, False),
            canonical(self.up_bias, False, self.interleaved),
            canonical(down_bias, False, False),
        )


def layouts(found: list[Family], width: int) -> Iterator[Layout]:
    """Every way in which these families may be experts of model width `width`, the likely ones first. Raises Declined where there is none."""
    matrices = [family for family in found if len(family.shape) == 2]
    vectors = [family for family in found if len(family.shape) == 1]
    if len(matrices) not in (2, 3) or len(vectors) > len(matrices) or len(matrices) + len(vectors) != len(found):
        node = found[-1].nodes[0]
        raise Declined(f"each expert has {len(matrices)} matrices and {len(vectors)} vectors; two or three matrices, with or without biases, are known", node)
    any_fits = False
    for up, down in _roles(matrices):
        for transposed, middle_rows in _as_rows(up, width):
            for down_transposed, down_rows in _as_rows((down,), None):
                inner = down.shape[0 if down_transposed else 1]
                if down_rows != width or middle_rows not in (inner, 2 * inner):
                    continue
                gated = middle_rows == 2 * inner
                if len(up) == 2 and not gated:
                    continue
                for up_bias, down_bias in _biases(vectors, [family.shape[-1 if transposed else 0] for family in up], width):
                    any_fits = True
                    for interleaved in (False, True) if gated and len(up) == 1 else (False,):
                        yield Layout(up, down, up_bias, down_bias, gated, transposed, interleaved, down_transposed)
    if not any_fits:
        shapes = ", ".join(f"{family.nodes[0].target} {list(family.shape)}" for family in found)
        raise Declined(f"the matrices of an expert do not fit a model width of {width}: {shapes}", found[0].nodes[0])


def _roles(matrices: list[Family]) -> Iterator[tuple[tuple[Family, ...], Family]]:
    """(input matrices, output matrix): the output matrix is mostly the last that is used; gate and up may stand in either order."""
    for place in reversed(range(len(matrices))):
        rest = tuple(matrices[:place] + matrices[place + 1 :])
        yield rest, matrices[place]
        if len(rest) == 2:
            yield rest[::-1], matrices[place]


def _as_rows(families: tuple[Family, ...], columns: int | None) -> Iterator[tuple[bool, int]]:
    """(transposed, rows) of matrices put one under the other, as [rows, columns] first."""
    for transposed in (False, True):
        shapes = [family.shape[::-1] if transposed else family.shape for family in families]
        if columns is None or all(shape[1] == columns for shape in shapes):
            yield transposed, sum(shape[0] for shape in shapes)


def _biases(vectors: list[Family], rows: list[int], width: int) -> Iterator[tuple[tuple[Family, ...], Family | None]]:
    """How vectors may be the biases of products with so many rows, and of one with `width`."""
    if not vectors:
        yield (), None
    elif len(vectors) == 1 and vectors[0].shape[0] == width:
        yield (), vectors[0]
    if len(vectors) == len(rows) and all(vector.shape[0] == size for vector, size in zip(vectors, rows, strict=True)):
        yield tuple(vectors), None
    if len(vectors) == len(rows) + 1:
        for order in permutations(vectors):
            fits = all(vector.shape[0] == size for vector, size in zip(order, [*rows, width], strict=True))
            if fits:
                yield tuple(order[:-1]), order[-1]


def curves(gated: bool, numbers: list[float]) -> Iterator[tuple[str, list[float]]]:
    """(activation, constants) that experts may have; `numbers`: the numbers in their code, where a clamped gate has its two from."""
    for name in ACTIVATIONS:
        if gated or name != "identity":
            yield name, []
    if gated:
        positive = sorted({abs(number) for number in numbers if number and abs(number) != 1.0})[:6]
        for alpha in [*positive, 1.0]:
            for limit in positive:
                if limit != alpha:
                    yield CLAMPED, [alpha, limit]


def slot_results(
    x: Tensor, indices: Tensor, parameters: tuple[Tensor | None, ...], gated: bool, activation: str, constants: list[float], weights: Tensor | None
) -> Tensor:
    """[N, K, D]: what each chosen expert makes of each token, before weighing; with `weights`, of the weighed token."""
    gate_up, down, gate_up_bias, down_bias = parameters
    out = x.new_zeros(*indices.shape, x.shape[1])
    for expert in range(down.shape[0]):
        token, slot = torch.where(indices == expert)
        rows = x[token] if weights is None else x[token] * weights[token, slot, None]
        rows = torch.nn.functional.linear(rows, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        rows = middle(rows, gated, activation, constants)
        out[token, slot] = torch.nn.functional.linear(rows, down[expert], None if down_bias is None else down_bias[expert])
    return out

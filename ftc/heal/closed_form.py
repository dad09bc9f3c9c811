"""The product after each converted attention, fitted to what the original's attention gave: least squares on calibration text.

    min over W, b of  sum_t |W o_t + b - y_t|^2 + ridge * trace(O) / n * |W - W_0|^2

o_t [n] what the converted attention hands to its output product, O = sum o o^T, y_t what the original's product gave for the same token. Layer by layer from
the first, each on what the layers before it now compute, so that later layers also take back what earlier ones could not. Least squares counts all errors
alike and the model's answer does not, so a layer keeps its fit only where KL(original || converted) on sequences apart is smaller for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ftc.capture.program import Program, capture
from ftc.errors import FtcError
from ftc.rewrite.attention_site import LINEAR, latent_nodes, output_product
from ftc.rewrite.calibration import Batches, held_out, kl_divergence
from ftc.rewrite.edit import linear_operands
from ftc.rewrite.observe import no_trained_parameters, observing

RIDGE = 1e-3


def fit_outputs(
    original: nn.Module, converted: Program, batches: Batches, ridge: float = RIDGE, tell: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """Fit the output product of every latent attention of `converted`, in place; returns a row for each: weight, KL before and after, whether it was kept.

    Raises FtcError where the original has no product of the same name, or nothing is latent.
    """
    original = original if isinstance(original, Program) else capture(original, batches[0])
    batches, apart = held_out(batches)
    rows, loss = [], kl_divergence(original, converted, apart)
    for region in converted.regions:
        names = _products(region)
        if not names:
            continue
        tell(f"fitting {region.name}")
        inputs = _observed(converted, region.name, lambda v, n=names[0]: [_product(v.captured.graph, n).args[0].name], batches)
        wanted = _observed(original, region.name, lambda v, n=names[0]: [_product(v.captured.graph, n).name], batches)
        weight = region.fetch(names[0])
        bias = region.fetch(names[1]) if names[1] else None
        before = [t.detach().clone() for t in (weight, bias) if t is not None]
        _fit(weight, bias, inputs, wanted, ridge)
        fitted = kl_divergence(original, converted, apart)
        rows.append({"weight": f"{region.name}.{names[0]}", "before": loss, "after": fitted, "kept": fitted < loss})
        if fitted < loss:
            loss = fitted
            continue
        with torch.no_grad():
            for tensor, value in zip([t for t in (weight, bias) if t is not None], before, strict=True):
                tensor.copy_(value)
    if not rows:
        raise FtcError("the model has no latent attention with a product after it, so there is nothing to fit")
    return rows


def _products(region) -> tuple[str, str | None] | None:
    """The weight and bias of the product after a region's latent attention."""
    for node in latent_nodes(region.code):
        product = output_product(node)
        if product is not None:
            _, weight, bias = linear_operands(product)
            return str(weight.target), None if bias is None else str(bias.target)
    return None


def _product(graph: fx.Graph, weight: str) -> fx.Node:
    for node in graph.nodes:
        if node.target is LINEAR and getattr(node.args[1], "target", None) == weight:
            return node
    raise FtcError(f"the original has no product with the weight {weight}, which the converted model has")


def _observed(program: Program, region: str, names, batches: Batches) -> Tensor:
    """What a node computed for all tokens [N, n], float64."""
    rows: list[Tensor] = []
    with torch.no_grad(), no_trained_parameters(program):
        with observing(program, {region: names}, lambda _, values: rows.append(values[0].flatten(0, -2).double())):
            for batch in batches:
                program(**batch)
    return torch.cat(rows)


@torch.no_grad()
def _fit(weight: Tensor, bias: Tensor | None, inputs: Tensor, wanted: Tensor, ridge: float) -> None:
    start = weight.double()
    missing = wanted - inputs @ start.mT
    mean_in, mean_out = (x.mean(0) if bias is not None else torch.zeros_like(x[0]) for x in (inputs, missing))
    centred, missing = inputs - mean_in, missing - mean_out
    gram = centred.mT @ centred
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    step = torch.linalg.solve(gram, centred.mT @ missing).mT
    weight.copy_((start + step).to(weight.dtype))
    if bias is not None:
        bias.copy_((mean_out - step @ mean_in).to(bias.dtype))

"""Whether a graph in which a choice was taken as hitting everything computes what the model's own code does, on few tokens that hit little."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ftc.capture.captured import compile_graph
from ftc.capture.masks import CausalMask
from ftc.capture.skeleton import state_restored
from ftc.capture.variants import Call
from ftc.errors import FtcError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # sums in another order; 16-bit floats 0.05


def check_hits(code, region, captured, call) -> None:
    """Run the model's own code and the graph on one random call and compare; FtcError where they differ.

    Nothing is checked where there are no values yet (the meta device), or where parameters no longer have the form that the code expects."""
    attributes = dict(region.named_attributes())
    if code.lenses or any(t.device.type == "meta" for t in attributes.values()):
        return
    generator = torch.Generator().manual_seed(0)
    inputs = [_like(t, generator) for t in call.tensors]
    run, names, _ = compile_graph(captured.graph, captured.constants, "checked")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = {**attributes, **captured.constants}
        found = run(region, *(values[name] for name in names), *inputs)
        torch.manual_seed(0)
        with state_restored(code.module), torch.nn.utils.stateless._reparametrize_module(code.module, attributes):
            leaves = tuple(leaf.tensor(inputs) if isinstance(leaf, CausalMask) else leaf for leaf in call.leaves)
            args, kwargs = Call(inputs, leaves, call.spec).fill(inputs)
            expected = [leaf for leaf in tree_leaves(code.module(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for one, other in zip(found, expected, strict=True):
        if not one.is_floating_point():
            continue
        error = float((one - other).abs().max()) / max(float(other.abs().max()), 1e-30) if other.numel() else 0.0
        if not error <= TOLERANCE.get(one.dtype, 0.05):
            raise FtcError(
                f"{region.ftc_name} goes through the hits of a choice only, and going through all of them gives something else (by {error:.1e}): "
                "what its loop does where nothing is hit must leave the result as it is"
            )


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    shape = [int(size) for size in tensor.shape]
    if tensor.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(tensor.dtype)
    if tensor.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.arange(shape[-1] if shape else 1).expand(shape or [1]).reshape(shape).to(tensor.dtype).clone()

"""The proof of a quantised graph: it is what its formats make of the graph before, and computes what that does with dequantised weights.

Random weights are rounded to nearest in the formats that the rewritten graph names. The graph before, with those weights dequantised, and the rewritten graph
without the rounding of activations must then agree in real arithmetic: outputs, and gradients of inputs and of every parameter that stays.
"""

from __future__ import annotations

import torch
from torch import fx

from ftc.capture.captured import tidy
from ftc.errors import FtcFailure
from ftc.quantize.formats import Format
from ftc.quantize.lens import target_names
from ftc.quantize.sites import QUANTIZED, QUANTIZED_LINEAR, QUANTIZED_MOE, Choice, convert, find_sites
from ftc.rewrite import certificate, probe
from ftc.rewrite.graph_json import graph_hash

GIVE_UP = "pass quantize: the rewritten graph is not what its formats make of the graph before"


def prove(before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
    """Trials as a certificate holds them; those of `earlier` once more where they are given. FtcFailure where the graph is another."""
    from ftc.rewrite.opened import has_calls, open_calls
    from ftc.rewrite.pipeline import copy_graph

    before, after = (open_calls(graph)[0] if has_calls(graph) else graph for graph in (before, after))
    formats = read_formats(before, after)
    again = copy_graph(before)
    convert(again, Choice(lambda kind, name, shape: formats.get(name)))
    tidy(again, keep_random=False)
    if graph_hash(again) != graph_hash(after):
        raise FtcFailure(GIVE_UP)
    plain = _weights_only(copy_graph(after))
    if earlier is None:
        trials = _new_trials(before)
    else:
        trials = [{k: t[k] for k in ("seed", "sizes", "dtype", "lifted")} for t in earlier]
    for trial in trials:
        _run(before, plain, formats, trial)
    return trials


def read_formats(before: fx.Graph, after: fx.Graph) -> dict[str, Format]:
    """The formats by weight that turned one graph into the other, read off the operators and shapes of what they read."""
    attributes = {str(node.target): node for node in after.nodes if node.op == "get_attr"}
    rounded = {}
    for node in after.nodes:
        if node.op == "call_function" and node.target in QUANTIZED:
            activations = node.args[9] if node.target is QUANTIZED_LINEAR and len(node.args) > 9 else node.args[15] if node.target is QUANTIZED_MOE and len(node.args) > 15 else "none"
            dtype = next(arg for arg in node.args if isinstance(arg, str))
            rounded |= {str(arg.target): (dtype, activations) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"}
    found = {}
    for site in find_sites(before)[0]:
        for at, name in enumerate(site.names):
            if f"{name}_data" in attributes:
                found[name] = _format_of(site.shape(at), attributes, name, *rounded[f"{name}_data"])
    return found


def _format_of(shape: list[int], attributes: dict[str, fx.Node], name: str, dtype: str, activations: str) -> Format:
    scales = [int(s) for s in attributes[f"{name}_scale"].meta["val"].shape]
    zero = f"{name}_zero" in attributes
    for granularity in ("row", "tensor", "block"):
        if dtype != "int4" and not zero and Format(dtype, granularity).scale_shape(shape) == scales and _same_block(attributes, name, Format(dtype, granularity), shape):
            return Format(dtype, granularity, activations=activations)
    data = attributes[f"{name}_data"]
    group = _block(data)[1]
    return Format(dtype, "group", int(group), zero)


def _block(data: fx.Node) -> list[int]:
    """The block that the reader of a quantised weight names."""
    node = next(iter(data.users))
    lists = [arg for arg in node.args if isinstance(arg, (list, tuple)) and len(arg) == 2]
    return list(lists[1 if node.target is QUANTIZED_MOE and data is node.args[6] else 0])


def _same_block(attributes: dict[str, fx.Node], name: str, format: Format, shape: list[int]) -> bool:
    return _block(attributes[f"{name}_data"]) == format.block(shape)


def _weights_only(graph: fx.Graph) -> fx.Graph:
    """The graph, in place, without the rounding of activations."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is QUANTIZED_LINEAR:
            node.args = (*node.args[:5], None, *node.args[6:9], "none")
        if node.op == "call_function" and node.target is QUANTIZED_MOE:
            node.args = (*node.args[:15], "none")
    tidy(graph, keep_random=False)
    return graph


def _new_trials(before: fx.Graph) -> list[dict]:
    trials, own = [], certificate.model_dtype(before)
    for number, size in enumerate(probe.symbol_sizes(before)):
        values = certificate.ordered_sizes(before, size)
        trials.append({"seed": number, "sizes": values, "dtype": "float64", "lifted": True})
        if number == 0 and own != torch.float64:
            trials.append({"seed": number, "sizes": values, "dtype": str(own).removeprefix("torch."), "lifted": False})
    return trials


def _run(before: fx.Graph, after: fx.Graph, formats: dict[str, Format], trial: dict) -> None:
    """Measure one trial; writes errors and bound into it."""
    lifted, seed, dtype = trial["lifted"], trial["seed"], getattr(torch, trial["dtype"])
    sizes = dict(zip(certificate.symbols_in_order(before), trial["sizes"], strict=True))
    kind = torch.float64 if lifted else None
    inputs, parameters = probe.random_inputs(before, sizes, seed, kind), probe.random_parameters(before, seed, dtype=kind)
    quantised = dict(parameters)
    for name, format in formats.items():
        weight = quantised.pop(name)
        stored = format.nearest(weight)
        parameters[name] = format.decode(stored, weight.shape[-1], weight.dtype)
        quantised |= dict(zip(target_names(name, format), (t for t in (stored.data, stored.scale, stored.zero) if t is not None), strict=True))
    keep = range(len(next(n for n in before.nodes if n.op == "output").args[0]))
    reference, expected = certificate._evaluate(before, inputs, parameters, seed, lifted, keep)
    out, grads = certificate._evaluate(after, inputs, quantised, seed, lifted, keep)
    expected = {name: value for name, value in expected.items() if name not in formats}
    trial["output_error"], trial["gradient_error"] = certificate._errors(out, reference, grads, expected)
    bound = trial["bound"] = certificate.BOUNDS.get(dtype, 0.0)
    if lifted or max(trial["output_error"], trial["gradient_error"]) <= bound:
        return
    wide = {name: value.double() if value.is_floating_point() else value for name, value in parameters.items()}
    wide_inputs = [i.double() if i.is_floating_point() else i for i in inputs]
    true, true_grad = certificate._evaluate(before, wide_inputs, wide, seed, True, keep)
    true_grad = {name: value for name, value in true_grad.items() if name not in formats}
    own = max(certificate._errors(reference, true, expected, true_grad))
    trial["output_error"], trial["gradient_error"] = certificate._errors(out, true, grads, true_grad)
    trial["own_rounding"] = own
    trial["bound"] = max(2 * max(own, 0.0 if bound else certificate._LOW_PRECISION_FLOOR), bound)

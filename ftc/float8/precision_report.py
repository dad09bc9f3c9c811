"""`ftc explain --precision`: every product of a program with its formats, and what float8 does to its operands on calibration text.

A product that runs in float8 is looked at as it runs; one that does not, as recipe `recipe` would run it, so that the report also answers what the pass would
do. Weights stored in 8 or 4 bits (`quantize`) are looked at as they are stored. Gradients are those of the next-token loss on the text.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ftc.capture.program import Program
from ftc.errors import FtcError
from ftc.evaluate import logits_of
from ftc.float8 import prologue
from ftc.float8.operand_stats import OperandStats, empty, look, operand_casts
from ftc.float8.place import LINEAR, LINEARS, is_float8
from ftc.float8.recipes import NAMES
from ftc.float8.sites import find_sites
from ftc.rewrite.calibration import as_batches, pieces
from ftc.rewrite.observe import _with_values


@dataclass(frozen=True)
class Product:
    """One product of a graph: the nodes whose values are looked at, and how it runs. `recipe`: of its float8, or None."""

    weight: str
    role: str
    inputs: tuple[str, ...]
    result: str
    recipe: str | None
    form: str = "linear"
    prologue: tuple = ("", ())
    stored: tuple[str, str] | None = None  # parameters of data and scale, where the weight is stored so
    about: str = ""


@dataclass
class PrecisionReport:
    """Made by `precision_report`; `str()` is for people, `as_dict()` is JSON-ready."""

    data: dict

    def as_dict(self) -> dict:
        return self.data

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.data['model']}: {len(self.data['products'])} products on {self.data['tokens']:,} tokens")
        for column in ("region", "product", "runs in", "operand", "format", "scaling", "scales", "saturated", "underflow", "error"):
            table.add_column(column, justify="right" if column in ("scales", "saturated", "underflow", "error") else "left")
        for row in self.data["products"]:
            first = (row["region"], f"{row['weight']} {row['shape']}", row["runs_in"])
            for name, s in row["operands"].items() or {"": None}.items():
                cells = () if s is None else (name, s["format"], s["scaling"], f"{s['scale_lowest']:.3g} to {s['scale_highest']:.3g}", f"{s['saturated']:.2%}", f"{s['underflow']:.2%}", _error(s))
                table.add_row(*first, *cells)
                first = ("", "", "")
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        for row in self.data["products"]:
            if row["note"]:
                console.print(f"{row['region']} {row['weight']}: {row['note']}", soft_wrap=True, highlight=False)
        return console.file.getvalue()


def _error(stats: dict) -> str:
    return "-" if stats["error"] is None else f"{stats['error']:.2%}"


def precision_report(model, calibration, *, recipe: str = "rowwise", tokenizer=None, example=None) -> PrecisionReport:
    """Run the calibration text through a model or program, forward and backward, and look at the operands of every product. Changes nothing.

    `calibration` as for `ftc.rewrite`; `recipe`: how products that do not run in float8 would. FtcError for a recipe that there is not, text that holds
    too little, and operands that are not finite.
    """
    from ftc.capture.program import capture

    if recipe not in NAMES:
        raise FtcError(f"there is no float8 recipe {recipe!r}; use one of {', '.join(NAMES)}")
    batches = as_batches(calibration, tokenizer, "the precision report")
    program = model.fork() if isinstance(model, Program) else capture(model, example or batches[0])
    found: dict[tuple[str, str], dict] = {}
    with _watched(program, found, recipe):
        for batch in pieces(program, batches):
            _run(program, batch, found, recipe)
    rows = [_row(*key, entry, recipe) for key, entry in found.items()]
    return PrecisionReport({"model": program.kind, "recipe": recipe, "tokens": sum(b["input_ids"].numel() for b in batches), "products": rows})


@contextlib.contextmanager
def _watched(program: Program, found: dict, recipe: str) -> Iterator[None]:
    """Within it every region looks at its products as it runs."""
    functions: dict = {}

    def around(region):
        def run(_, args, kwargs):
            variant, tensors = region.code.find(region, args, kwargs)
            return _observed(functions, region, region.name, variant, tensors, found, recipe)

        return run

    training = program.training
    try:
        for region in program.regions:
            region.around = around(region)
        program.eval()
        program.__dict__["_precision_functions"] = functions
        yield
    finally:
        for region in program.regions:
            region.around = None
        program.__dict__.pop("_precision_functions")
        program.train(training)


def _run(program: Program, batch: dict, found: dict, recipe: str) -> None:
    """One batch, forward and backward; gradients of parameters are left as they were."""
    variant, tensors = program.code.find(program, (), program.bind((), {"input_ids": batch["input_ids"]}))
    with torch.enable_grad():
        out = _observed(program.__dict__["_precision_functions"], program, "shell", variant, tensors, found, recipe)
        logits = logits_of(out)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())
        trained = [p for p in program.parameters() if p.requires_grad]
        if trained and loss.requires_grad:
            torch.autograd.grad(loss, trained, allow_unused=True)  # the gradients of results are seen by hooks on the way


def _observed(functions: dict, host, name: str, variant, tensors: Sequence[Tensor], found: dict, recipe: str):
    """Run a variant, looking at its products; what the model or region returns."""
    place = name, id(variant)
    if place not in functions:
        products = products_of(variant.captured.graph)
        nodes = list(dict.fromkeys(n for p in products for n in (*p.inputs, p.result)))
        functions[place] = (*_with_values(variant, nodes), products, nodes, variant)
    function, attributes, count, products, nodes, _ = functions[place]
    results = function(host, *variant.attribute_values(attributes, host.fetch, tensors), *tensors)
    values = dict(zip(nodes, results[count:], strict=True))
    for product in products:
        entry = found.setdefault((name, product.weight), {"product": product, "operands": {}, "shape": [], "note": ""})
        _look_at(entry, product, host, [values[n] for n in product.inputs], values[product.result], recipe, f"{name} {product.weight}")
    return variant.structured(results[:count])


def _look_at(entry: dict, product: Product, host, inputs: list[Tensor], result: Tensor, recipe: str, where: str) -> None:
    if product.stored is not None:
        _look_at_stored(entry, product, host)
        return
    weight = host.fetch(product.weight).detach()
    entry["shape"] = list(weight.shape)
    entry["dtype"] = str(inputs[0].dtype).removeprefix("torch.")
    casts = operand_casts(product.recipe or recipe)
    with torch.no_grad():
        x = prologue.apply(product.prologue[0], inputs, product.prologue[1]).detach()
    if product.form == "experts":
        entry["note"] = "rows of x before they are sorted by expert; weights of all experts together; what is between the two products is not seen"
    for operand, cast in casts.items():
        stats = entry["operands"].setdefault(operand, empty(cast))
        if operand.startswith("x"):
            look(stats, x.reshape(-1, x.shape[-1]), cast, f"the input of {where}")
        elif operand.startswith("weight") and not stats.count:
            for matrix in weight if weight.dim() == 3 else [weight.t() if product.form == "transposed" else weight]:
                look(stats, matrix, cast, f"weight {where}")
    gradients = [(n, c) for n, c in casts.items() if n.startswith("gradient")]
    if isinstance(result, Tensor) and result.requires_grad:
        result.register_hook(lambda g: [look(entry["operands"][n], g.reshape(-1, g.shape[-1]), c, f"the gradient of {where}") for n, c in gradients] and None)


def _look_at_stored(entry: dict, product: Product, host) -> None:
    """A weight of 8 or 4 bits as it is stored: shares of its codes at the format's ends, and at zero."""
    data, scale = (host.fetch(name).detach() for name in product.stored)
    entry["shape"], entry["dtype"], entry["note"] = list(data.shape), product.about, "weights as they are stored: shares are of all codes"
    if entry["operands"]:
        return
    stats = OperandStats(product.about.split()[0], "as stored", float((1 / scale.float()).min()), float((1 / scale.float()).max()))
    codes = data.float() if data.is_floating_point() else data
    if data.dtype == torch.uint8:
        codes = torch.stack([data & 15, data >> 4])
        ends, zero = (codes == 7) | (codes == 8), codes == 0  # 7 and -8 in two's complement
    else:
        largest = 448.0 if data.is_floating_point() else 127
        ends, zero = codes.abs() >= largest, codes == 0
    stats.saturated, stats.underflow, stats.count = int(ends.sum()), int(zero.sum()), codes.numel()
    stats.amax = float(scale.float().max()) * (448.0 if data.is_floating_point() else 8.0 if data.dtype == torch.uint8 else 127.0)
    entry["operands"]["weight"] = stats


def products_of(graph: fx.Graph) -> list[Product]:
    """Every product of activations and weights in a graph, in float8, quantised or in high precision, in its order."""
    found = {site.node: _plain(site) for site in find_sites(graph)}
    for node in graph.nodes:
        if node.op == "call_function" and is_float8(node):
            found[node] = _of_float8(node)
        elif str(node.target) == "ftc.quantized_linear.default":
            data, scale = (str(n.target) for n in node.args[1:3])
            found[node] = [Product(data, "product", (), node.name, None, stored=(data, scale), about=f"{node.args[6]} weights, activations {(*node.args, 'none')[9]}")]
    return [product for node in graph.nodes for product in found.get(node, [])]


def _plain(site) -> list[Product]:
    form = "experts" if site.experts else "linear" if site.stored == "FD" else "transposed"
    weight = str(site.node.args[3].target) if site.experts else site.name
    return [Product(weight, site.role, (site.x.name,), site.node.name, None, form)]


def _of_float8(node: fx.Node) -> list[Product]:
    schema = [a.name for a in node.target._schema.arguments]
    given = {a.name: a.default_value for a in node.target._schema.arguments} | dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
    if node.target is LINEARS:
        before = (given["prologue"], tuple(given["constants"]))
        parts = {user.args[1]: user.name for user in node.users}
        return [
            Product(str(w.target), "product", tuple(n.name for n in given["inputs"]), parts.get(i, given["inputs"][0].name), given["recipe"], "linear", before)
            for i, w in enumerate(given["weights"])
        ]
    if node.target is LINEAR:
        weight, form = given["weight"], "linear"
        if weight.op != "get_attr":
            weight, form = weight.args[0], "transposed"
        return [Product(str(weight.target), "product", (given["x"].name,), node.name, given["recipe"], form)]
    return [Product(str(given["gate_up"].target), "experts", (given["x"].name,), node.name, given["recipe"], "experts")]


def _row(region: str, weight: str, entry: dict, recipe: str) -> dict:
    product = entry["product"]
    operands = {name: stats.as_dict() for name, stats in entry["operands"].items() if stats.count}
    if product.stored is not None:
        for stats in operands.values():
            stats["error"] = None
    runs_in = f"float8 {product.recipe}" if product.recipe else entry["dtype"] + ("" if product.stored else f" (as {recipe})")
    return {"region": region, "weight": weight, "role": product.role, "shape": entry["shape"], "runs_in": runs_in, "note": entry["note"], "operands": operands}



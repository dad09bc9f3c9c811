"""Linear forms: a tensor as signed sums of source elements times table elements, element by element.

Rotary embedding is linear in the activations. Run symbolically, element j of the result is a list of terms (which source element, with which
table element, with which sign), whatever chunks, stacks, negations and complex products it is spelled with:

    y[j] = + x[j] cos[j] - x[j + R/2] sin[j]

Source and table elements are numbered from 1; 0 is "none", and a negative number is the negated element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.movement import CASTS, MOVES, apply, cone, index_maps, sources
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import Analysis, Trial

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
COMPLEX = {aten.view_as_complex.default, aten.view_as_real.default, aten.complex.default}
LINEAR = MULTIPLY | DIVIDE | SUMS | COMPLEX | MOVES | CASTS | {aten.neg.default, aten.addcmul.default, aten.select.int}
MAX_TERMS = 8
PARTS = ("source", "table", "factor")


@dataclass
class Term:
    """For each element one source element (negative: negated), the table element that multiplies it (0: none), and a number that does."""

    source: Tensor
    table: Tensor
    factor: Tensor

    def moved(self, function) -> "Term":
        return Term(function(self.source), function(self.table), function(self.factor))

    def negated(self) -> "Term":
        return Term(-self.source, self.table, self.factor)


Form = list[Term]


@dataclass
class ComplexForm:
    """A complex tensor as the forms of its real and imaginary part."""

    real: Form
    imag: Form


class NotLinear(Exception):
    """The node is no linear form of the source."""


class Tables:
    """The table elements of one trial, numbered through the roots of all tables; a complex root counts its real parts, then its imaginary ones."""

    def __init__(self, analysis: Analysis, trial: Trial):
        self.analysis, self.trial = analysis, trial
        self.offsets: dict[fx.Node, int] = {}
        self.next = 1
        self.used: list[fx.Node] = []

    def numbers(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """(numbers of the elements of a table, of its imaginary parts where it is complex)."""
        above = cone(self.analysis, node, signs=True)
        maps = index_maps(self.analysis, above, self.trial)
        real, starts = maps[node], 1
        number, imag = torch.zeros_like(real), torch.zeros_like(real)
        for root in above.roots:
            count = torch.Size(maps[root].shape).numel()
            if root not in self.offsets:
                self.offsets[root] = self.next
                self.next += 2 * count
            inside = (real.abs() >= starts) & (real.abs() < starts + count)
            shifted = real.abs() - starts + self.offsets[root]
            number = torch.where(inside, shifted * real.sign(), number)
            imag = torch.where(inside, (shifted + count) * real.sign(), imag)
            starts += count
        if node not in self.used:
            self.used.append(node)
        return number, imag if node.meta["val"].is_complex() else None


def _plain(source: Tensor) -> Term:
    return Term(source, torch.zeros_like(source), torch.ones(source.shape, dtype=torch.float64))


def linear_form(analysis: Analysis, result: fx.Node, source: fx.Node, tables: Tables) -> Form:
    """The form of `result` in the elements of `source`. Raises NotLinear where it depends on anything else or in another way."""
    trial = tables.trial
    shape = [probe.concrete(size, trial.sizes) for size in source.meta["val"].shape]
    count = torch.Size(shape).numel()
    first = torch.arange(1, count + 1).view(shape)
    forms: dict[fx.Node, object] = {source: [_plain(first)]}
    needed: set[fx.Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in needed or node in forms:
            continue
        needed.add(node)
        if node < source or (node.target not in LINEAR and sources(node) is None):
            raise NotLinear(node)
        stack.extend(used for used in node.all_input_nodes if analysis.active(used))
    for node in sorted(needed):
        forms[node] = _step(analysis, node, forms, tables)
    form = forms[result]
    if not isinstance(form, list):
        raise NotLinear(result)
    return form


def _step(analysis: Analysis, node: fx.Node, forms: dict, tables: Tables):
    target = node.target
    if target in CASTS:
        if not analysis.active(node.args[0]):
            raise NotLinear(node)
        return forms[node.args[0]]
    if target is aten.neg.default:
        return _negated(forms[node.args[0]])
    if target in SUMS:
        return _sum(analysis, node, forms)
    if target in MULTIPLY:
        one, other = node.args[:2]
        if not analysis.active(one):
            one, other = other, one
        number = analysis.constant(other)
        if number is not None:
            return _times_number(node, forms[one], number)
        signs = _signs(analysis, other, tables.trial)
        if signs is not None and isinstance(forms[one], list):
            return [Term(*torch.broadcast_tensors(t.source, t.table, t.factor * signs)) for t in forms[one]]
        return _times(node, forms[one], _table(analysis, node, other, tables))
    if target in DIVIDE:
        number = analysis.constant(node.args[1])
        if number is None or number == 0:
            raise NotLinear(node)
        return _times_number(node, forms[node.args[0]], 1.0 / number)
    if target is aten.addcmul.default:
        base, one, other = node.args[:3]
        if not analysis.active(one):
            one, other = other, one
        if float(node.kwargs.get("value", 1)) != 1.0 or not analysis.active(base):
            raise NotLinear(node)
        return forms[base] + _times(node, forms[one], _table(analysis, node, other, tables))
    if target in COMPLEX:
        return _complex(analysis, node, forms)
    return _moved(analysis, node, forms, tables.trial)


def _signs(analysis: Analysis, other, trial: Trial) -> Tensor | None:
    """The values of a constant tensor of ones and minus ones."""
    if not isinstance(other, fx.Node) or not analysis.fixed(other):
        return None
    value = analysis.value(other, trial)
    return value if value.is_floating_point() and bool((value.abs() == 1).all()) else None


def _times_number(node: fx.Node, form, number: float):
    if isinstance(form, ComplexForm) or number == 0:
        raise NotLinear(node)
    return [Term(term.source, term.table, term.factor * number) for term in form]


def _negated(form):
    if isinstance(form, ComplexForm):
        return ComplexForm(_negated(form.real), _negated(form.imag))
    return [term.negated() for term in form]


def _sum(analysis: Analysis, node: fx.Node, forms: dict) -> Form:
    one, other = node.args[:2]
    if not (analysis.active(one) and analysis.active(other)) or node.kwargs.get("alpha", 1) != 1:
        raise NotLinear(node)
    a, b = forms[one], forms[other]
    if isinstance(a, ComplexForm) or isinstance(b, ComplexForm) or len(a) + len(b) > MAX_TERMS:
        raise NotLinear(node)
    return _compact([*a, *(_negated(b) if node.target is aten.sub.Tensor else b)])


def _compact(form: Form) -> Form:
    """Terms that are nowhere needed at once share one list entry; all of one shape."""
    shape = torch.broadcast_shapes(*(term.source.shape for term in form))
    parts = [torch.stack([getattr(term, name).expand(shape) for term in form]) for name in PARTS]
    order = (parts[0] == 0).to(torch.int8).sort(dim=0, stable=True).indices
    parts = [part.gather(0, order) for part in parts]
    keep = max(1, int((parts[0] != 0).sum(0).max()))
    return [Term(*(part[i] for part in parts)) for i in range(keep)]


def _table(analysis: Analysis, node: fx.Node, other, tables: Tables) -> tuple[Tensor, Tensor | None]:
    if not isinstance(other, fx.Node) or analysis.active(other) or analysis.constant(other) is not None:
        raise NotLinear(node)
    return tables.numbers(other)


def _times(node: fx.Node, form, numbers: tuple[Tensor, Tensor | None]):
    real, imag = numbers
    if isinstance(form, ComplexForm):
        if imag is None:
            return ComplexForm(_scaled(node, form.real, real), _scaled(node, form.imag, real))
        minus = _negated(_scaled(node, form.imag, imag))
        cross = _scaled(node, form.real, imag) + _scaled(node, form.imag, real)
        return ComplexForm(_compact(_scaled(node, form.real, real) + minus), _compact(cross))
    if imag is not None:
        raise NotLinear(node)
    return _scaled(node, form, real)


def _scaled(node: fx.Node, form: Form, numbers: Tensor) -> Form:
    if any(bool((term.table != 0).any()) for term in form):
        raise NotLinear(node)
    out = []
    for term in form:
        source, table, factor = torch.broadcast_tensors(term.source, numbers, term.factor)
        out.append(Term(source * table.sign(), table.abs() * (source != 0), factor))
    return out


def _complex(analysis: Analysis, node: fx.Node, forms: dict):
    if not all(analysis.active(arg) for arg in node.args):
        raise NotLinear(node)
    if node.target is aten.complex.default:
        return ComplexForm(forms[node.args[0]], forms[node.args[1]])
    form = forms[node.args[0]]
    if node.target is aten.view_as_complex.default:
        if isinstance(form, ComplexForm):
            raise NotLinear(node)
        return ComplexForm(*([term.moved(lambda t, i=i: t[..., i]) for term in form] for i in (0, 1)))
    if not isinstance(form, ComplexForm):
        raise NotLinear(node)
    return _joined([form.real, form.imag], lambda parts: torch.stack(parts, -1))


def _joined(forms: list[Form], join) -> Form:
    count = max(len(form) for form in forms)
    padded = []
    for form in forms:
        padded.append(form + [_plain(torch.zeros_like(form[0].source))] * (count - len(form)))
    return [Term(*(join([getattr(f[i], name) for f in padded]) for name in PARTS)) for i in range(count)]


def _moved(analysis: Analysis, node: fx.Node, forms: dict, trial: Trial):
    data = sources(node)
    if data is None or not all(analysis.active(used) for used in data):
        raise NotLinear(node)
    given = [forms[used] for used in data]
    if isinstance(given[0], tuple):  # the results of a split
        return given[0][node.args[1]]
    if any(isinstance(form, ComplexForm) for form in given):
        if not all(isinstance(form, ComplexForm) for form in given):
            raise NotLinear(node)
        parts = [
            _moved(analysis, node, dict(forms) | dict(zip(data, [getattr(f, p) for f in given], strict=True)), trial)
            for p in ("real", "imag")
        ]
        return ComplexForm(*parts)
    count = max(len(form) for form in given)
    padded = [form + [_plain(torch.zeros_like(form[0].source))] * (count - len(form)) for form in given]
    terms = []
    for i in range(count):
        parts = []
        for name in PARTS:
            stand_in = {used: getattr(form[i], name) for used, form in zip(data, padded, strict=True)}
            parts.append(apply(node, trial, analysis, stand_in.__getitem__))
        terms.append(parts)
    if isinstance(terms[0][0], tuple | list):
        return tuple([Term(*(part[k] for part in parts)) for parts in terms] for k in range(len(terms[0][0])))
    return [Term(*parts) for parts in terms]


@dataclass
class Rotation:
    """A form that is ftc.rope of the source, put in another `order` first: width R, pairing, and the signed numbers of the cos and sin
    elements [..., R] that it needs."""

    width: int
    interleaved: bool
    cos: Tensor
    sin: Tensor
    order: str = "as is"


def split_pairs(x: Tensor) -> Tensor:
    """x0 x1 x2 x3 .. -> x0 x2 .. x1 x3 .., the order in which interleaved pairs are half-split ones."""
    return x.unflatten(-1, (x.shape[-1] // 2, 2)).transpose(-1, -2).flatten(-2)


def join_pairs(x: Tensor) -> Tensor:
    """The inverse of `split_pairs`."""
    return x.unflatten(-1, (2, x.shape[-1] // 2)).transpose(-1, -2).flatten(-2)


ORDERS = {"as is": lambda x: x, "split pairs": split_pairs, "join pairs": join_pairs}


def as_rotation(form: Form, shape: torch.Size, swapped: bool = False) -> Rotation | None:
    """The rotation that a form is of its source [*shape] in one of ORDERS, or with dims 1 and 2 `swapped`; None where it is none."""
    terms = _compact(form)
    if len(terms) != 2 or any(bool(((term.factor.abs() - 1).abs() > 1e-14).any()) for term in terms):
        return None
    terms = [Term(term.source * term.factor.sign().to(torch.int64), term.table, term.factor.abs()) for term in terms]
    numbers = torch.arange(1, shape.numel() + 1).view(shape)
    numbers = numbers.transpose(1, 2) if swapped else numbers
    if terms[0].source.shape != numbers.shape:
        return None
    for order, arrange in ORDERS.items():
        if order == "as is" or shape[-1] % 2 == 0:
            rotation = _rotation_of(terms, arrange(numbers))
            if rotation is not None:
                rotation.order = order
                return rotation
    return None


def _rotation_of(terms: Form, own: Tensor) -> Rotation | None:
    shape = own.shape
    first_is_own = terms[0].source.abs() == own
    pick = [
        [torch.where(first_is_own, getattr(a, n), getattr(b, n)) for n in ("source", "table")]
        for a, b in (terms, terms[::-1])
    ]
    (own_source, own_table), (pair_source, pair_table) = pick
    if not torch.equal(own_source, own):
        return None
    rotated = pair_source != 0
    columns = rotated.reshape(-1, shape[-1])
    width = int(columns[0].sum())
    if width < 2 or width % 2 or not bool(columns[:, :width].all()) or bool(columns[:, width:].any()):
        return None
    if (
        bool((own_table[..., width:] != 0).any())
        or bool((own_table[..., :width] == 0).any())
        or bool((pair_table[..., :width] == 0).any())
    ):
        return None
    place = torch.arange(width)
    halves = (
        torch.where(place < width // 2, place + width // 2, place - width // 2),
        torch.where(place < width // 2, -1, 1),
    )
    neighbours = place ^ 1, torch.where(place % 2 == 0, -1, 1)
    for interleaved, (pair, sign) in ((False, halves), (True, neighbours)):
        if torch.equal(pair_source[..., :width].abs(), own[..., :width][..., pair]):
            sin = pair_table[..., :width] * pair_source[..., :width].sign() * sign
            return Rotation(width, interleaved, own_table[..., :width], sin)
    return None

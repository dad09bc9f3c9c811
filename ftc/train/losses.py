"""Losses as pure functions, by name.

A loss takes what the model gave and the labels, and returns one number: the *sum* over the labels that are not -100, in nats. The
trainer divides by the number of labels over all ranks and micro-batches, so that the gradient does not depend on how a batch is
cut up. `outputs` is a tensor of logits [B, T, V], or a mapping (or an object with attributes) that holds them as "logits", and
what else the loss reads. Keyword-only parameters are the options that a TOML file may set:

    loss = "mtp"
    loss = { name = "kl", temperature = 2.0, weight = [[0, 1.0], [1, 0.5]] }

A package adds its own through the entry point group `ftc.losses`: `my-loss = "my_package:my_loss"`.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.errors import FtcError, nearest
from ftc.evaluate import IGNORED, logits_of
from ftc.models.mtp import mtp_loss, summed_cross_entropy
from ftc.train.schedule import Scheduled, check_schedule

ENTRY_POINT_GROUP = "ftc.losses"
# Shapes: B batch, T tokens, V vocabulary, N = B T, K likeliest tokens of a teacher.


def next_token(outputs: Any, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return summed_cross_entropy(logits_of(outputs), labels_BT)


def model(outputs: Any, labels_BT: Tensor) -> Tensor:
    """The mean loss that the model itself returned, having been given the labels."""
    return part(outputs, "loss") * (labels_BT != IGNORED).sum()


def mtp(outputs: Any, labels_BT: Tensor, *, weight: Scheduled | None = None) -> Tensor:
    """Next token + weight / D * the losses of further tokens.

    Reads losses that a program with `add-mtp` computed ("next_token_loss", "mtp_loss_1", ...: divided by the number of labels),
    else "mtp_logits". `weight`: without one that of the pass, else 0.3.
    """
    if has_part(outputs, "next_token_loss"):
        losses = [part(outputs, f"mtp_loss_{k}") for k in _depths(outputs)]
        total = part(outputs, "mtp_total_loss")
        if weight is not None:
            total = part(outputs, "next_token_loss") + weight / len(losses) * torch.stack(losses).sum()
        return total * (labels_BT != IGNORED).sum()
    if not has_part(outputs, "mtp_logits"):
        raise FtcError('the loss "mtp" needs a model that predicts further tokens; add the pass add-mtp')
    joined_BT = part(outputs, "joined") if has_part(outputs, "joined") else None
    return mtp_loss(logits_of(outputs), part(outputs, "mtp_logits"), labels_BT, 0.3 if weight is None else weight, joined_BT)


def chunked_cross_entropy(outputs: Any, labels_BT: Tensor, *, chunk: int = 1024) -> Tensor:
    """Cross-entropy of `chunk` tokens at a time: no float32 copy of all logits, which are computed again in the backward pass.

    Where the outputs hold "hidden" [B, T, D] and "head" [V, D] in place of logits, these are never held as a whole either.
    """
    if has_part(outputs, "hidden") and has_part(outputs, "head"):
        import ftc.dialect  # noqa: F401  registers the op

        hidden, head = part(outputs, "hidden"), part(outputs, "head")
        return torch.ops.ftc.chunk_cross_entropy(
            hidden.flatten(0, -2), head, None, labels_BT.flatten(), reduction="sum", chunk=chunk
        )
    from torch.utils.checkpoint import checkpoint

    logits_NV, labels_N = logits_of(outputs).flatten(0, -2), labels_BT.flatten()
    parts = zip(logits_NV.split(chunk), labels_N.split(chunk), strict=True)  # split has one backward for all parts
    losses = [checkpoint(summed_cross_entropy, logits, labels, use_reentrant=False) for logits, labels in parts]
    return torch.stack(losses).sum()


def kl(outputs: Any, labels_BT: Tensor, *, temperature: float = 1.0, weight: Scheduled = 1.0) -> Tensor:
    """weight * temperature^2 * KL(teacher || model) + (1 - weight) * cross-entropy (Hinton et al., 2015), at temperature.

    The teacher is "teacher_logits" [B, T, V], or "teacher_ids" and "teacher_logprobs" [B, T, K]: log-probabilities of its K
    likeliest tokens at this temperature. What is left of both distributions then counts as one class, so that the result is
    at most the full KL, and equal to it where K = V.
    """
    logits_BTV = logits_of(outputs)
    counted = labels_BT != IGNORED
    scaled = _float(logits_BTV)[counted] / temperature  # [n, V], n labels that count
    if has_part(outputs, "teacher_logits"):
        teacher = F.log_softmax(_float(part(outputs, "teacher_logits").detach())[counted] / temperature, -1)
        divergence = F.kl_div(F.log_softmax(scaled, -1), teacher, reduction="sum", log_target=True)
    elif has_part(outputs, "teacher_ids"):
        ids, logprobs = part(outputs, "teacher_ids")[counted], part(outputs, "teacher_logprobs").detach()[counted]
        divergence = _kl_of_likeliest(scaled, ids.long(), _float(logprobs))
    else:
        raise FtcError('the loss "kl" needs a teacher: its logits in the outputs, or [ftc] loss = { name = "kl", teacher = "PATH" }')
    loss = weight * temperature**2 * divergence
    return loss if weight == 1 else loss + (1 - weight) * summed_cross_entropy(logits_BTV, labels_BT)


def _kl_of_likeliest(logits_nV: Tensor, ids_nK: Tensor, teacher_nK: Tensor) -> Tensor:
    """sum_k p_k (log p_k - log q_k) + r (log r - log s), where r and s are what the K leave of teacher and model."""
    total_n = logits_nV.logsumexp(-1, keepdim=True)
    divergence = F.kl_div(logits_nV.gather(-1, ids_nK) - total_n, teacher_nK, reduction="sum", log_target=True)
    if ids_nK.shape[-1] == logits_nV.shape[-1]:
        return divergence
    rest_n = logits_nV.scatter(-1, ids_nK, float("-inf")).logsumexp(-1) - total_n.squeeze(-1)
    left_n = -torch.expm1(teacher_nK.logsumexp(-1))
    left_n = left_n.clamp(min=torch.finfo(left_n.dtype).tiny)  # rounding may leave less than nothing
    return divergence + (left_n * (left_n.log() - rest_n)).sum()


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def has_part(outputs: Any, name: str) -> bool:
    """Whether the outputs hold `name`."""
    return name in outputs if isinstance(outputs, Mapping) else getattr(outputs, name, None) is not None


def part(outputs: Any, name: str) -> Any:
    """What the outputs hold under `name`. FtcError when they hold nothing of that name."""
    if not has_part(outputs, name):
        held = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise FtcError(f"the loss reads {name!r}, but the model gave {held}")
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)


def _depths(outputs: Mapping) -> range:
    count = 0
    while has_part(outputs, f"mtp_loss_{count + 1}"):
        count += 1
    return range(1, count + 1)


# -------------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Loss:
    """A loss with its options' values. `with_labels`: the model is called with labels and returns losses, no logits."""

    name: str
    function: Callable[..., Tensor]
    values: Any = field(default=None)  # an instance of `options_of(function)`

    @property
    def with_labels(self) -> bool:
        return self.function in (model, mtp)

    def options(self) -> dict[str, Any]:
        return dict(vars(self.values))


OURS: dict[str, Callable[..., Tensor]] = {
    "next-token": next_token,
    "cross-entropy": next_token,
    "chunk-cross-entropy": chunked_cross_entropy,
    "mtp": mtp,
    "kl": kl,
    "model": model,
}


@cache
def losses() -> dict[str, Callable[..., Tensor]]:
    """Every loss by name: ours, then those that installed packages add. FtcError for a name that exists."""
    found = dict(OURS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found:
            raise FtcError(f"{point.value} registers a loss named {point.name!r}, which exists already; rename it")
        found[point.name] = point.load()
    return found


@cache
def options_of(function: Callable[..., Tensor]) -> type:
    """A frozen dataclass of a loss's options: its keyword-only parameters with their types and defaults."""
    hints = typing.get_type_hints(function)
    fields = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            missing = parameter.default is inspect.Parameter.empty
            default = {} if missing else {"default": parameter.default}
            fields.append((parameter.name, hints.get(parameter.name, object), field(**default)))
    return make_dataclass(f"{function.__name__}_options", fields, frozen=True)


def parse_loss(value: str | Mapping[str, Any]) -> Loss:
    """The loss that `value` names: a name, or a table with `name` and options. FtcError names the nearest valid one."""
    from ftc.rewrite.registry import _fits

    table = {"name": value} if isinstance(value, str) else dict(value)
    name = table.pop("name", None)
    known = losses()
    if name not in known:
        raise FtcError(f"there is no loss {name!r}; {nearest(str(name), known)}")
    options = options_of(known[name])
    fields = options.__dataclass_fields__
    for option, given in table.items():
        if option not in fields:
            raise FtcError(f"the loss {name} has no option {option!r}; {nearest(option, [*fields, 'name'])}")
        kinds = typing.get_args(fields[option].type) or (fields[option].type,)
        if list in kinds:
            check_schedule(given, f"the loss {name}: {option}")
        elif not _fits(given, fields[option].type):
            raise FtcError(f"the loss {name}: option {option} = {given!r} is of the wrong type; it must be {fields[option].type}")
    try:
        return Loss(name, known[name], options(**table))
    except TypeError as error:
        raise FtcError(f"the loss {name}: {error}") from error

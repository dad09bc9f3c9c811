"""What a run minimises: the loss that `[ftc] loss` names, with what it needs beside the model (labels, a teacher, a schedule).

    loss = "auto"                                            next-token, or what a pass asks for (add-mtp: mtp)
    loss = { name = "mtp", weight = [[0, 0.3], [0.67, 0.3], [0.67, 0.1]] }
    loss = { name = "kl", teacher = "path/to/model" }        live: the teacher runs beside the model
    loss = { name = "kl", teacher_logits = "folder" }        stored by ftc.train.stored_teacher.store_teacher

`outputs` runs inside the model's forward, under whatever shards it; the loss itself is a pure function of what that gives.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftc.data.source_table import Source
from ftc.errors import FtcError
from ftc.evaluate import IGNORED, logits_of
from ftc.train.documents_apart import apart_inputs, packed_inputs
from ftc.train.losses import Loss, has_part, next_token, parse_loss, part
from ftc.train.schedule import at

AUTO = "auto"
_TEACHERS = ("teacher", "teacher_logits")
NOTHING: Mapping[str, Tensor] = {}
_LABEL_NAMES = (("labels",), ("labels", "shift_labels"))


def parse_objective(value: str | Mapping[str, Any], passes: Sequence[Any] = ()) -> tuple[Loss, dict[str, str]]:
    """The loss and the paths of its teacher. FtcError for unknown names and options, and for a loss that does not go with one
    of `passes`: it would leave untrained what the pass adds, or not call the loss that it rewrites."""
    from ftc.rewrite.registry import parse_passes

    wanted = {request.pass_.trained_by: request.name for request in parse_passes(list(passes)) if getattr(request.pass_, "trained_by", "")}
    if value == AUTO:
        value = min(wanted, key=lambda name: name == "model", default="next-token")
    table = {"name": value} if isinstance(value, str) else dict(value)
    paths = {name: table.pop(name) for name in _TEACHERS if name in table}
    loss = parse_loss(table)
    for name, adder in wanted.items():
        if not (loss.with_labels if name == "model" else loss.name in (name, "model")):
            raise FtcError(f'pass {adder} and the loss {loss.name!r} do not go together; set [ftc] loss = "{name}", or leave it out')
    if loss.name == "kl" and len(paths) != 1:
        raise FtcError('the loss kl needs one teacher: teacher = "PATH" (a model), or teacher_logits = "FOLDER" (stored)')
    if loss.name != "kl" and paths:
        raise FtcError(f"the loss {loss.name} has no option {next(iter(paths))!r}; kl has")
    return loss, paths


class Objective:
    """A loss bound to its teacher and to the progress of the run. Holds no parameter of the model that is trained."""

    def __init__(self, loss: Loss, teacher: nn.Module | None = None, stored: Any = None, apart: bool = False):
        """`stored`: a StoredTeacher. `apart`: documents of a window do not see each other.

        FtcError when it was stored at another temperature than the loss has, or the teacher cannot keep documents apart.
        """
        self.spec, self.teacher, self.stored = loss, teacher, stored
        self.progress: Callable[[], float] = lambda: 0.0  # the fraction of the run that is done
        self.label_names: tuple[str, ...] = ("labels",)
        self.parts: dict[str, Tensor] = {}  # of the last batch on this rank: what a model that returns several losses gave
        wanted = loss.options().get("temperature")
        if stored is not None and stored.temperature != wanted:
            raise FtcError(f"the stored teacher has temperature {stored.temperature}, the loss {wanted}; they must be the same")
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self._teacher_apart = apart_inputs(teacher) if apart else ()

    @property
    def with_labels(self) -> bool:
        """Whether the model is called with labels."""
        return self.spec.with_labels

    @property
    def with_places(self) -> bool:
        """Whether the loss needs to know where in the token stream a batch stands."""
        return self.stored is not None

    def call(
        self, tokens_BT: Tensor, labels_BT: Tensor | None = None, apart: Mapping[str, Tensor] = NOTHING
    ) -> dict[str, Tensor]:
        """Keyword inputs of a model, with the labels where it is given them, and what keeps documents `apart`."""
        labels = {} if labels_BT is None else {name: labels_BT for name in self.label_names}
        return {"input_ids": tokens_BT, **labels, **apart}

    @torch.no_grad()
    def learn_call(self, body: nn.Module, vocab_size: int) -> None:
        """Find out how `body` takes labels that are shifted already. Some models shift them themselves, unless told.

        FtcError when its loss is not the cross-entropy of its logits and the labels in any way that is known here.
        """
        generator = torch.Generator().manual_seed(0)
        tokens_BT, labels_BT = torch.randint(vocab_size, (2, 2, 7), generator=generator)
        training = body.training
        body.eval()  # no dropout between the two calls
        try:
            expected = next_token(body(input_ids=tokens_BT), labels_BT) / labels_BT.numel()
            for names in _LABEL_NAMES:
                self.label_names = names
                with contextlib.suppress(TypeError):  # it does not know the name
                    if torch.allclose(first_loss(body(**self.call(tokens_BT, labels_BT))).float(), expected, rtol=1e-3):
                        return
        finally:
            body.train(training)
        raise FtcError(
            f"{type(body).__name__} given labels does not return the cross-entropy of its logits with them as they are: the loss "
            f"{self.spec.name!r} cannot be used with it"
        )

    def outputs(
        self,
        body: nn.Module,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        places_BT: Tensor | None = None,
        apart: Mapping[str, Tensor] = NOTHING,
    ) -> Any:
        """What the loss takes: logits, losses of the model's own, a teacher's logits.

        `apart`: further inputs of `body` that keep the documents of a window apart; a teacher is given its own.
        """
        if self.spec.name == "model":
            return {"loss": first_loss(body(**self.call(tokens_BT, labels_BT, apart)))}
        if self.spec.name == "mtp":
            return body.with_extras(**self.call(tokens_BT, labels_BT, apart))[1]
        logits_BTV = logits_of(body(**self.call(tokens_BT, apart=apart)))
        if self.teacher is not None:
            return {"logits": logits_BTV, "teacher_logits": self._teacher_logits(tokens_BT, apart)}
        if self.stored is not None:
            return {"logits": logits_BTV, **self.stored.lookup(places_BT)}
        return logits_BTV

    def next_token_nats(
        self, body: nn.Module, tokens_BT: Tensor, labels_BT: Tensor, apart: Mapping[str, Tensor] = NOTHING
    ) -> Tensor:
        """The summed cross-entropy of the next token over the labels that count, by the call with which the model trains."""
        if self.spec.name not in ("model", "mtp"):
            return next_token(body(**self.call(tokens_BT, apart=apart)), labels_BT)
        outputs = self.outputs(body, tokens_BT, labels_BT, apart=apart)
        name = next((name for name in ("next_token_loss", "loss") if has_part(outputs, name)), None)
        return next_token(outputs, labels_BT) if name is None else part(outputs, name) * (labels_BT != IGNORED).sum()

    @torch.no_grad()
    def _teacher_logits(self, tokens_BT: Tensor, apart: Mapping[str, Tensor]) -> Tensor:
        inputs = packed_inputs(apart["position_ids"], self._teacher_apart) if apart else {}
        return logits_of(self.teacher(input_ids=tokens_BT, **inputs))

    def __call__(self, outputs: Any, labels_BT: Tensor) -> Tensor:
        """The sum of the loss over the labels that count."""
        if isinstance(outputs, Mapping):
            self.parts = {n: v.detach() for n, v in outputs.items() if isinstance(v, Tensor) and v.dim() == 0}
        options = self.spec.options()
        progress = self.progress()
        values = {name: at(value, progress) if isinstance(value, list | tuple) else value for name, value in options.items()}
        return self.spec.function(outputs, labels_BT, **values)


def check_windows(loss: Loss, paths: Mapping[str, str], packing: str, apart: bool, sources: Sequence[Source]) -> None:
    """Raise FtcError where a loss cannot be had of the run's windows.

    A stored teacher knows places in one stream of held text. Further tokens must not be predicted across documents, and where
    the rest of a long one is packed behind another, positions alone show the border.
    """
    if loss.name == "mtp" and packing == "documents" and not apart:
        raise FtcError('the loss mtp with packing = "documents" needs document_mask = true, or it crosses documents')
    if "teacher_logits" not in paths:
        return
    if packing != "stream":
        raise FtcError(f'teacher_logits are stored for one stream, and packing = "{packing}" cuts none; use packing = "stream"')
    for source in sources:
        if source.streaming:
            raise FtcError(
                f"teacher_logits are stored for text that is held, and the source {source.name!r} is streamed; leave streaming "
                "out, or use a live teacher"
            )


def first_loss(output: Any) -> Tensor:
    """The loss in what a model returns for a call with labels: the tensor itself, its `.loss`, or a tuple's first element."""
    if isinstance(output, Tensor):
        return output
    if has_part(output, "loss"):
        return output["loss"] if isinstance(output, Mapping) else output.loss
    if isinstance(output, tuple | list) and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return output[0]
    raise FtcError(f"the model returned a {type(output).__name__} without a loss; it must return one when it is given labels")


def build_objective(
    value: str | Mapping[str, Any],
    passes: Sequence[Any],
    stream: Callable[[], np.ndarray] | None = None,
    apart: bool = False,
) -> Objective:
    """The objective of a run; opens the teacher where there is one.

    `stream` gives the training tokens, which a stored teacher is checked against. `apart`: as for `Objective`.
    """
    from ftc.open_model import open_model
    from ftc.train.stored_teacher import StoredTeacher

    loss, paths = parse_objective(value, passes)
    with torch.device("cpu"):  # torchtitan builds under the meta device
        teacher = open_model(paths["teacher"]) if "teacher" in paths else None
    stored = None
    if "teacher_logits" in paths:
        stored = StoredTeacher(paths["teacher_logits"], None if stream is None else stream())
    return Objective(loss, teacher, stored, apart)

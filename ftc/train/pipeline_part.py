"""One stage of the model as torchtitan sees it: what a microbatch becomes on it, and, on the last stage, its loss."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import ModelProtocol

from ftc.parallel.weights import hosts
from ftc.train.documents_apart import packed_inputs

# Shapes: B sequences of a microbatch, T tokens.


@dataclass
class Cut:
    """What all stages of a run share. Names are the whole model's."""

    model: Any  # TrainedModel: whole, captured and rewritten, never filled
    pipeline: Any  # ftc.train.pipeline_settings.Pipeline
    stages: list[Any]  # of ftc.pipeline.cut, all of them; only this rank's get memory
    bounds: tuple[int, ...]
    shapes: list[tuple[Tensor, ...]] = field(default_factory=list)  # what each stage gives the next, on the meta device
    waiting: int = 0  # parts of this rank that have no memory yet
    parts: list["StagePart"] = field(default_factory=list)

    def holder(self, name: str) -> int:
        """The first stage that holds a parameter or buffer."""
        return next(index for index, names in enumerate(self._names) if name in names)

    @cached_property
    def _names(self) -> list[frozenset[str]]:
        return [frozenset(names_of(stage.body)) for stage in self.stages]


def names_of(body: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a program or a stage by their whole names, every name of a shared one."""
    return {prefix + name: tensor for prefix, host in hosts(body) for name, tensor in host.named_attributes()}


class StagePart(ModelProtocol):
    """A stage of a TrainedModel. Its forward takes what crossed from the stage before, and the microbatch's inputs by name.

    The last stage returns a scalar: the sum of the losses of the microbatch's labels over `num_labels`, the number of labels that
    count in the whole step on all ranks, so that gradients sum up to those of the mean whatever the microbatches are.
    """

    def __init__(self, cut: Cut, index: int):
        super().__init__(cut.model.model_args)
        model = cut.model
        self.section, self.objective, self.apart_names = model.section, model.objective, model.apart_names
        self.index, self.is_last = index, index == len(cut.stages) - 1
        self.body = cut.stages[index].body
        self.__dict__["stage"], self.__dict__["cut"] = cut.stages[index], cut  # no submodules
        self.num_labels: Tensor | float = 1.0
        self.losses_seen: list[dict[str, Tensor]] = []  # the parts of each microbatch's loss, where it has several
        self._measures = False

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the last stage gives the summed cross-entropy of the next token alone, in nats."""
        self._measures = True
        try:
            yield
        finally:
            self._measures = False

    def forward(
        self,
        *crossing: Tensor,
        tokens: Tensor,
        labels: Tensor,
        places: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """What crosses to the next stage, or on the last the loss (float, a scalar). tokens, labels, places, position_ids: int64
        [B, T], as for TrainedModel; labels are always given, and shown to the model where its loss is its own."""
        if not self.is_last:
            sent = self.stage(*crossing, **self.inputs(tokens, labels, position_ids), ftc_extras=self.has_extras)
            return tuple(t.contiguous() for t in sent)
        given = labels if self.objective.with_labels else None
        body, apart = Following(self.stage, crossing), self._apart(position_ids)
        if self._measures:
            return self.objective.next_token_nats(body, tokens, labels, apart)
        outputs = self.objective.outputs(body, tokens, given, places, apart)
        loss = self.objective(outputs, labels) / self.num_labels
        if isinstance(outputs, Mapping):
            self.losses_seen.append(self.objective.parts)
        return loss

    @property
    def has_extras(self) -> bool:
        """Whether the loss reads what passes added to the model's result, so that every stage has to be called for it."""
        return self.objective.spec.name == "mtp"

    def inputs(self, tokens: Tensor, labels: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor]:
        """The model's own inputs by name: every stage is given all of them."""
        given = labels if self.objective.with_labels else None
        return self.objective.call(tokens, given, self._apart(position_ids))

    def _apart(self, position_ids: Tensor | None) -> dict[str, Tensor]:
        return {} if position_ids is None else packed_inputs(position_ids, self.apart_names)

    @property
    def whole(self) -> Any:
        """The TrainedModel that the stage was cut from."""
        return self.cut.model

    @property
    def embedding(self) -> Tensor | None:
        """The token embedding, [V, D], where this stage holds it."""
        return names_of(self.body).get(self.cut.model._embedding)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill this rank's stages once all of them have memory, from the model that the first rank builds. All ranks call it for
        each of their stages."""
        from ftc.train.pipeline_weights import fill_stages

        self.cut.waiting -= 1
        if self.cut.waiting == 0:
            fill_stages(self.cut)

    def share_tied(self) -> None:
        """Make one of parameters that are one and both on this stage, in place."""
        self.body.share_tied()


class Following:
    """The last stage, called like the whole model: the crossing tensors of a microbatch are at hand."""

    def __init__(self, stage: nn.Module, crossing: tuple[Tensor, ...]):
        self._stage, self._crossing = stage, crossing

    def __call__(self, **inputs: Tensor) -> Any:
        return self._stage(*self._crossing, **inputs)

    def with_extras(self, **inputs: Tensor) -> tuple:
        return self._stage.with_extras(*self._crossing, **inputs)

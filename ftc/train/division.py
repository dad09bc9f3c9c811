"""Tensor, context and expert parallelism in a run: the passes that the degrees of `[parallelism]` ask for, and what a trainer
then does differently (pipelines: ftc.train.pipeline_step): inputs cut along the sequence, gradients clipped by the norm of whole weights.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftc import parallel
from ftc.dialect import ranks
from ftc.errors import FtcError
from ftc.parallel.weights import hosts
from ftc.rewrite.shard import Shard
from ftc.train.pipeline_settings import check_pipeline

TENSOR, CONTEXT, EXPERT = "tensor", "context", "expert"
MESHES = {TENSOR: "tp", CONTEXT: "cp", EXPERT: "ep"}  # torchtitan's names


def check_parallelism(job_config: Any) -> None:
    """Raise FtcError for a combination of `[parallelism]` with itself or other settings that a run cannot honour."""
    wanted, section = job_config.parallelism, job_config.ftc
    _check_number_of_processes(wanted)
    if wanted.expert_parallel_degree != 1:
        _check_experts(job_config)
    tensor, context = wanted.tensor_parallel_degree, wanted.context_parallel_degree
    if wanted.enable_async_tensor_parallel:
        raise FtcError("parallelism.enable_async_tensor_parallel is not supported; leave it out")
    if tensor > 1 and section.optimizer == "muon":
        raise FtcError(
            f'[ftc] optimizer = "muon" orthogonalises whole matrices, of which {tensor} ranks of tensor parallelism hold parts; '
            'set optimizer = "torchtitan", or parallelism.tensor_parallel_degree = 1'
        )
    if context > 1:
        _check_sequence(job_config)
    check_pipeline(job_config)


def _check_number_of_processes(wanted: Any) -> None:
    """The degrees have to make up the number of processes, where each of them is given."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    names = ("pipeline_parallel", "data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "context_parallel")
    degrees = {name: getattr(wanted, f"{name}_degree") for name in names}
    product = 1
    for name, degree in degrees.items():
        if degree < 1 and not (name == "data_parallel_shard" and degree == -1):
            raise FtcError(f"parallelism.{name}_degree is {degree}; it must be 1 or more")
        product *= max(degree, 1)
    fits = processes % product == 0 if degrees["data_parallel_shard"] == -1 else processes == product
    if not fits:
        spelled = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
        raise FtcError(f"{spelled} makes {product} processes, and there are {processes}; start {product}, or change [parallelism]")


def _check_experts(job_config: Any) -> None:
    """The ranks of experts are ranks of data, or of a sequence, that have others beside them."""
    wanted, processes = job_config.parallelism, int(os.environ.get("WORLD_SIZE", "1"))
    degree, tensor = wanted.expert_parallel_degree, wanted.tensor_parallel_degree
    if degree < 1:
        raise FtcError(f"parallelism.expert_parallel_degree is {degree}; it must be 1 or more")
    ranks = processes // (wanted.data_parallel_replicate_degree * tensor * max(wanted.pipeline_parallel_degree, 1))  # FSDP's: of data and of the sequence
    if ranks % degree:
        fits = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise FtcError(
            f"parallelism.expert_parallel_degree is {degree}, which does not divide the {ranks} ranks of data_parallel_shard x "
            f"context_parallel that experts are spread over; use {fits}"
        )
    if tensor > 1 and wanted.expert_tensor_parallel_degree != tensor:
        raise FtcError(
            f"parallelism.expert_tensor_parallel_degree is {wanted.expert_tensor_parallel_degree} beside tensor_parallel_degree = "
            f"{tensor}; ranks of tensor parallelism hold the same experts: set it to {tensor}"
        )
    if not stacks_experts(job_config.ftc):
        raise FtcError(
            f"parallelism.expert_parallel_degree is {degree}, and only stacked experts can be divided: put \"raise-moe\" into [ftc] "
            "passes, which also names them in checkpoints"
        )
    if wanted.expert_parallel_comm_backend != "standard":
        raise FtcError(
            f'parallelism.expert_parallel_comm_backend is {wanted.expert_parallel_comm_backend!r}; it must be "standard"'
        )


def stacks_experts(section: Any) -> bool:
    """Whether the run's passes bring experts to one form, or a saved program may have them in it."""
    from ftc.open_model import is_program
    from ftc.rewrite.registry import parse_passes

    named = [request.pass_ for request in parse_passes(section.passes)]
    return any("raise-moe" in (pass_.name, *pass_.requires) for pass_ in named) or bool(section.model and is_program(section.model))


def _check_sequence(job_config: Any) -> None:
    """Context parallelism cuts the sequence into equal chunks, and shows a rank only its own."""
    wanted, length = job_config.parallelism, job_config.training.seq_len
    degree, balancer, method = wanted.context_parallel_degree, wanted.context_parallel_load_balancer, wanted.context_parallel_rotate_method
    if balancer not in ("headtail", "none", None):
        raise FtcError(f'parallelism.context_parallel_load_balancer is {balancer!r}; it must be "headtail" or "none"')
    if method != "allgather":
        raise FtcError(f'parallelism.context_parallel_rotate_method is {method!r}; keys and values are gathered: it must be "allgather"')
    chunks = 2 * degree if is_balanced(job_config) else degree
    if length % chunks:
        raise FtcError(
            f"training.seq_len is {length}, which parallelism.context_parallel_degree = {degree} cannot cut into {chunks} equal "
            f"chunks; {length // chunks * chunks or chunks} or {(length // chunks + 1) * chunks} can be"
        )
    if job_config.ftc.document_mask:
        raise FtcError(
            "[ftc] document_mask shows each token the documents of a whole sequence, of which a rank of context parallelism has a "
            "part; set document_mask = false, or parallelism.context_parallel_degree = 1"
        )
    loss = job_config.ftc.loss
    if isinstance(loss, Mapping) and "teacher" in loss:
        raise FtcError(
            "a teacher beside the model would see only a rank's tokens under context parallelism; store its logits "
            "(teacher_logits), or set parallelism.context_parallel_degree = 1"
        )


def is_balanced(job_config: Any) -> bool:
    """Whether ranks of context parallelism get a chunk from either end, so that all do the same work."""
    return job_config.parallelism.context_parallel_load_balancer == "headtail"


def division_passes(job_config: Any) -> list[tuple[str, dict[str, Any]]]:
    """The passes that `[parallelism]` asks for, applied after those of `[ftc] passes`."""
    wanted, found = job_config.parallelism, []
    if wanted.context_parallel_degree > 1:
        options = {"degree": wanted.context_parallel_degree, "axis": CONTEXT, "balanced": is_balanced(job_config)}
        found.append(("context-parallel", options))
    if wanted.tensor_parallel_degree > 1:
        options = {"degree": wanted.tensor_parallel_degree, "axis": TENSOR, "vocabulary": not wanted.disable_loss_parallel}
        found.append(("tensor-parallel", options | {"strict": True}))
    if wanted.expert_parallel_degree > 1:
        found.append(("expert-parallel", {"degree": wanted.expert_parallel_degree, "axis": EXPERT}))
    return found


def bind_ranks(program: nn.Module, parallel_dims: Any) -> None:
    """Bind a divided program to this run's groups, in place: parameters become this rank's parts."""
    for axis, mesh in MESHES.items():
        if axis in program.axes:
            parallel.bind(program, parallel_dims.get_mesh(mesh), axis)


def release_ranks() -> None:
    """Forget the groups that `bind_ranks` bound: a run is over, or did not come about."""
    for axis in MESHES:
        ranks.release(axis)


def without_division(program: nn.Module, weights: dict[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """Whole weights in the names and shapes that they had before the passes that divide; `kept`: how many lenses came before."""
    with torch.no_grad():
        for prefix, host in hosts(program):
            for lens in reversed(host.code.lenses[kept[prefix] :]):
                if not isinstance(lens, Shard):  # of a whole weight it changes nothing
                    weights = lens.with_prefix(prefix).backward(weights)
    return weights


class ContextInputs:
    """Cuts batches along the sequence, and makes a loss that every rank of the axis knows count once.

    A loss made of logits is a rank's own: the sum over its tokens. One that the program itself returns is the mean over all
    ranks' tokens, the same number on each, with a gradient that is one rank's share.
    """

    def __init__(self, job_config: Any, mesh: Any, with_labels: bool):
        self.rank, self.degree, self._group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
        self.balanced, self.with_labels = is_balanced(job_config), with_labels

    def cut(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's tokens of the inputs [B, T], and the labels that its loss is given: its own, or all where it is a mean."""
        own = parallel.split_batch({**inputs, ".labels": labels}, self.rank, self.degree, self.balanced)
        mine = own.pop(".labels")
        return own, labels if self.with_labels else mine

    def next_token_nats(self, objective: Any, body: nn.Module, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The objective's `next_token_nats` of the whole sequences, on every rank (a collective)."""
        own = parallel.split_batch({"tokens": tokens_BT, "labels": labels_BT}, self.rank, self.degree, self.balanced)
        nats = objective.next_token_nats(body, own["tokens"], own["labels"]).float()
        dist.all_reduce(nats, group=self._group)
        return nats

    def counted_once(self, loss: Tensor) -> Tensor:
        """The loss as one rank's part of what is reported, with its gradient as it is."""
        return loss - loss.detach() * (1 - 1 / self.degree) if self.with_labels else loss


class WholeClipping:
    """Clips gradients by the norm of the whole weights' gradients, before the optimizer step, in torchtitan's place.

    torchtitan takes the norm of what one rank of tensor or expert parallelism holds; it is told to clip nothing.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.norm = trainer, 0.0
        self.max_norm, trainer.job_config.training.max_norm = trainer.job_config.training.max_norm, float("inf")
        trainer.optimizers.optimizers[0].register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        self.norm = float(parallel.clip_gradients(self.trainer.model_parts[0].body, self.max_norm))

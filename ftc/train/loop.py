"""torchtitan's trainer, with what a run of ours adds: data prepared once, and a copy of the program to save at the end."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftc.data.mixture import tokens_by_source
from ftc.dialect.balance import share_of_batch
from ftc.parallel.weights import hosts, whole_tensors
from ftc.train import adapter  # before torchtitan: it readies a machine without an accelerator
from ftc.train.balance import ExpertBalance
from ftc.train.batch_size import check_batch
from ftc.train.checkpoints import TolerantCheckpoints
from ftc.train.divided_checkpoints import AtTheirPlaces
from ftc.train.division import ContextInputs, WholeClipping, check_parallelism, release_ranks, without_division
from ftc.train.environment import check_disk, check_environment, checkpoint_bytes
from ftc.train.hang import Unwatched, watching
from ftc.train.non_finite import NonFiniteGuard
from ftc.train.pipeline_forward import PipelinedForward
from ftc.train.pipeline_step import PipelinedSteps
from ftc.train.pipeline_weights import gathered_weights
from ftc.train.ranks import first_rank_first, is_first_rank, on_first_rank
from ftc.train.validation_curve import ValidationCurve, held_out

import torchtitan.train as titan  # isort: skip
from torchtitan.components.checkpoint import MODEL, OPTIMIZER  # isort: skip
from torchtitan.tools.logging import logger  # isort: skip


class Trainer(titan.Trainer):
    """One rank's part of a run. `prepared`: tokenizer and data; `prepare`: what the first rank does before them."""

    def __init__(self, job_config: Any, prepare: Any = lambda: None):
        self._prepare, self._watch = prepare, Unwatched()
        with loss_told_to_all():
            super().__init__(job_config)
        self.metrics_processor.num_tokens = lambda: self.num_tokens
        self._divide()
        self._balance_experts()
        self._guard = NonFiniteGuard(self)
        self.validation_curve = ValidationCurve(held_out(self.prepared), self.prepared.tokenizer, job_config)
        self.pipelined_forward: PipelinedForward | None = None
        if self.pipeline is not None:
            self.pipelined_forward = PipelinedForward(self.pipeline.cut, self.device, self.pipeline.group)
        if self.checkpointer.enable:
            self._check_disk()
            self.checkpointer = TolerantCheckpoints(self.checkpointer, Path(self.checkpointer.folder))

    def init_distributed(self) -> Any:
        """torchtitan's process groups, the machines compared, then the data, prepared by the first rank and read by the others."""
        check_parallelism(self.job_config)
        parallel_dims = super().init_distributed()
        check_batch(self.job_config.training, parallel_dims.dp_replicate * parallel_dims.dp_shard)
        on_first_rank(self._prepare)
        for said in check_environment(self.folder, self.job_config.to_dict(), parallel_dims, self.device):
            logger.warning(said)
        self.prepared = first_rank_first(lambda: adapter.prepared_data(self.job_config))
        return parallel_dims

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.job_config.job.dump_folder)

    def _check_disk(self) -> None:
        needed, kept = checkpoint_bytes(self), self.job_config.checkpoint.keep_latest_k
        said = on_first_rank(lambda: check_disk(Path(self.checkpointer.folder), needed, kept))
        if said:
            logger.warning(said)

    def _divide(self) -> None:
        """What differs where ranks hold parts of weights or of the sequence."""
        dims, body = self.parallel_dims, self.model_parts[0].body
        pieces = dims.tp_enabled or dims.ep_enabled
        self.context: ContextInputs | None = None
        self.pipeline: PipelinedSteps | None = None
        if dims.pp_enabled:
            pipeline = self.pipeline = self.pipelined_steps()
            self.metrics_processor.gradient_norm = lambda: pipeline.norm
            self.metrics_processor.loss_parts = pipeline.loss_parts
            body = pipeline.cut.model.body
        if dims.cp_enabled:
            with_labels = adapter.objective_of(self.job_config).with_labels
            context = self.context = ContextInputs(self.job_config, dims.get_mesh("cp"), with_labels)
            loss_fn = self.loss_fn
            self.loss_fn = lambda outputs, labels: context.counted_once(loss_fn(outputs, labels))
        if pieces and self.pipeline is None:
            clipping = WholeClipping(self)
            self.metrics_processor.gradient_norm = lambda: clipping.norm
        if pieces:
            for name in (MODEL, OPTIMIZER):
                self.checkpointer.states[name] = AtTheirPlaces(self.checkpointer.states[name], body)

    def pipelined_steps(self) -> PipelinedSteps:
        """How this rank takes part in its pipeline."""
        return PipelinedSteps(self)

    def _balance_experts(self) -> None:
        """Bring what the routers of all ranks chose in a step together, where the pass `balance` counts it."""
        mesh = self.parallel_dims.get_mesh("loss") if self.parallel_dims.dp_cp_enabled else None

        def add_ranks(tally: torch.Tensor) -> None:
            if mesh is not None:
                torch.distributed.all_reduce(tally, group=mesh.get_group())

        first = is_first_rank() if mesh is None else mesh.get_local_rank() == 0
        warn = logger.warning if first else lambda said: None
        self.balance = ExpertBalance([part.body for part in self.model_parts], add_ranks, warn, self.pipeline)
        self.balance.follow(self.optimizers.optimizers[0], lambda: self.step)
        self.metrics_processor.balance = self.balance.report
        self._data_ranks = 1 if mesh is None else mesh.size()
        self._microbatches = 1 if self.pipeline is None else self.pipeline.cut.pipeline.num_microbatches

    def post_dataloading_process(self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple:
        """torchtitan's (inputs, labels, further inputs, further options), cut along the sequence where ranks share it."""
        if self.context is None:
            return super().post_dataloading_process(input_dict, labels)
        own, labels = self.context.cut(input_dict, labels)
        return own.pop("input"), labels, own, {}

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """torchtitan's, with the microbatch remembered for an account of what went wrong in it."""
        self._guard.remember(batch)
        with share_of_batch(1 / (self.gradient_accumulation_steps * self._data_ranks * self._microbatches)):
            return self._forward_backward(batch)

    def _forward_backward(self, batch: dict[str, Any]) -> torch.Tensor:
        return super().forward_backward_step(**batch) if self.pipeline is None else self.pipeline.forward_backward(**batch)

    def should_continue_training(self) -> bool:
        """torchtitan's, until the loss is where [ftc] stop_below asks it to be."""
        bound = self.job_config.ftc.stop_below
        return super().should_continue_training() and not (bound > 0 and self.metrics_processor.is_below(bound))

    def train(self) -> None:
        """torchtitan's, under the eyes of a thread that tells where ranks stand when nothing ends."""
        with watching(self.folder, self.job_config, logger.warning) as self._watch:
            super().train()

    def train_step(self, data_iterator: Any) -> None:
        """torchtitan's, and after some steps a measurement on held-out text."""
        self._watch.beat(self.step, "in its step")
        super().train_step(data_iterator)
        self._watch.beat(self.step, "measuring on held-out text")
        self.validation_curve.after_step(self)
        self._watch.beat(self.step, "saving, or reading data", step_ended=True)

    def run_again(self, batch: dict[str, Any]) -> None:
        """Forward and backward of a microbatch once more, from gradients of zero."""
        self.optimizers.zero_grad()
        self._forward_backward(batch)

    @property
    def num_tokens(self) -> int:
        """Tokens that all ranks together were given since the run began, on however many ranks."""
        return self.dataloader.num_samples * self.dataloader.mixture.seq_len

    def tokens_by_source(self) -> dict[str, dict[str, float]]:
        """What each source has given to all ranks together. All ranks must call it."""
        counts = torch.tensor(self.dataloader.tokens(), device=self.device)
        if self.parallel_dims.dp_enabled:
            torch.distributed.all_reduce(counts, group=self.parallel_dims.get_mesh("batch").get_group())
        given = tokens_by_source(self.dataloader.mixture, counts.tolist())
        for each in self.prepared.sources:
            if each.num_skipped:
                given[each.source.name]["skipped"] = each.num_skipped
        return given

    def close(self) -> None:
        """torchtitan's, and the end of the thread that reads ahead."""
        super().close()
        if getattr(self, "dataloader", None) is not None:
            self.dataloader.close()

    def whole_program(self) -> Any:
        """The trained program with all weights on the first rank, on the CPU; None on the others. All ranks must call it."""
        if self.pipeline is not None:
            model, weights = self.pipeline.cut.model, gathered_weights(self.pipeline.cut, self.pipeline.group)
        else:
            model, weights = self.model_parts[0], self._whole_weights()
        if weights is None:
            return None
        program = model.copy
        memo: dict[int, torch.nn.Parameter] = {}
        frozen = bool(self.job_config.ftc.trainable)  # for this run only
        for prefix, host in hosts(program):
            for name, tensor in list(host.named_attributes()):
                owner, _, leaf = name.rpartition(".")
                module = host.get_submodule(owner)
                if leaf in module._parameters:
                    value = memo.setdefault(id(tensor), torch.nn.Parameter(weights[prefix + name], tensor.requires_grad or frozen))
                    module._parameters[leaf] = value
                else:
                    module._buffers[leaf] = weights[prefix + name]
        return program


    def _whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights by name, whole, in the names and shapes before ranks divided them; None but on the first rank."""
        model = self.model_parts[0]
        held = {prefix + name: t for prefix, host in hosts(model.body) for name, t in host.named_attributes()}
        weights: dict[str, torch.Tensor] = {}
        for name, whole in whole_tensors(model.body, held):
            if is_first_rank():
                weights[name] = whole.detach().cpu()
        return without_division(model.body, weights, model.lenses_kept) if is_first_rank() else None


@contextlib.contextmanager
def loss_told_to_all() -> Iterator[None]:
    """Inside, torchtitan does not say that the loss of a pipeline is seen on its last stage alone: here all ranks have it."""
    says, titan.ensure_pp_loss_visible = titan.ensure_pp_loss_visible, lambda *args: None
    try:
        yield
    finally:
        titan.ensure_pp_loss_visible = says


@contextlib.contextmanager
def running(job_config: Any, prepare: Any = lambda: None) -> Iterator[Trainer]:
    """A trainer that is closed at the end, with its process groups, whatever happens, also while it is made."""
    trainer = None
    try:
        trainer = Trainer(job_config, prepare)
        yield trainer
    finally:
        if trainer is not None:
            trainer.close()
        release_ranks()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

"""torchtitan's trainer, with what a run of ours adds: data prepared once, and a copy of the program to save at the end."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ftc.data.mixture import tokens_by_source
from ftc.train import adapter  # before torchtitan: it readies a machine without an accelerator
from ftc.train.batch_size import check_batch
from ftc.train.checkpoints import TolerantCheckpoints
from ftc.train.initial_weights import hosts
from ftc.train.non_finite import NonFiniteGuard
from ftc.train.ranks import first_rank_first, is_first_rank
from ftc.train.validation_curve import ValidationCurve, held_out

import torchtitan.train as titan  # isort: skip


class Trainer(titan.Trainer):
    """One rank's part of a run. `prepared`: tokenizer and data; `prepare`: what the first rank does before them."""

    def __init__(self, job_config: Any, prepare: Any = lambda: None):
        self._prepare = prepare
        super().__init__(job_config)
        self._guard = NonFiniteGuard(self)
        self.validation_curve = ValidationCurve(held_out(self.prepared), self.prepared.tokenizer, job_config)
        if self.checkpointer.enable:
            self.checkpointer = TolerantCheckpoints(self.checkpointer, Path(self.checkpointer.folder))

    def init_distributed(self) -> Any:
        """torchtitan's process groups, then the data, prepared by the first rank and read by the others."""
        parallel_dims = super().init_distributed()
        check_batch(self.job_config.training, parallel_dims.dp_replicate * parallel_dims.dp_shard)

        def prepare() -> Any:
            if is_first_rank():
                self._prepare()
            return adapter.prepared_data(self.job_config)

        self.prepared = first_rank_first(prepare)
        return parallel_dims

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """torchtitan's, with the microbatch remembered for an account of what went wrong in it."""
        self._guard.remember(batch)
        return super().forward_backward_step(**batch)

    def train_step(self, data_iterator: Any) -> None:
        """torchtitan's, and after some steps a measurement on held-out text."""
        super().train_step(data_iterator)
        self.validation_curve.after_step(self)

    def run_again(self, batch: dict[str, Any]) -> None:
        """Forward and backward of a microbatch once more, from gradients of zero."""
        self.optimizers.zero_grad()
        super().forward_backward_step(**batch)

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
        model = self.model_parts[0]
        weights: dict[str, torch.Tensor] = {}
        for prefix, host, _ in hosts(model.body):
            for name, tensor in host.named_attributes():
                full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
                if is_first_rank():
                    weights[prefix + name] = full.cpu()
        if not is_first_rank():
            return None
        program = model.copy
        memo: dict[int, torch.nn.Parameter] = {}
        for prefix, host, _ in hosts(program):
            for name, tensor in list(host.named_attributes()):
                owner, _, leaf = name.rpartition(".")
                module = host.get_submodule(owner)
                if leaf in module._parameters:
                    value = memo.setdefault(id(tensor), torch.nn.Parameter(weights[prefix + name], tensor.requires_grad))
                    module._parameters[leaf] = value
                else:
                    module._buffers[leaf] = weights[prefix + name]
        return program


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
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

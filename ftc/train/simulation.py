"""A rank's first two steps without memory or arithmetic: the run's own code on fake tensors in a fake process group.

Of a pipeline the first rank of each place in it is simulated, with its stages and its schedule: what they hold differs.

    capture, passes (meta)  ->  sharding (meta)  ->  fake tensors: memory, forward, backward, optimizer, twice

The second step is the one that counts: it has optimizer state beside its activations. The weights are not initialised, and
nothing is compiled: regions run operator by operator.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ftc.data.prepare import Prepared
from ftc.parallel.weights import num_whole_parameters
from ftc.train import adapter  # before torchtitan: it readies a machine without an accelerator
from ftc.train.batch_size import check_batch
from ftc.train.division import check_parallelism, release_ranks
from ftc.train.ledger import Ledger, num_bytes
from ftc.train.loop import Trainer
from ftc.train.pipeline_simulation import SimulatedSteps, simulated_pipelining

import torchtitan.train as titan  # isort: skip

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Simulated:
    """What one rank (the first, whose shards are the largest; of a pipeline that with the highest peak) holds and does in a step.
    Bytes, and FLOPs by phase, those of a pipeline the mean over its ranks."""

    num_parameters: int  # of the whole model
    parameter_bytes: int  # this rank's shards, and buffers
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int  # most that a forward pass leaves for its backward pass
    peak_bytes: int
    peak_phase: str  # where the peak is: forward, backward, recomputation, optimizer, between
    flops: dict[str, int]
    tokens: int  # of this rank's step
    batch_degree: int  # ranks that read different data
    rank: int = 0


class SimulatedTrainer(Trainer):
    """The run's trainer, from the moment that memory would be taken on fake tensors that a ledger counts."""

    def __init__(self, job_config: Any, modes: contextlib.ExitStack):
        self._modes = modes
        super().__init__(job_config)
        self.balance.routers.clear()  # fake counts say nothing
        for optimizer in self.optimizers.optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(self.ledger, "phase", "optimizer"))

    @property
    def train_spec(self) -> Any:
        """ftc's own, with the switch to fake tensors after sharding."""
        return self._train_spec

    @train_spec.setter
    def train_spec(self, spec: Any) -> None:
        def parallelize(model: Any, *args: Any) -> Any:
            sharded = spec.parallelize_fn(model, *args)
            self._go_fake([sharded])
            return sharded

        def pipelining(*args: Any) -> Any:
            made = simulated_pipelining(*args)
            self._go_fake(made[1])
            return made

        self._train_spec = replace(spec, parallelize_fn=parallelize, pipelining_fn=pipelining)

    def _go_fake(self, parts: list[Any]) -> None:
        """From here on tensors are fake: parts are sharded, and their shapes are all that is needed of their weights."""
        for part in parts:
            part.init_weights = lambda buffer_device=None, part=part: part.share_tied()
        objective = adapter.objective_of(self.job_config)
        if objective.stored is not None:
            objective.stored = _BlankTeacher(objective.stored.k)
        if self.device.type == "cpu":
            self.device = torch.device("cpu")  # what a real tensor on cpu:0 calls its device
        self._modes.enter_context(torch.compiler.set_stance("force_eager"))
        self.fake = self._modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self.ledger = self._modes.enter_context(Ledger(self.device.type))

    def pipelined_steps(self) -> SimulatedSteps:
        """The trainer's, for one rank without the others."""
        return SimulatedSteps(self)

    def init_distributed(self) -> Any:
        """torchtitan's, in the process group that is there; the data is not prepared."""
        check_parallelism(self.job_config)
        parallel_dims = titan.Trainer.init_distributed(self)
        parallel_dims.build_mesh()  # else at its first use, which may be among fake tensors
        check_batch(self.job_config.training, parallel_dims.dp_replicate * parallel_dims.dp_shard)
        self.prepared = adapter.prepared_data(self.job_config)
        return parallel_dims

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """The run's, with the ledger told what runs."""
        self.ledger.begin_forward()
        loss = super().forward_backward_step(**batch)
        self.ledger.phase = "between"
        return loss

    def fake_batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The run's batches as fake tensors, without end."""
        batches = iter(self.dataloader)
        while True:
            with _disable_current_modes():
                batch = next(batches)
            fake = tree_map_only(torch.Tensor, self.fake.from_tensor, batch)
            self.batch_bytes = num_bytes(tree_leaves(fake))
            for tensor in tree_leaves(fake):
                self.ledger.note(tensor)
            yield fake


@dataclass(frozen=True)
class _BlankTeacher:
    """Gives what ftc.train.stored_teacher.StoredTeacher reads, but for the values."""

    k: int

    def lookup(self, places_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = (*places_BT.shape, self.k)
        return {
            "teacher_ids": places_BT.new_zeros(shape, dtype=torch.int32),
            "teacher_logprobs": places_BT.new_zeros(shape, dtype=torch.float32),
        }


def simulate(job_config: Any, world_size: int, prepared: Prepared) -> Simulated:
    """Run two steps of the first of `world_size` ranks on fake tensors, of a pipeline those of the first rank of each place.

    `prepared`: a tokenizer and token ids of any content, in place of the run's. Raises what the run would raise before its
    third step. Must not run where a process group is open.
    """
    places = job_config.parallelism.pipeline_parallel_degree
    found = []
    for place in range(max(places, 1)):
        rank = place * world_size // max(places, 1)  # places are the outermost dimension of the mesh
        found.append(_simulate_rank(copy.deepcopy(job_config), rank, world_size, prepared))
    most = max(found, key=lambda each: each.peak_bytes)
    phases = {phase for each in found for phase in each.flops}
    return replace(most, flops={phase: sum(each.flops.get(phase, 0) for each in found) // len(found) for phase in phases})


def _simulate_rank(job_config: Any, rank: int, world_size: int, prepared: Prepared) -> Simulated:
    with contextlib.ExitStack() as outer:
        outer.enter_context(_fake_process_group(world_size, rank))
        outer.callback(release_ranks)
        outer.enter_context(adapter.standing_in(prepared))
        with contextlib.ExitStack() as modes:
            trainer = SimulatedTrainer(job_config, modes)
            outer.callback(trainer.close)
            return replace(_two_steps(trainer), rank=rank)


def _two_steps(trainer: SimulatedTrainer) -> Simulated:
    ledger, parts = trainer.ledger, trainer.model_parts
    sizes: dict[str, int] = {}

    def before_update(*_: Any) -> None:
        sizes["gradient_bytes"] = num_bytes(p.grad for part in parts for p in part.parameters())

    trainer.optimizers.optimizers[0].register_step_pre_hook(before_update)
    batches = trainer.batch_generator(trainer.fake_batches())
    num_microbatches = trainer.gradient_accumulation_steps
    for trainer.step, simulated in ((1, 1), (2, min(2, num_microbatches))):  # the third is like the second
        trainer.gradient_accumulation_steps = simulated
        ledger.reset_peak()
        trainer.train_step(batches)
        ledger.phase = "between"
    dims, training = trainer.parallel_dims, trainer.job_config.training
    pipeline = trainer.pipeline
    return Simulated(
        num_parameters=num_whole_parameters(parts[0].body if pipeline is None else pipeline.cut.model.body),
        parameter_bytes=num_bytes(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())),
        optimizer_bytes=num_bytes(
            t for o in trainer.optimizers.optimizers for t in tree_leaves(list(o.state.values()))
        ),
        activation_bytes=ledger.activation_bytes if pipeline is None else pipeline.activation_bytes,
        peak_bytes=ledger.peak_bytes + trainer.batch_bytes * (num_microbatches - simulated),
        peak_phase=ledger.peak_phase,
        flops={p: n if p == "optimizer" else n * num_microbatches // simulated for p, n in ledger.flops.items()},
        tokens=training.local_batch_size * training.seq_len * num_microbatches,
        batch_degree=dims.get_mesh("batch").size() if dims.dp_enabled else 1,
        **sizes,
    )


@contextlib.contextmanager
def _fake_process_group(world_size: int, rank: int) -> Iterator[None]:
    """A rank of a group of that size in which collectives return at once, with the environment torchrun sets."""
    before = {name: os.environ.get(name) for name in _RANK}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)

"""ftc as a torchtitan model: `TrainSpec` "ftc", model converter "ftc". With its neighbours the only code that imports torchtitan."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ftc.train import device

device.install()  # before torchtitan is imported

from torchtitan.components.lr_scheduler import build_lr_schedulers  # noqa: E402
from torchtitan.protocols.model_converter import register_model_converter  # noqa: E402
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec  # noqa: E402

from ftc.data.checkpoint_tokenizer import check_vocabulary, checkpoint_tokenizer  # noqa: E402
from ftc.data.mixture import check_size, mixture  # noqa: E402
from ftc.data.prepare import Prepared, prepare  # noqa: E402
from ftc.train.config import sources_of  # noqa: E402
from ftc.train.dataloader import PackedDataLoader  # noqa: E402
from ftc.train.division import check_parallelism, division_passes  # noqa: E402
from ftc.train.metrics import build_metrics  # noqa: E402
from ftc.train.model import Flavors, TrainedModel  # noqa: E402
from ftc.train.objective import Objective, build_objective  # noqa: E402
from ftc.train.optimizers import build_optimizers  # noqa: E402
from ftc.train.parallelize import parallelize  # noqa: E402
from ftc.train.pipeline import pipelining  # noqa: E402

COMPILED_LOSSES = ("next-token", "cross-entropy")  # no options, no schedule, no teacher


@lru_cache(maxsize=1)
def _prepare(folder: str, sources: tuple[Any, ...], settings: tuple[tuple[str, Any], ...]) -> Prepared:
    return prepare(folder, sources, **dict(settings))


_stand_in: list[Prepared] = []


@contextlib.contextmanager
def standing_in(prepared: Prepared) -> Iterator[None]:
    """Inside, every run has `prepared` for its data, and its passes are applied without proof."""
    _stand_in.append(prepared)
    _objectives.clear()
    try:
        yield
    finally:
        _stand_in.pop()
        _objectives.clear()


def prepared_data(job_config: Any) -> Prepared:
    """The run's tokenizer and tokens, made on first use and kept in the run's folder."""
    if _stand_in:
        return _stand_in[-1]
    section, folder = job_config.ftc, Path(job_config.job.dump_folder)
    settings = {name: getattr(section, name) for name in ("validation_fraction", "vocab_size", "tokenizer")}
    if section.model:
        settings["tokenizer"] = checkpoint_tokenizer(section.model, section.tokenizer)
    settings["resuming"] = any((folder / job_config.checkpoint.folder).glob("step-*/.metadata"))
    return _prepare(str(folder), tuple(sources_of(vars(section))), tuple(settings.items()))


_objectives: dict[int, tuple[Any, Objective]] = {}  # by the run's configuration, which is kept alive with it


def objective_of(job_config: Any) -> Objective:
    """What the run minimises, made on first use."""
    if id(job_config) not in _objectives:
        section, prepared = job_config.ftc, prepared_data(job_config)

        def stream() -> Any:
            return None if _stand_in else prepared.train.stream(prepared.tokenizer)

        _objectives.clear()
        made = build_objective(section.loss, section.passes, stream, section.document_mask)
        _objectives[id(job_config)] = job_config, made
    return _objectives[id(job_config)][1]


class FtcConverter:
    """The model converter "ftc": capture, then the passes of `[ftc] passes`, on the meta device, before sharding."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        self.job_config = job_config
        check_parallelism(job_config)

    def convert(self, model: TrainedModel) -> None:
        """Replace the model's body by the rewritten program, in place."""
        tokenizer = prepared_data(self.job_config).tokenizer
        check_vocabulary(tokenizer, model.vocab_size, from_checkpoint=bool(self.job_config.ftc.model))
        model.capture(division_passes(self.job_config), prove=not _stand_in)

    def post_optimizer_hook(self, model: Any) -> None:
        pass


def _build_tokenizer(job_config: Any) -> Any:
    return prepared_data(job_config).tokenizer


def _build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> PackedDataLoader:
    section, training = job_config.ftc, job_config.training
    mixed = mixture(
        prepared_data(job_config),
        training.seq_len,
        packing=section.packing,
        document_mask=section.document_mask,
        seed=job_config.debug.seed or 0,
    )
    micro_step = training.local_batch_size * dp_world_size
    check_size(mixed, max(training.global_batch_size, micro_step), training.steps)
    objective = objective_of(job_config)
    return PackedDataLoader(
        mixed,
        training.local_batch_size,
        dp_rank,
        dp_world_size,
        with_labels=objective.with_labels,
        with_places=objective.with_places,
    )


def _build_loss(job_config: Any, **kwargs: Any) -> Any:
    """The sum over tokens, as torchtitan divides by their number itself; compiled where asked and where it is fixed."""
    objective = objective_of(job_config)
    if job_config.compile.enable and "loss" in job_config.compile.components and objective.spec.name in COMPILED_LOSSES:
        return torch.compile(objective.spec.function, backend=job_config.compile.backend)
    return objective


def train_spec() -> TrainSpec:
    """Everything torchtitan needs to train a model of ours."""
    return TrainSpec(
        model_cls=TrainedModel,
        model_args=Flavors(),
        parallelize_fn=parallelize,
        pipelining_fn=pipelining,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=_build_dataloader,
        build_tokenizer_fn=_build_tokenizer,
        build_loss_fn=_build_loss,
        build_metrics_processor_fn=build_metrics,
    )


register_train_spec("ftc", train_spec())
register_model_converter(FtcConverter, "ftc")

"""What a run would need, before it takes anything: its checks, memory of a rank, and FLOPs of a step."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ftc.errors import FtcError
from ftc.train.config import dump_toml
from ftc.train.launch import check_run, missing_files, resolve

_DEGREES = (
    "data_parallel_replicate",
    "data_parallel_shard",
    "context_parallel",
    "tensor_parallel",
    "pipeline_parallel",
)


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found. Bytes are those of one rank: the first, whose shards are the largest, or of a pipeline the first of the
    place with the highest peak. FLOPs are those of one step."""

    ranks: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int
    peak_phase: str
    model_flops: int  # of a rank, the mean over a pipeline's: forward and backward
    rank_flops: int  # with what is computed a second time, and the optimizer's products
    tokens: int  # of all ranks
    batch_degree: int  # ranks that read different data
    missing: tuple[str, ...]  # files that must be there before the run
    notes: tuple[str, ...]
    rank: int = 0  # whose bytes these are

    @property
    def global_flops(self) -> int:
        return self.rank_flops * self.ranks

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs for a token, forward and backward."""
        return self.model_flops * self.ranks / self.tokens

    def fits(self, device_bytes: int) -> bool:
        """Whether the peak is within a device's memory. What the CUDA context, the allocator's gaps and NCCL take is not in it."""
        return self.peak_bytes <= device_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"global_flops": self.global_flops, "flops_per_token": self.flops_per_token}


def dry_run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    num_ranks: int | None = None,
) -> DryRun:
    """Check a run file as a run would, and simulate two steps of its first rank (ftc.train.simulation).

    config, overrides: as for `ftc.train.launch.train`. num_ranks: of all machines; None: what [parallelism] comes to. Data
    and tokenizer may be missing and are not read; all else that the run would refuse raises FtcError.
    """
    values = resolve(config, overrides)
    missing = missing_files(values)
    check_run(values, files=False)
    ranks = _num_ranks(values.get("parallelism", {}), num_ranks)
    with tempfile.TemporaryDirectory() as folder, _quietly():
        job_config = _quiet_config(values, Path(folder))
        notes = _notes(job_config)
        prepared = _stand_in(job_config, ranks)
        from ftc.train.simulation import simulate

        try:
            found = simulate(job_config, ranks, prepared)
        except (FtcError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise FtcError(f"the run would end before its third step: {type(error).__name__}: {error}") from error
    model_flops = found.flops.get("forward", 0) + found.flops.get("backward", 0)
    kept = {name: getattr(found, name) for name in DryRun.__dataclass_fields__ if hasattr(found, name)}
    kept["tokens"] = found.tokens * found.batch_degree
    return DryRun(
        **kept,
        ranks=ranks,
        model_flops=model_flops,
        rank_flops=sum(found.flops.values()),
        missing=tuple(missing),
        notes=tuple(notes),
    )


def _num_ranks(parallelism: Mapping[str, Any], given: int | None) -> int:
    """The number of ranks: as given, or the product of the degrees. FtcError where the two cannot agree."""
    if given is not None and given < 1:
        raise FtcError(f"{given} ranks cannot train; use 1 or more")
    degrees = {name: parallelism.get(f"{name}_degree", -1 if name == "data_parallel_shard" else 1) for name in _DEGREES}
    fixed = int(np.prod([degree for degree in degrees.values() if degree > 0]))
    if given is None:
        return fixed
    if given % fixed or (degrees["data_parallel_shard"] > 0 and given != fixed):
        said = ", ".join(f"{name}_degree = {degree}" for name, degree in degrees.items() if degree != 1)
        raise FtcError(f"{given} ranks do not go with [parallelism] {said}; their product is {fixed}")
    return given


def _quiet_config(values: dict[str, Any], folder: Path) -> Any:
    """torchtitan's configuration of the run, with `folder` for its files and nothing that writes or waits."""
    from ftc.train.trainer import load_config

    values = values | {"job": values.get("job", {}) | {"dump_folder": str(folder)}}
    path = folder / "run.toml"
    path.write_text(dump_toml(values))
    config = load_config([f"--job.config_file={path}"])
    config.checkpoint.enable = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.profiling.enable_profiling = config.profiling.enable_memory_snapshot = False
    return config


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the log and the warnings of a run that starts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _notes(config: Any) -> list[str]:
    notes = []
    if config.parallelism.pipeline_parallel_degree > 1:
        notes.append("a pipeline's ranks hold different stages: bytes are those of the one with the highest peak, FLOPs the mean")
    if config.compile.enable:
        notes.append("nothing is compiled here: compiled regions keep and compute less")
    if config.training.enable_cpu_offload:
        notes.append(
            "with enable_cpu_offload, parameters and optimizer state are in the machine's memory, and counted there"
        )
    return notes


def _stand_in(config: Any, ranks: int) -> Any:
    """A tokenizer of the run's vocabulary and one document that fills a step, for data that is not read."""
    from ftc.data.prepare import Prepared, PreparedSource
    from ftc.data.source_table import Source
    from ftc.data.tokens import EMPTY, TokenizedText

    training = config.training
    windows = max(training.local_batch_size * ranks, training.global_batch_size)
    num_tokens = (windows + 1) * training.seq_len + 1
    text = TokenizedText(np.zeros(num_tokens, np.int32), np.array([num_tokens]), num_tokens)
    source = PreparedSource(Source("stdlib"), text, EMPTY)
    return Prepared(_tokenizer(config), Path(config.job.dump_folder), (source,))


def _tokenizer(config: Any) -> Any:
    """The run's, where it is there; else a name for that of the model, or for the one that is trained."""
    from ftc.data.checkpoint_tokenizer import checkpoint_tokenizer
    from ftc.data.tokenizer import load_tokenizer

    section = config.ftc
    if section.tokenizer and not Path(section.tokenizer).exists():
        return SimpleNamespace(vocab_size=_vocabulary(config), bos_id=0, eos_id=0)
    given = checkpoint_tokenizer(section.model, section.tokenizer) if section.model else section.tokenizer
    return load_tokenizer(given) if given else SimpleNamespace(vocab_size=section.vocab_size, bos_id=0, eos_id=0)


def _vocabulary(config: Any) -> int:
    """Of the model that the run trains."""
    section = config.ftc
    if section.model:
        from ftc.open_model import open_blueprint
        from ftc.train.model import token_embedding

        return token_embedding(open_blueprint(section.model))[1]
    from ftc.models.presets import preset

    return preset(config.model.flavor, **section.architecture).vocab_size

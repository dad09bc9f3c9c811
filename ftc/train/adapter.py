"""ftc as a torchtitan model: `TrainSpec` "ftc", model converter "ftc". With its neighbours the only code that imports torchtitan.

A model is built with its real initial weights on the CPU, rewritten there, and its weights are put back after torchtitan's
`to_empty`. Building on the meta device, sharding and pipelines come with parallel training, in `parallelize` below.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ftc.train import device

device.install()  # before torchtitan is imported

from torchtitan.components.lr_scheduler import build_lr_schedulers  # noqa: E402
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol  # noqa: E402
from torchtitan.protocols.model_converter import register_model_converter  # noqa: E402
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec  # noqa: E402

from ftc.data.tokens import Prepared, prepare  # noqa: E402
from ftc.errors import FtcError, nearest  # noqa: E402
from ftc.train.config import Ftc  # noqa: E402
from ftc.train.dataloader import PackedDataLoader  # noqa: E402
from ftc.train.initialization import initialize_from_bigrams  # noqa: E402
from ftc.train.metrics import build_metrics  # noqa: E402
from ftc.train.objective import Objective, build_objective  # noqa: E402
from ftc.train.optimizers import build_optimizers  # noqa: E402

COMPILED_LOSSES = ("next-token", "cross-entropy")  # no options, no schedule, no teacher


@lru_cache(maxsize=1)
def _prepare(folder: str, settings: tuple[tuple[str, Any], ...]) -> Prepared:
    return prepare(folder, **dict(settings))


def prepared_data(job_config: Any) -> Prepared:
    """The run's tokenizer and tokens, made on first use and kept in the run's folder."""
    names = ("data", "validation_data", "validation_fraction", "tokenizer", "vocab_size")
    settings = tuple((name, getattr(job_config.ftc, name)) for name in names)
    return _prepare(job_config.job.dump_folder, settings)


_objectives: dict[int, tuple[Any, Objective]] = {}  # by the run's configuration, which is kept alive with it


def objective_of(job_config: Any) -> Objective:
    """What the run minimises, made on first use."""
    if id(job_config) not in _objectives:
        section, prepared = job_config.ftc, prepared_data(job_config)
        stream = prepared.train.stream(prepared.tokenizer)
        _objectives.clear()
        _objectives[id(job_config)] = job_config, build_objective(section.loss, section.passes, stream)
    return _objectives[id(job_config)][1]


@dataclass
class ModelArgs(BaseModelArgs):
    """Which model to build: a preset (the flavor) with changed fields, or the checkpoint of the `[ftc]` section."""

    flavor: str = "quickstart"
    section: Ftc = field(default_factory=Ftc)
    architecture: dict[str, Any] = field(default_factory=dict)
    objective = None  # no field: torchtitan logs the fields as JSON

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take the `[ftc]` section; a preset gets the tokenizer's vocabulary and special tokens."""
        self.section, self.objective = job_config.ftc, objective_of(job_config)
        tokenizer = prepared_data(job_config).tokenizer
        if not self.section.model:
            special = {"bos_token_id": tokenizer.bos_id, "vocab_size": tokenizer.vocab_size}
            special["eos_token_ids"] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
            self.architecture = special | self.section.architecture

    def build(self) -> nn.Module:
        """The model on the CPU, in train mode, with its initial weights."""
        if self.section.model:
            from ftc.models import load

            return load(self.section.model).train()
        from ftc.models.decoder import Decoder
        from ftc.models.presets import preset

        return Decoder(preset(self.flavor, **self.architecture))

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and 6 FLOPs a token for each that is multiplied (the embedding is looked up)."""
        num_parameters = sum(p.numel() for p in model.parameters())
        lookups = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        tied = len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
        return num_parameters, 6 * (num_parameters - (0 if tied else lookups))


def model_args(job_config: Any) -> ModelArgs:
    """The run's model arguments, resolved."""
    arguments = ModelArgs(flavor=job_config.model.flavor)
    arguments.update_from_config(job_config)
    return arguments


class _Flavors(Mapping):
    """Every preset as a flavor; a checkpoint needs none."""

    def __getitem__(self, name: str) -> ModelArgs:
        from ftc.models.presets import PRESETS

        if name not in PRESETS:
            raise FtcError(f"[model] flavor {name!r} is not a preset; {nearest(name, PRESETS)}")
        return ModelArgs(flavor=name)

    def __iter__(self) -> Iterator[str]:
        from ftc.models.presets import PRESETS

        return iter(PRESETS)

    def __len__(self) -> int:
        return len(list(iter(self)))


class TrainedModel(ModelProtocol):
    """torchtitan's view of a model: tokens in, what the loss takes out, initial weights on demand."""

    def __init__(self, model_args: ModelArgs):
        super().__init__(model_args)
        self.section, self.objective = model_args.section, model_args.objective
        with torch.device("cpu"):  # torchtitan builds under the meta device
            self.body = model_args.build()
        self._remember_weights()

    @property
    def vocab_size(self) -> int:
        """How many ids the model's embedding knows."""
        return next(m.num_embeddings for m in self.body.modules() if isinstance(m, nn.Embedding))

    def forward(self, tokens: Tensor, labels: Tensor | None = None, places: Tensor | None = None) -> Any:
        """tokens, labels, places in the stream: int64 [B, T]. Logits [B, T, V], or what else the run's loss takes."""
        return self.objective.outputs(self.body, tokens, labels, places)

    def start_from(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Put `change(body)` in the model's place; its weights become the initial ones."""
        with torch.device("cpu"):
            self.body = change(self.body)
        self.body.train()
        self._remember_weights()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Restore the initial parameters and buffers, which `to_empty` has lost."""
        for name, tensor in self._tensors():
            tensor.copy_(self._initial[name])
        self._initial = {}

    def _remember_weights(self) -> None:
        self._initial = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.body.named_parameters()
        yield from self.body.named_buffers()


class FtcConverter:
    """The model converter "ftc": initialization from the text, then the passes of `[ftc] passes`, before sharding."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        self.job_config = job_config

    def convert(self, model: TrainedModel) -> None:
        section = self.job_config.ftc
        prepared = prepared_data(self.job_config)
        if prepared.tokenizer.vocab_size > model.vocab_size:
            raise FtcError(
                f"the tokenizer has {prepared.tokenizer.vocab_size} ids, but the model knows {model.vocab_size}; "
                "set [ftc] tokenizer to the model's own"
            )
        if section.initialization == "bigram" and not section.model:
            model.start_from(lambda body: initialize_from_bigrams(body, prepared.train.stream(prepared.tokenizer)))
        if objective_of(self.job_config).with_labels:
            objective_of(self.job_config).learn_call(model.body, model.vocab_size)
        if section.passes:
            model.start_from(lambda body: self._rewrite(body, model.vocab_size))

    def _rewrite(self, body: nn.Module, vocab_size: int) -> nn.Module:
        import ftc

        ids_BT = torch.randint(vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
        objective = objective_of(self.job_config)
        example = objective.call(ids_BT, ids_BT) if objective.with_labels else {"input_ids": ids_BT}
        passes = with_end_of_text(self.job_config.ftc.passes, prepared_data(self.job_config).tokenizer.eos_id)
        return ftc.rewrite(body, passes, example=example, inplace=True)

    def post_optimizer_hook(self, model: Any) -> None:
        pass


def with_end_of_text(passes: list[Any], end_of_text: int | None) -> list[Any]:
    """The passes as requests; those with an option `end_of_text` that is not set get the tokenizer's."""
    from ftc.rewrite.registry import Request, parse_passes

    found = []
    for request in parse_passes(passes):
        open_option = getattr(request.pass_, "end_of_text", 0) is None and end_of_text is not None
        pass_ = replace(request.pass_, end_of_text=end_of_text) if open_option else request.pass_
        found.append(Request(pass_, request.expect))
    return found


def parallelize(model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """One process: compile the blocks where asked. Raises FtcError for what needs more."""
    if parallel_dims.world_size != 1:
        raise FtcError(
            f"training runs in one process, but {parallel_dims.world_size} were launched; use --nproc_per_node=1"
        )
    if job_config.activation_checkpoint.mode != "none":
        raise FtcError(
            f"activation_checkpoint.mode is {job_config.activation_checkpoint.mode!r}; only 'none' is supported"
        )
    if job_config.compile.enable and "model" in job_config.compile.components:
        if hasattr(model.body, "regions"):
            model.body.compile()
        else:
            for blocks in (m for m in model.body.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks:
                    block.compile(backend=job_config.compile.backend)
    return model


def _build_tokenizer(job_config: Any) -> Any:
    return prepared_data(job_config).tokenizer


def _build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> PackedDataLoader:
    return PackedDataLoader(
        prepared_data(job_config).train.stream(tokenizer),
        batch=job_config.training.local_batch_size,
        seq_len=job_config.training.seq_len,
        seed=job_config.debug.seed or 0,
        rank=dp_rank,
        world_size=dp_world_size,
        with_labels=objective_of(job_config).with_labels,
        with_places=objective_of(job_config).with_places,
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
        model_args=_Flavors(),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=_build_dataloader,
        build_tokenizer_fn=_build_tokenizer,
        build_loss_fn=_build_loss,
        build_metrics_processor_fn=build_metrics,
    )


register_train_spec("ftc", train_spec())
register_model_converter(FtcConverter, "ftc")

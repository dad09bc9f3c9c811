"""What is trained, as torchtitan sees it: built without memory on the meta device, captured, rewritten, and only then filled.

    blueprint (meta)  ->  capture, passes (meta)  ->  sharding  ->  memory of this rank's shards  ->  weights, from rank 0

Only the first rank holds the whole model, and only while its weights are handed out. The exception: a checkpoint trained by
a loss that gives it the labels is loaded by every rank once, to learn how it takes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from ftc.data.tokens import start_id
from ftc.errors import FtcError, nearest
from ftc.train.config import Ftc
from ftc.train.documents_apart import apart_inputs, check_apart, packed_inputs
from ftc.train.initial_weights import hand_out, hosts
from ftc.train.trainable import train_only


@dataclass
class ModelArgs(BaseModelArgs):
    """Which model to build: a preset (the flavor) with changed fields, or the checkpoint of the `[ftc]` section."""

    flavor: str = "quickstart"
    section: Ftc = field(default_factory=Ftc)
    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    end_of_text: int | None = None  # the id at which each document of a stream begins
    objective = None  # what the run minimises; no field, as fields are logged as JSON
    bigram_stream = None  # the training text, where the weights begin as its bigram model; no field, as fields are logged

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take the `[ftc]` section; a preset gets the tokenizer's vocabulary and special tokens."""
        from ftc.train.adapter import objective_of, prepared_data

        self.section, self.objective = job_config.ftc, objective_of(job_config)
        self.seed = job_config.debug.seed or 0
        prepared = prepared_data(job_config)
        tokenizer = prepared.tokenizer
        self.end_of_text = start_id(tokenizer)
        if not self.section.model:
            special = {"bos_token_id": tokenizer.bos_id, "vocab_size": tokenizer.vocab_size}
            special["eos_token_ids"] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
            self.architecture = special | self.section.architecture
            if self.section.initialization == "bigram" and self._preset().latent is not None:
                raise FtcError('initialization "bigram" sets heads of grouped-query attention; a preset with latent attention has none')
            if self.section.initialization == "bigram":
                self.bigram_stream = prepared.train.stream(tokenizer)
                if len(self.bigram_stream) < 2:
                    raise FtcError('initialization "bigram" counts the text of sources that are held, and all are streamed')

    def blueprint(self) -> nn.Module:
        """The model in train mode without memory for its weights: parameters on the meta device, buffers real."""
        if self.section.model:
            from ftc.open_model import open_blueprint

            return open_blueprint(self.section.model).train()
        from ftc.models.checkpoints.skeleton import meta_decoder

        return meta_decoder(self._preset()).train()

    def build(self) -> nn.Module:
        """The model on the CPU in train mode with its initial weights, the same on every machine for one seed."""
        if self.section.model:
            from ftc.open_model import open_model

            return open_model(self.section.model).train()
        from ftc.models.decoder import Decoder
        from ftc.train.initialization import initialize_from_bigrams

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Decoder(self._preset())
            return model if self.bigram_stream is None else initialize_from_bigrams(model, self.bigram_stream)

    def _preset(self):
        from ftc.models.presets import preset

        return preset(self.flavor, **self.architecture)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and FLOPs a token: 6 for each that is trained, 2 for another; the embedding is looked up."""
        num_parameters = sum(p.numel() for p in model.parameters())
        tied = len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
        multiplied = [p for p in model.parameters() if tied or p is not model.embedding]
        return num_parameters, sum((6 if p.requires_grad else 2) * p.numel() for p in multiplied)


def model_args(job_config: Any) -> ModelArgs:
    """The run's model arguments, resolved."""
    arguments = ModelArgs(flavor=job_config.model.flavor)
    arguments.update_from_config(job_config)
    return arguments


class Flavors(Mapping):
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
    """torchtitan's view of a model: tokens in, logits (or the loss) out, initial weights on demand."""

    def __init__(self, model_args: ModelArgs):
        super().__init__(model_args)
        self.model_args, self.section, self.objective = model_args, model_args.section, model_args.objective
        with torch.device("cpu"):  # torchtitan builds under the meta device, where buffers would be lost
            self.body = model_args.blueprint()
        self._embedding, self.vocab_size = token_embedding(self.body)
        self.apart_names = apart_inputs(self.body) if self.section.document_mask else ()

    @property
    def embedding(self) -> Tensor:
        """The token embedding, [V, D]."""
        return self.body.get_parameter(self._embedding)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Logits [B, T, V], or what else the run's loss takes. All inputs are int64 [B, T].

        places: where in the stream each token stands. position_ids begin anew with each document, and keep documents apart.
        """
        apart = {} if position_ids is None else packed_inputs(position_ids, self.apart_names)
        return self.objective.outputs(self.body, tokens, labels, places, apart)

    def capture(self, division: Sequence[tuple[str, dict[str, Any]]] = (), prove: bool = True) -> None:
        """Put a captured program, with the passes of the run applied, in the model's place. The model takes no memory; with
        `prove` the first rank proves the passes on real numbers, which take that of a block and its inputs.

        `division`: the passes that divide it over ranks, of which the copy that is saved in the end knows nothing.
        """
        import ftc
        from ftc.train.ranks import is_first_rank

        with torch.device("cpu"):
            if self.objective.with_labels and self.section.model:
                self.objective.learn_call(self.model_args.build(), self.vocab_size)
            ids_BT = torch.randint(self.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
            apart = {}
            if self.section.document_mask:
                apart = packed_inputs(torch.arange(12).remainder(5).expand(2, 12), self.apart_names)
            example = self.objective.call(ids_BT, ids_BT if self.objective.with_labels else None, apart)
            self.lenses_given = _lenses_of(self.body)
            passes = with_end_of_text(self.section.passes, self.model_args.end_of_text)
            check = prove and is_first_rank()
            late = [request for request in passes if request.name == "float8"] if division else []  # on a rank's own products, once they are divided
            passes = [request for request in passes if request not in late]
            self.body = ftc.rewrite(self.body, passes, example=example, inplace=True, check=check)
            self.body.train()
            if self.body.axes:
                named = next(iter(self.body.axes.values()))["pass"]
                degree = f"{named.replace('-', '_')}_degree"
                raise FtcError(f"the pass {named} is not for [ftc] passes: set [parallelism] {degree}, and it is applied")
            self.__dict__["copy"] = ftc.rewrite(self.body, late, check=False)  # no submodule: without memory, to be filled when the model is saved
            self.lenses_kept = {prefix: len(host.code.lenses) for prefix, host in hosts(self.body)}
            self.body = ftc.rewrite(self.body, [*division, *late], inplace=True, check=check)
        train_only(self.body, self.section.trainable)
        names: dict[int, list[str]] = {}
        for name, parameter in self.body.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._tied = [tied for tied in names.values() if len(tied) > 1]

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill this rank's shards of parameters and all buffers with the initial weights, which the first rank builds."""
        from ftc.train.ranks import is_first_rank

        self.share_tied()
        with torch.device("cpu"):
            source = self.initial_model() if is_first_rank() else None
        hand_out(self.body, source, self.lenses_given)

    def initial_model(self) -> nn.Module:
        """The model that the run starts from, with its weights. FtcError where it does not keep documents apart as it should."""
        source = self.model_args.build()
        if self.section.document_mask:
            check_apart(source, self.vocab_size, self.apart_names)
        return source

    def share_tied(self) -> None:
        """Make one of parameters that are one, in place: the meta device knows nothing of sharing."""
        for first, *others in self._tied:
            for name in others:
                owner, _, leaf = name.rpartition(".")
                self.body.get_submodule(owner)._parameters[leaf] = self.body.get_parameter(first)


def token_embedding(model: nn.Module) -> tuple[str, int]:
    """The name of the parameter that is a model's token embedding, and its number of ids. FtcError where there is none."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    names = [name for name, parameter in model.named_parameters() if any(parameter is weight for weight in weights)]
    if not names and hasattr(model, "codes"):  # a saved program, which holds graphs and no modules
        nodes = [node for variant in model.code.all_variants() for node in variant.captured.graph.nodes]
        names = [str(node.args[0].target) for node in nodes if node.target is torch.ops.aten.embedding.default]
    if not names:
        raise FtcError(f"{type(model).__name__} has no token embedding (nn.Embedding), so it is no language model")
    return names[0], model.get_parameter(names[0]).shape[0]


def _lenses_of(model: nn.Module) -> dict[str, int]:
    """How many lenses the weights of a saved program have been through, by host; none of another model."""
    from ftc.capture.program import Program

    return {prefix: len(host.code.lenses) for prefix, host in hosts(model)} if isinstance(model, Program) else {}


def with_end_of_text(passes: list[Any], end_of_text: int | None) -> list[Any]:
    """The passes as requests; those with an option `end_of_text` that is not set get the tokenizer's."""
    from ftc.rewrite.registry import Request, parse_passes

    found = []
    for request in parse_passes(passes):
        open_option = getattr(request.pass_, "end_of_text", 0) is None and end_of_text is not None
        pass_ = replace(request.pass_, end_of_text=end_of_text) if open_option else request.pass_
        found.append(Request(pass_, request.expect))
    return found

"""Stages: each a module with some of a program's regions and the code around them, called one after the other.

    first, middle, last = ftc.pipeline.cut(program, (2, 4))
    crossing = first(input_ids=ids)                       # a tuple of tensors
    crossing = middle(*crossing, input_ids=ids)
    result = last(*crossing, input_ids=ids)               # what program(input_ids=ids) gives, the same bits

Every stage is given the inputs of the program as keywords, and computes masks, positions and rotary tables from them for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from ftc.capture.captured import compile_graph
from ftc.capture.code import Code
from ftc.capture.program import Captured, Program, Region
from ftc.capture.results import extras, pruned
from ftc.capture.variants import Hole, Variant
from ftc.errors import FtcError
from ftc.pipeline.cut_examples import examples
from ftc.pipeline.cut_graph import Piece, cut_graph
from ftc.pipeline.stages_capture import WholeShell


class Pieces:
    """The cuts of all variants of a program's shell, made when they are first called and shared by its stages."""

    def __init__(self, program: Program, stage_of: Mapping[str, int], num_stages: int):
        self.program, self.stage_of, self.num_stages = program, dict(stage_of), num_stages
        self.parameters = [name for name, t in program.named_attributes() if isinstance(t, nn.Parameter)]
        self._made: dict[tuple[int, bool], tuple] = {}

    def of(self, variant: Variant, whole: bool) -> tuple[list[Piece], dict[int, int]]:
        """The pieces of a variant, and where each result that the call returns stands among those of the last piece.

        With `whole` they compute the results that have names too (`Program.with_extras`).
        """
        made = self._made.get((id(variant), whole))
        if made is None or made[0] is not variant or made[1] is not variant.captured.graph:
            graph = variant.captured.graph
            wanted = [leaf.index for leaf in variant.outputs if isinstance(leaf, Hole)]
            kept, places = (graph, {place: place for place in wanted}) if whole else pruned(graph, wanted)
            pieces = cut_graph(kept, self.stage_of, self.num_stages, self.parameters)
            made = self._made[id(variant), whole] = (variant, graph, pieces, places)
        return made[2], made[3]


class StageBody(Captured):
    """What a stage holds: its regions (the program's own objects), and the parameters and buffers that its code reads, by their names in
    the program. To be sharded, compiled and recomputed region by region as a program is.

    `train()` and `compute_dtype` are those of the program and all its stages: they are in one mode together.
    """

    def __init__(self, program: Program, index: int, pieces: Pieces, regions: list[Region]):
        self.__dict__["program"] = program  # no submodule: it holds every stage's parameters
        super().__init__(program.kind, f"stage {index}")
        self.index, self._pieces = index, pieces
        self._regions = {region.ftc_name: region for region in regions}
        self.state, self.divided, self.bound = program.state, program.divided, program.bound
        self._compiled: dict[tuple[int, bool], tuple] = {}
        self.runner: Callable | None = None  # runs the stage's graph in another way: runner(body, variant, graph, tensors) -> its results
        self.training = program.training
        self.tied: list[tuple[str, ...]] = []  # names here of one parameter

    def share_tied(self) -> None:
        """Make one again of parameters that are one under several names, in place: what gives memory to the meta device knows nothing of sharing."""
        for first, *others in self.tied:
            for name in others:
                owner, _, leaf = name.rpartition(".")
                self.get_submodule(owner)._parameters[leaf] = self.get_parameter(first)
        for captured in (self, *self.regions):
            captured.forget()

    @property
    def regions(self) -> list[Region]:
        """Those of this stage."""
        return list(self._regions.values())

    @property
    def code(self) -> Code:
        """The code of the whole shell; its lenses also speak of parameters that other stages hold."""
        return self.program.code

    @property
    def codes(self) -> list[Code]:
        return [*dict.fromkeys(region.code for region in self.regions), self.code]

    @property
    def axes(self) -> dict[str, dict]:
        return self.program.axes

    @property
    def _applied(self) -> list[dict]:
        return self.program._applied

    @property
    def _added(self) -> dict[str, dict]:
        return {name: about for name, about in self.program._added.items() if name in self._regions}

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of parameters while they run, for all regions of the program alike: graphs are captured from all of it."""
        return self.program.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        if "_pieces" in vars(self):  # not while it is built, when it takes the program's
            for captured in (self.program, *self.program.regions):
                captured.compute_dtype = dtype

    def train(self, mode: bool = True) -> StageBody:
        super().train(mode)
        if self.program.training != mode or any(region.training != mode for region in self.program.regions):
            self.program.train(mode)
        return self

    def own_modules(self) -> list[tuple[str, nn.Module]]:
        inside = tuple(f"{name}." for name in self._regions)
        return [(n, m) for n, m in self.named_modules() if n not in self._regions and not (inside and n.startswith(inside))]

    def compile(self, **options) -> StageBody:
        """As `Program.compile`, for the regions of this stage; in place, returns it."""
        for code in dict.fromkeys(region.code for region in self.regions):
            code.compile_options = options
            for variant in code.all_variants():
                variant.compile(options)
        return self

    def forward(self, *crossing: Tensor, ftc_extras: bool = False, **inputs):
        """A tuple of what crosses to the next stage; on the last stage what the program returns.

        `crossing`: what the stage before gave. `inputs`: the program's, the same on every stage. With `ftc_extras`, on every stage or on
        none, the last gives (result, tensors by name). FtcError where `crossing` is not what the stage before gives.
        """
        variant, tensors = self.find(inputs)
        pieces, places = self._pieces.of(variant, ftc_extras)
        piece = pieces[self.index]
        if len(crossing) != len(piece.takes):
            raise FtcError(self._wrong_crossing(piece, len(crossing)))
        function, names = self._function(variant, piece, ftc_extras)
        if self.runner is not None:
            results = self.runner(self, variant, piece.graph, (*crossing, *tensors))
        else:
            results = function(self, *variant.attribute_values(names, self.fetch, tensors), *crossing, *tensors)
        if self.index < len(pieces) - 1:
            return tuple(results)
        result = variant.structured({place: results[number] for place, number in places.items()})
        return (result, {name: results[place] for name, place in extras(piece.graph).items()}) if ftc_extras else result

    def find(self, inputs: Mapping[str, object]) -> tuple[Variant, list[Tensor]]:
        """The variant of the program's shell for these keyword inputs, captured where there is none yet, and their tensors in its order."""
        if self.axes and not self.bound:
            raise FtcError("this program is divided over ranks; bind it (ftc.parallel.bind) before it is cut into stages")
        return self.code.find(WholeShell(self), (), self.program.bind((), dict(inputs)))

    def piece(self, inputs: Mapping[str, object], whole: bool = False) -> Piece:
        """This stage's part of the graph that a call with these inputs runs."""
        return self._pieces.of(self.find(inputs)[0], whole)[0][self.index]

    def examples(self, inputs: Mapping[str, object], whole: bool = False) -> tuple[tuple[Tensor, ...], object]:
        """See `Stage.examples`."""
        variant, tensors = self.find(inputs)
        pieces, places = self._pieces.of(variant, whole)
        takes, gives = examples(variant.captured, pieces, self.index, tensors, self._trained)
        if self.index < len(pieces) - 1:
            return takes, gives
        result = variant.structured({place: gives[number] for place, number in places.items()})
        return takes, (result, {name: gives[place] for name, place in extras(pieces[-1].graph).items()}) if whole else result

    def _trained(self, name: str) -> bool:
        """Whether the parameter `name`, or any of the region `name`, is trained, wherever it stands."""
        if name in self.program._regions:
            return any(parameter.requires_grad for parameter in self.program._regions[name].parameters())
        return name in self._pieces.parameters and self.fetch(name).requires_grad

    def fetch(self, name: str) -> Tensor:
        return super().fetch(name) if self.holds(name) or name in self.state else self.program.fetch(name)

    def holds(self, name: str) -> bool:
        """Whether a parameter or buffer of the program, outside of its regions, is here."""
        module: nn.Module | None = self
        *path, leaf = name.split(".")
        for part in path:
            module = module._modules.get(part) if module is not None else None
        return module is not None and (leaf in module._parameters or leaf in module._buffers)

    def _function(self, variant: Variant, piece: Piece, whole: bool) -> tuple[Callable, list[str]]:
        made = self._compiled.get((id(variant), whole))
        if made is None or made[0] is not piece:
            missing = [name for name in read_by(piece.graph) if name in self._pieces.parameters and not self.holds(name)]
            if missing:
                raise FtcError(
                    f"for inputs of this structure stage {self.index} needs the parameter {missing[0]}, which it does not hold; capture such a "
                    "call before the program is cut: program.run_example(inputs)"
                )
            function, names, source = compile_graph(piece.graph, variant.captured.constants, f"stage_{self.index}_of_{variant.name}")
            made = self._compiled[id(variant), whole] = (piece, function, names, source)
        return made[1], made[2]

    def _wrong_crossing(self, piece: Piece, given: int) -> str:
        takes = ", ".join(f"{name} {_described(value)}" for name, value in zip(piece.takes, piece.takes_values, strict=True))
        return (
            f"stage {self.index} takes {len(piece.takes)} tensors from the stage before ({takes or 'none: the first stage takes the inputs as keywords'}) "
            f"and was given {given}; every stage must be called with the same inputs, and all or none with ftc_extras"
        )


class Stage(nn.Module):
    """One stage of a program; see the module's docstring. Made by `ftc.pipeline.cut`.

    index, num_stages     its place
    body                  a StageBody, the program's part
    shared                parameters that other stages hold too: name in the program -> the stages that hold it. Their gradients are
                          summed by `ftc.pipeline.TiedParameters`
    """

    def __init__(self, body: StageBody, num_stages: int, shared: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.body = body
        self.index, self.num_stages, self.shared = body.index, num_stages, dict(shared)
        self.training = body.training

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def forward(self, *crossing: Tensor, ftc_extras: bool = False, **inputs):
        """See `StageBody.forward`."""
        return self.body(*crossing, ftc_extras=ftc_extras, **inputs)

    def with_extras(self, *crossing: Tensor, **inputs):
        """As a call, with the tensors that passes added: every stage has to be called so, and the last gives (result, tensors by name)."""
        return self(*crossing, ftc_extras=True, **inputs)

    def examples(self, inputs: Mapping[str, object], extras: bool = False) -> tuple[tuple[Tensor, ...], object]:
        """(what this stage takes from the one before, what it gives) for these inputs, as tensors on the meta device that know whether they
        have a gradient: `input_args` and `output_args` of torch's PipelineStage. `extras`: of a call with `ftc_extras`. Runs nothing."""
        return self.body.examples(inputs, extras)

    def extra_repr(self) -> str:
        return f"{self.index} of {self.num_stages}: {', '.join(region.ftc_name for region in self.body.regions)}"


def read_by(graph: fx.Graph) -> list[str]:
    """Names of all attributes that a graph reads."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{[str(size) for size in value.shape]}"

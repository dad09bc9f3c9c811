"""Saving programs and loading them without the original model's code.

    ftc.json           kind, versions, module tree, tensors, signature; sha256 of every other file, and a digest over itself
    weights*.safetensors   every parameter and buffer once; more than one file above 5 GB
    graphs/<hash>.json     every graph that a certificate names or a variant runs, named by what it computes
    variants.json      per code: the structures of inputs it has graphs for, with the conditions under which they hold
    certificates.json  what each pass did and what was measured
    model_config.json  the model's configuration, where it has one

Loading executes nothing from the folder: graphs are checked against a table of operators (`ftc.rewrite.json_values`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import ftc
from ftc.capture.code import Code, ShellCode, _hinted, _identifier
from ftc.capture.program import Program, Region
from ftc.capture.skeleton import Container
from ftc.capture.variants import Call, Variant
from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_folder, atomic_write, check_replaceable
from ftc.rewrite.graph_json import captured_from_dict, captured_to_dict, graph_hash
from ftc.rewrite.json_values import dotted
from ftc.rewrite.lens import lens_from_dict
from ftc.rewrite.stored_weights import load_tensors, tensor_table, write_tensors
from ftc.rewrite.structure_json import (
    describe_key,
    key_from_json,
    key_to_json,
    leaf_from_json,
    leaf_to_json,
    signature_from_json,
    signature_to_json,
    spec_from_json,
    spec_to_json,
)

KIND = "program"
FORMAT = 1
MATRICES = "lenses.safetensors"
_AGAIN = "save the program again, or copy the folder again"


# ---------------------------------------------------------------------------------------------------------------- saving


def save(program: Program, folder: str | Path) -> None:
    """Write `program` to `folder` in one step; see the module's docstring. Replaces an earlier folder of ours only.

    Every structure of inputs captured so far is saved, in train and in eval mode where the original code is at hand.
    Raises FtcError for a program that cannot be saved and FtcFailure when the disk is full; nothing is left behind then.
    """
    if program.bound:
        raise FtcError("the program is bound to ranks, each of which holds a part of the weights; call ftc.parallel.unbind(program) on all ranks first")
    check_replaceable(folder, KIND)
    complete_modes(program)
    graphs, codes, matrices = dict(program._graphs), [], {}
    for code in program.codes:
        codes.append(_code_to_json(code, program, graphs, matrices))
    tree, tensors, aliases = tensor_table(program, list(program._regions))
    with atomic_folder(folder, KIND) as place:
        for row, files in write_tensors(place, tensors):
            row["file"] = files
        if matrices:
            _write_matrices(place / MATRICES, matrices)
        for name, graph in graphs.items():
            atomic_write(place / "graphs" / f"{name}.json", to_text(graph))
        atomic_write(place / "variants.json", to_text({"codes": codes}))
        atomic_write(place / "certificates.json", to_text({"applied": program._applied}))
        config = _config_to_json(getattr(program, "config", None))
        if config is not None:
            atomic_write(place / "model_config.json", to_text(config))
        about = {
            "kind": KIND,
            "format": FORMAT,
            "versions": {"ftc": ftc.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "model": program.kind,
            "signature": signature_to_json(program._signature),
            "regions": {
                r.ftc_name: {"kind": r.kind, "code": program.codes.index(r.code)}
                | ({"added": program._added[r.ftc_name]} if r.ftc_name in program._added else {})
                for r in program.regions
            },
            "modules": tree,
            "tensors": {row["name"]: {k: v for k, v in row.items() if k not in ("name", "tensor")} for row in tensors},
            "aliases": aliases,
            "files": {
                str(p.relative_to(place).as_posix()): file_sha(p) for p in sorted(place.rglob("*")) if p.is_file()
            },
        }
        about["digest"] = digest(about)
        atomic_write(place / MARKER, to_text(about))


def to_text(record: object) -> str:
    """A record as the JSON text that files hold."""
    return json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def digest(about: dict) -> str:
    """sha256 of the contents of `ftc.json` without its own digest."""
    content = {key: value for key, value in about.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_to_json(config: object) -> dict | None:
    if config is None:
        return None
    if dataclasses.is_dataclass(config):
        kind = getattr(config, "model_type", None)  # of the class in transformers, so no field
        return dataclasses.asdict(config) | ({"model_type": kind} if isinstance(kind, str) else {})
    to_dict = getattr(config, "to_dict", None)
    return to_dict() if callable(to_dict) else None


def _write_matrices(path: Path, matrices: dict[str, torch.Tensor]) -> None:
    from ftc.models.checkpoints.safetensors_io import write_file

    write_file(path, [(name, value.dtype, tuple(value.shape)) for name, value in matrices.items()], lambda name: matrices[name].contiguous())


def _read_matrices(folder: Path, about: dict) -> dict[str, torch.Tensor]:
    """The matrices of lenses by name; none where no lens has any."""
    from ftc.models.checkpoints.safetensors_io import read_index

    path = folder / MATRICES
    if MATRICES not in about["files"]:
        return {}
    if file_sha(path) != about["files"][MATRICES]:
        raise FtcError(f"{path} was changed since it was saved (its sha256 differs); {_AGAIN}")
    return {name: stored.read() for name, stored in read_index(path).items()}


def _code_to_json(code: Code, program: Program, graphs: dict[str, dict], matrices: dict[str, torch.Tensor]) -> dict:
    rows = []
    for key, variants in code.variants.items():
        for variant in variants:
            try:
                row = {"key": key_to_json(key)}
            except FtcError:
                if any(isinstance(leaf, torch.SymInt) for leaf in key[0]):
                    continue  # a size that was a symbol at capture; a call brings a number and has a variant of its own
                raise
            data = captured_to_dict(variant.captured)
            name = graph_hash(variant.captured.graph)
            graphs.setdefault(name, data["graph"])
            rows.append(
                row
                | {
                    "outputs": [leaf_to_json(leaf) for leaf in variant.outputs],
                    "out_spec": spec_to_json(variant.out_spec),
                    "start": start_of(program._applied, code.name, name),
                    "captured": data | {"graph": name},
                }
            )
    return {
        "name": code.name,
        "steps": [
            {"pass": step.request.name, "lenses": [lens.as_dict(matrices) for lens in step.lenses]} for step in code.steps
        ],
        "variants": rows,
    }


def start_of(applied: list[dict], code: str, graph: str) -> str:
    """The hash of the captured graph that the certificates of `applied`, last first, lead back to from `graph`."""
    for entry in reversed(applied):
        graph = next((c["before"] for c in entry["certificates"] if c["code"] == code and c["after"] == graph), graph)
    return graph


def complete_modes(program: Program) -> None:
    """Capture, for each call the program has met, the graph of the other mode (train or eval), so that a loaded program
    has both. Calls whose graph hangs on the values of their inputs get it where made-up values lead to one."""
    shell = program.code
    if isinstance(shell.module, Absent):
        return
    modes = [(module, module.training) for module in program.modules()]
    try:
        for variant in shell.all_variants():
            mode = variant.key[3]
            if isinstance(mode, bool) and variant.call is not None:
                program.train(not mode)
                _complete(program, variant)
    finally:
        for module, training in modes:
            module.training = training


def _complete(program: Program, variant: Variant) -> None:
    shapes = [_hinted(t) for t in variant.call.tensors]
    choices = [
        [_made_up(spec.name, t, padded) for spec, t in zip(variant.captured.inputs, shapes, strict=False)]
        for padded in (False, True)
    ]
    fitting = [c for c in choices if len(c) == len(shapes) and variant.holds_for(program.fetch, c)]
    tensors = (fitting or choices)[0]
    call = Call(tensors, variant.call.leaves, variant.call.spec)
    if len(tensors) != len(shapes) or [t.dtype for t in tensors] != [d for d, _, _ in variant.key[2]]:
        return
    key = program.code.key(program, call)
    if any(other.holds_for(program.fetch, tensors) for other in program.code.variants.get(key, ())):
        return
    try:
        program.code.capture(program, key, call)
    except (FtcError, FtcFailure):
        return  # this mode cannot be had; a loaded program will say so when it is asked for it


def _made_up(name: str, like: torch.Tensor, padded: bool) -> torch.Tensor:
    """Positions that count up, ones otherwise; `padded` puts a zero first, as left padding does in a mask."""
    sizes = [int(size) for size in like.shape]
    if "position" in name and sizes and not like.dtype.is_floating_point:
        return torch.arange(sizes[-1], dtype=like.dtype, device=like.device).expand(sizes).contiguous()
    made = torch.ones(sizes, dtype=like.dtype, device=like.device)
    if padded and made.numel():
        made.view(-1)[0] = 0
    return made


# --------------------------------------------------------------------------------------------------------------- loading


class Absent(nn.Module):
    """Takes the place of the original code in a loaded program; says which structures of inputs there are graphs for."""

    def __init__(self, name: str, folder: str):
        super().__init__()
        self.title, self.folder = name, folder
        self.known: list[str] = []

    def forward(self, *args, **kwargs):
        raise self._error()

    def __getattr__(self, name: str):
        if name.startswith("_"):
            return super().__getattr__(name)
        raise self._error()  # capture looks for the parameters of the original code first

    def _error(self) -> FtcError:
        known = "; ".join(self.known) or "none"
        return FtcError(
            f"the program loaded from {self.folder} has no graph of {self.title} for inputs of this structure. Saved: {known}. Call it in "
            "one of these ways, or load the original model, rewrite it again and call it once in the new way before saving"
        )


def load(folder: str | Path) -> Program:
    """The program that `program.save(folder)` wrote: same outputs, gradients and names, without the original class.

    Mappings with attributes among the outputs come back as `ftc.rewrite.structure_json.Outputs`. A call of a structure
    that was not saved raises FtcError. Raises FtcError when the folder is none of ours, or is corrupt or incomplete.
    """
    folder = Path(folder)
    about = read_about(folder)
    _check_files(folder, about)
    try:
        program = _tree(about, load_tensors(folder, about))
        _add_codes(program, about, folder)
        program._signature = signature_from_json(about["signature"])
        if (folder / "model_config.json").is_file():
            program.config = StoredConfig(**read_json(folder / "model_config.json"))
    except FtcError:
        raise
    except Exception as error:
        raise FtcError(f"{folder} cannot be loaded ({type(error).__name__}: {error}); {_AGAIN}") from error
    return program


def read_about(folder: str | Path) -> dict:
    """The contents of `ftc.json`. Raises FtcError when `folder` holds no program."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FtcError(f"{folder} is not a folder; name one that program.save or `ftc rewrite` wrote")
    if not (folder / MARKER).is_file():
        raise FtcError(
            f"{folder} holds no {MARKER}, so it is no program of ftc; name a folder that program.save or `ftc rewrite` wrote"
        )
    about = read_json(folder / MARKER)
    if not isinstance(about, dict) or about.get("kind") != KIND:
        kind = about.get("kind") if isinstance(about, dict) else None
        raise FtcError(
            f"{folder} holds a {kind!r}, not a program; name a folder that program.save or `ftc rewrite` wrote"
        )
    if about.get("format") != FORMAT:
        raise FtcError(
            f"{folder} has format {about.get('format')!r}, this version of ftc reads {FORMAT}; save the program again"
        )
    return about


def read_json(path: Path) -> object:
    """The contents of a JSON file. Raises FtcError when it is missing or corrupt."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FtcError(f"{path} is missing; {_AGAIN}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FtcError(f"{path} is corrupt ({error}); {_AGAIN}") from error


def _check_files(folder: Path, about: dict) -> None:
    if about.get("digest") != digest(about):
        raise FtcError(f"{folder / MARKER} does not agree with its own digest; {_AGAIN}")
    for name, sha in about["files"].items():
        path = folder / name
        if not path.is_file():
            raise FtcError(f"{path} is missing; {_AGAIN}")
        if path.suffix == ".json" and file_sha(path) != sha:  # weights are checked while they are read
            raise FtcError(f"{path} was changed since it was saved (its sha256 differs); {_AGAIN}")


def _tree(about: dict, tensors: dict[str, torch.Tensor]) -> Program:
    regions, built = about["regions"], {}
    program = Program(str(about["model"]))
    for path, row in about["modules"].items():
        if "same" in row:
            module = built[row["same"]]
        elif path == "":
            module = program
        elif path in regions:
            module = program._regions[path] = Region(dotted(path), str(regions[path]["kind"]), None)
        else:
            module = {"list": nn.ModuleList, "dict": nn.ModuleDict}.get(
                row["container"], lambda r=row: Container(str(r["kind"]))
            )()
        built[path] = module
        if path:
            owner, _, leaf = path.rpartition(".")
            built[owner]._modules[leaf] = module
        if "same" not in row:
            _fill(module, row, tensors)
    program._regions = {name: program._regions[name] for name in regions}
    for name, row in regions.items():
        if "added" in row:
            how = row["added"]
            program._added[name] = {"like": dotted(how["like"]), "init": str(how["init"]), "seed": int(how["seed"])}
    return program


def _fill(module: nn.Module, row: dict, tensors: dict[str, torch.Tensor]) -> None:
    module.training = bool(row["training"])
    for leaf, name in row["parameters"].items():
        module._parameters[leaf] = None if name is None else tensors[name]
    for leaf, (name, persistent) in row["buffers"].items():
        module.register_buffer(leaf, None if name is None else tensors[name], persistent=bool(persistent))


def _add_codes(program: Program, about: dict, folder: Path) -> None:
    program._applied = read_json(folder / "certificates.json")["applied"]
    program._graphs = {path.stem: read_json(path) for path in sorted((folder / "graphs").glob("*.json"))}
    rows = read_json(folder / "variants.json")["codes"]
    *region_rows, shell_row = rows
    codes = [Code(str(row["name"]), Absent(str(row["name"]), str(folder))) for row in region_rows]
    for name, region in program._regions.items():
        region.code = codes[about["regions"][name]["code"]]
        region.code.twins[name] = region.code.module
    program.code = ShellCode(str(shell_row["name"]), Absent("the model", str(folder)), {}, program._regions)
    program.code.twins[program.ftc_name] = program.code.module
    matrices = _read_matrices(folder, about)
    for code, row in zip([*codes, program.code], rows, strict=True):
        _fill_code(code, row, program, matrices)


def _fill_code(code: Code, row: dict, program: Program, matrices: dict[str, torch.Tensor]) -> None:
    from ftc.rewrite.pipeline import Step

    for entry, step in zip(program._applied, row["steps"], strict=True):
        lenses = [lens_from_dict(lens, matrices) for lens in step["lenses"]]
        request = SimpleNamespace(name=entry["pass"], expect=entry["expect"], options=lambda e=entry: e["options"])
        code.steps.append(Step(request, entry, program._graphs, lenses, bool(entry["checked"])))
        code.lenses += lenses
    owner = next((r.ftc_name for r in program.regions if r.code is code), program.ftc_name)
    for stored in row["variants"]:
        key = key_from_json(stored["key"])
        name = stored["captured"]["graph"]
        if name not in program._graphs:
            raise FtcError(f"graph {name} of {code.name} is missing; {_AGAIN}")
        captured = captured_from_dict(stored["captured"] | {"graph": program._graphs[name]})
        fakes = [node.meta["val"] for node in captured.graph.nodes if node.op == "placeholder"]
        call = Call(fakes, key[0], key[1])
        outputs = tuple(leaf_from_json(leaf) for leaf in stored["outputs"])
        variant = Variant(key, captured, outputs, spec_from_json(stored["out_spec"]), _identifier(owner), call)
        code.variants.setdefault(key, []).append(variant)
        shown = describe_key(key, [(s.name, s.dtype, s.sizes) for s in captured.inputs])
        code.module.known = list(dict.fromkeys([*code.module.known, shown]))


class StoredConfig(SimpleNamespace):
    """The saved configuration of a model: its entries as attributes."""

    def to_dict(self) -> dict:
        """The entries, as they were saved."""
        return dict(vars(self))

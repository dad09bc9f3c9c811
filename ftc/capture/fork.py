"""Forking a program: a second one that shares parameters and original code, with graphs of its own to rewrite."""

import copy

from ftc.capture.captured import CapturedGraph
from ftc.capture.code import Code, ShellCode
from ftc.capture.program import Program, Region
from ftc.capture.skeleton import adopt
from ftc.capture.variants import Variant


def fork(program: Program) -> Program:
    """A copy of `program` that shares every parameter with it. Nothing of `program` is changed."""
    new = Program(program.kind)
    new._signature, new._added = program._signature, dict(program._added)
    new.divided, new.bound = dict(program.divided), dict(program.bound)
    new._applied, new._graphs = copy.deepcopy(program._applied), dict(program._graphs)
    if "config" in vars(program):
        new.config = program.config
    codes = {code: _fork_code(code, Code(code.name, code.module), new) for code in program.codes[:-1]}
    replaced, memo = {}, {}
    for name, region in program._regions.items():
        mine = Region(name, region.kind, codes[region.code])
        mine.divided = dict(region.divided)
        adopt(mine, region, {}, memo)
        new._regions[name] = replaced[id(region)] = mine
    adopt(new, program, replaced, memo)
    shell = ShellCode(program.code.name, program.code.module, program.code.blocks, new._regions)
    new.code = _fork_code(program.code, shell, new)
    return new


def _fork_code(old: Code, new: Code, program: Program) -> Code:
    new.twins = dict(old.twins)
    new.lenses = list(old.lenses)
    new.checked = set(old.checked)
    entries = program._applied
    for number, step in enumerate(old.steps):
        step = copy.copy(step)
        step.entry, step.graphs = entries[number], program._graphs
        new.steps.append(step)
    for key, variants in old.variants.items():
        new.variants[key] = [_fork_variant(variant) for variant in variants]
    return new


def isolate(program: Program, name: str) -> None:
    """Give the region `name` a code of its own, with copies of the graphs that it shares with its twins so far. In place."""
    region = program._regions[name]
    shared = region.code
    if not any(other is not region and other.code is shared for other in program.regions):
        return
    own = Code(name, shared.twins.get(name, shared.module))
    own.twins = {name: own.module}
    own.lenses, own.steps, own.compile_options = list(shared.lenses), list(shared.steps), shared.compile_options
    own.checked = {mark for mark in shared.checked if mark[0] == name}
    for key, variants in shared.variants.items():
        own.variants[key] = [_fork_variant(variant) for variant in variants]
    region.code = own
    shared.twins.pop(name, None)
    if shared.name == name:  # a code is named after its first region
        shared.name = next(other.ftc_name for other in program.regions if other.code is shared)
    _name_certificates(program, own.name, shared.name)


def _name_certificates(program: Program, *names: str) -> None:
    """Certificates are found by the name of a code: each of `names` gets copies of those of the other."""
    for entry in program._applied:
        for name, other in (names, names[::-1]):
            if not any(record["code"] == name for record in entry["certificates"]):
                entry["certificates"] += [{**record, "code": name} for record in entry["certificates"] if record["code"] == other]


def _fork_variant(variant: Variant) -> Variant:
    from ftc.rewrite.pipeline import copy_graph

    captured = variant.captured
    own = CapturedGraph(
        copy_graph(captured.graph),
        list(captured.inputs),
        dict(captured.constants),
        list(captured.guards),
        captured.decisions,
        captured.decided,
        dict(captured.hints),
        dict(captured.minimum),
        dict(captured.maximum),
    )
    return Variant(variant.key, own, variant.outputs, variant.out_spec, variant.name, variant.call)

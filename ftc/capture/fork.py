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

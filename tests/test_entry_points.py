"""Passes and stages of other packages, found through the entry points of packages that are really installed on the path."""

import subprocess
import sys

import pytest

import ftc
from ftc import cli
from ftc.errors import FtcError
from ftc.open_model import example_inputs, open_model
from ftc.recipes.recipe import load_recipe
from ftc.recipes.runner import run_recipe
from ftc.recipes.stage import stage_kinds
from ftc.rewrite.registry import available, classes

CODE = """
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ftc.recipes.stage import Context, Result, Stage, place
from ftc.rewrite.outcome import Match, Outcome, location
from ftc.rewrite.passes import Pass


@dataclass(frozen=True)
class TwiceAtHalf(Pass):
    name: ClassVar[str] = "twice-at-half"
    summary: ClassVar[str] = "silu(x) = 0.5 silu(x) + 0.5 silu(x)"
    contract: ClassVar[str] = "exact"
    factor: float = field(default=0.5, metadata={"help": "of each summand"})

    def apply(self, graph):
        outcome = Outcome()
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default):
            outcome.matches.append(Match("silu", (node.args[0].name,), {}, location(node)))
            with graph.inserting_after(node):
                half = graph.call_function(torch.ops.aten.mul.Tensor, (node, self.factor))
            with graph.inserting_after(half):
                whole = graph.call_function(torch.ops.aten.add.Tensor, (half, half))
            for new in (half, whole):
                new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not half)
        return outcome


@dataclass(frozen=True)
class Impostor(TwiceAtHalf):
    name: ClassVar[str] = "fuse-qkv"


@dataclass(frozen=True)
class CountParameters(Stage):
    model: str = place("model", words=("preset:",))

    kind: ClassVar[str] = "count-parameters"
    summary: ClassVar[str] = "count the parameters of a model"
    outputs: ClassVar[tuple[str, ...]] = ("count",)

    def run(self, context: Context) -> Result:
        from ftc.open_model import open_model

        count = sum(p.numel() for p in open_model(self.model).parameters())
        (context.folder / "count.txt").write_text(f"{count}\\n")
        return Result({"count": "count.txt"}, {"facts": {"parameters": count}})
"""
POINTS = """
[ftc.passes]
twice-at-half = guest_package:TwiceAtHalf

[ftc.stages]
count-parameters = guest_package:CountParameters
"""


def install(folder, points=POINTS):
    """What pip leaves behind: the module, and the metadata that names its entry points."""
    (folder / "guest_package.py").write_text(CODE)
    metadata = folder / "guest_package-1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: guest-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture
def guest(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(install(folder)))
    classes.cache_clear()
    stage_kinds.cache_clear()
    yield folder
    monkeypatch.undo()
    sys.modules.pop("guest_package", None)
    classes.cache_clear()
    stage_kinds.cache_clear()


def test_a_guest_pass_is_listed_matched_and_proved_like_our_own(guest):
    assert available()["twice-at-half"].options["factor"][:2] == ("float", 0.5)
    model = open_model("preset:tiny")
    program = ftc.rewrite(model, [("twice-at-half", {"expect": "all"})], example=example_inputs(model))
    row = program.report.as_dict()["passes"]["twice-at-half"]
    assert row["matches"] == 2 and row["certificates"] >= 1 and row["max_gradient_error"] <= 1e-12


def test_a_guest_pass_that_breaks_its_promise_is_refused(guest):
    model = open_model("preset:tiny")
    with pytest.raises(ftc.FtcFailure, match="twice-at-half"):
        ftc.rewrite(model, ["twice-at-half{factor=0.7}"], example=example_inputs(model))


def test_the_options_of_a_guest_pass_are_checked(guest):
    with pytest.raises(FtcError, match="did you mean 'factor'"):
        ftc.rewrite(open_model("preset:tiny"), ["twice-at-half{facter=1}"], example={})


def test_a_guest_pass_is_saved_and_verified_from_the_command_line(guest, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["rewrite", "preset:tiny", "--passes", "twice-at-half", "--out", str(out)]) == 0
    assert cli.run(["verify", str(out)]) == 0
    assert capsys.readouterr().out.endswith("verified\n")


def test_the_command_of_a_fresh_process_lists_it(guest):
    code = f"import sys; sys.path.insert(0, {str(guest)!r}); import ftc.cli; sys.exit(ftc.cli.run(['passes', 'twice-at-half']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "twice-at-half" in done.stdout and "factor" in done.stdout and "of each summand" in done.stdout


def test_a_guest_stage_runs_in_a_recipe(guest, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[stage]]\nkind = "count-parameters"\nmodel = "preset:tiny"\n')
    run_recipe(load_recipe(recipe), tmp_path / "out", quiet=True)
    assert int((tmp_path / "out" / "count-parameters" / "count.txt").read_text()) > 1000
    assert "parameters" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("points", "find"),
    [
        ("[ftc.passes]\nanything = guest_package:Impostor\n", lambda: classes()),
        ("[ftc.stages]\ntrain = guest_package:CountParameters\n", lambda: stage_kinds()),
    ],
)
def test_a_guest_that_takes_a_name_of_ours_is_named(guest, points, find):
    install(guest, points)
    import importlib

    importlib.invalidate_caches()
    classes.cache_clear()
    stage_kinds.cache_clear()
    with pytest.raises(FtcError, match="guest-package.*exists already"):
        find()

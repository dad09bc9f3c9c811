"""Recipes: checked before they run, skipped when finished, continued after a failure, never half-written."""

import dataclasses
import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError, FtcFailure
from ftc.files import atomic_write
from ftc.recipes import runner
from ftc.recipes import stage as stage_module
from ftc.recipes.recipe import load_recipe, parse_recipe, shipped_recipes
from ftc.recipes.runner import plan, run_recipe
from ftc.recipes.stage import Context, Result, Stage, make_stage, place

RAN: list[str] = []
FAIL: dict[str, BaseException] = {}


@dataclass(frozen=True)
class Write(Stage):
    """Writes `text`, after what `source` and the file `extra` hold."""

    text: str = ""
    times: int = 1
    source: str = place("text", "")
    extra: str = place("text", "", words=("nothing",))

    kind: ClassVar[str] = "write"
    outputs: ClassVar[tuple[str, ...]] = ("text",)

    def run(self, context: Context) -> Result:
        RAN.append(self.name)
        parts = [Path(path).read_text() for path in (self.source, self.extra) if path and path != "nothing"]
        (context.folder / "text").write_text("".join([*parts, self.text * self.times]))
        if self.name in FAIL:
            raise FAIL[self.name]
        return Result({"text": "text"}, {"facts": {"letters": len(self.text)}})


@dataclass(frozen=True)
class Count(Write):
    """Counts to three, one file a step, and continues where it stopped."""

    kind: ClassVar[str] = "count"
    resumable: ClassVar[bool] = True

    def run(self, context: Context) -> Result:
        done = len(list(context.folder.glob("step-*")))
        RAN.append(f"{self.name} from {done}")
        for step in range(done, 3):
            if self.name in FAIL and step == 2:
                raise FAIL[self.name]
            atomic_write(context.folder / f"step-{step}", "done")
        atomic_write(context.folder / "text", "three")
        return Result({"text": "text"})


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    known = {kind.kind: kind for kind in (Write, Count)}
    monkeypatch.setattr(stage_module, "stage_kinds", lambda: known)
    RAN.clear()
    FAIL.clear()
    return known


def recipe(base, *stages, **head):
    return parse_recipe({"recipe": head, "stage": list(stages)}, Path(base))


def chain(base, first="a", second="b"):
    return recipe(
        base,
        {"kind": "write", "name": "one", "text": first},
        {"kind": "write", "name": "two", "text": second, "source": "@one"},
        {"kind": "write", "name": "three", "text": "c", "source": "@two.text"},
    )


def ran():
    done = list(RAN)
    RAN.clear()
    return done


def run(recipe, out, **options):
    run_recipe(recipe, out, quiet=True, **options)
    return ran()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stages_run_in_order_and_hand_on_what_they_make(tmp_path):
    out = tmp_path / "out"
    assert run(chain(tmp_path), out) == ["one", "two", "three"]
    assert (out / "three" / "text").read_text() == "abc"
    assert "<svg" not in (out / "report.html").read_text() and "letters 1" in (out / "report.html").read_text()


def test_finished_stages_are_skipped_and_the_folder_stays_as_it_was(tmp_path):
    out = tmp_path / "out"
    run(chain(tmp_path), out)
    stages = {name: contents(out / name) for name in ("one", "two", "three")}
    assert run(chain(tmp_path), out) == []
    assert stages == {name: contents(out / name) for name in stages}


def test_a_changed_option_runs_its_stage_and_all_that_depend_on_it(tmp_path):
    out = tmp_path / "out"
    run(chain(tmp_path), out)
    assert run(chain(tmp_path, second="B"), out) == ["two", "three"]
    assert (out / "three" / "text").read_text() == "aBc"


def test_changed_file_content_runs_the_stage_again_but_a_new_time_does_not(tmp_path):
    (tmp_path / "extra.txt").write_text("x")
    stages = recipe(tmp_path, {"kind": "write", "name": "one", "extra": "extra.txt"})
    out = tmp_path / "out"
    assert run(stages, out) == ["one"]
    os.utime(tmp_path / "extra.txt", (1, 1))
    assert run(stages, out) == []
    (tmp_path / "extra.txt").write_text("y")
    assert run(stages, out) == ["one"]


def test_another_version_of_ftc_runs_everything_again(tmp_path, monkeypatch):
    run(chain(tmp_path), tmp_path / "out")
    monkeypatch.setattr("ftc.__version__", "99.0")
    assert run(chain(tmp_path), tmp_path / "out") == ["one", "two", "three"]


def test_removed_outputs_are_made_again(tmp_path):
    out = tmp_path / "out"
    run(chain(tmp_path), out)
    (out / "two" / "text").unlink()
    assert run(chain(tmp_path), out) == ["two", "three"]


def test_force_and_until(tmp_path):
    out = tmp_path / "out"
    assert run(chain(tmp_path), out, until="two") == ["one", "two"] and not (out / "three").exists()
    assert run(chain(tmp_path), out) == ["three"]
    assert run(chain(tmp_path), out, force=["two"]) == ["two", "three"]
    for options in ({"until": "tow"}, {"force": ["tow"]}):
        with pytest.raises(FtcError, match="did you mean 'two'"):
            run_recipe(chain(tmp_path), out, **options)


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(tmp_path):
    out = tmp_path / "out"
    assert [step.action for step in plan(chain(tmp_path), out)] == ["run", "run", "run"] and not out.exists()
    run(chain(tmp_path), out)
    before = contents(out)
    changed = chain(tmp_path, second="B")
    assert [step.action for step in plan(changed, out)] == ["skip", "run", "run"]
    assert [step.action for step in plan(changed, out, until="two")] == ["skip", "run", "stop before"]
    assert contents(out) == before and ran() == []


def test_a_failed_stage_leaves_nothing_and_the_next_run_continues(tmp_path):
    out = tmp_path / "out"
    FAIL["two"] = FtcFailure("a proof failed")
    with pytest.raises(FtcFailure, match="stage 'two': a proof failed"):
        run_recipe(chain(tmp_path), out, quiet=True)
    assert not (out / "two").exists() and not list(out.glob(".two*"))
    FAIL.clear()
    assert ran() == ["one", "two"] and run(chain(tmp_path), out) == ["two", "three"]


def test_a_failure_keeps_the_earlier_result_of_the_stage(tmp_path):
    out = tmp_path / "out"
    run(chain(tmp_path), out)
    before = contents(out / "two")
    FAIL["two"] = FtcFailure("no")
    with pytest.raises(FtcFailure):
        run_recipe(chain(tmp_path, second="B"), out, quiet=True)
    assert contents(out / "two") == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), FtcFailure("stopped"), OSError(28, "No space left on device")])
def test_a_resumable_stage_continues_where_it_stopped(tmp_path, stop):
    out = tmp_path / "out"
    stages = recipe(tmp_path, {"kind": "count", "name": "n"})
    FAIL["n"] = stop
    with pytest.raises((KeyboardInterrupt, FtcFailure)):
        run_recipe(stages, out, quiet=True)
    assert [step.action for step in plan(stages, out)] == ["continue"]
    FAIL.clear()
    assert ran() == ["n from 0"] and run(stages, out) == ["n from 2"]


def test_a_resumable_stage_with_other_options_begins_anew(tmp_path):
    out = tmp_path / "out"
    FAIL["n"] = FtcFailure("stopped")
    with pytest.raises(FtcFailure):
        run_recipe(recipe(tmp_path, {"kind": "count", "name": "n"}), out, quiet=True)
    FAIL.clear()
    ran()
    assert run(recipe(tmp_path, {"kind": "count", "name": "n", "text": "other"}), out) == ["n from 0"]


def test_a_full_disk_is_a_failure_that_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(chain(tmp_path), out, until="one")
    real = os.fsync

    def full(handle):
        if "two" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FtcFailure, match="No space left|disk is full"):
        run_recipe(chain(tmp_path), out, quiet=True)
    assert not (out / "two").exists() and not list(out.glob(".two*")) and (out / "one" / "stage.json").is_file()


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FtcError, match="thesis|did not write"):
        run_recipe(chain(tmp_path), tmp_path / "out")
    atomic_write(tmp_path / "program" / "ftc.json", json.dumps({"kind": "program"}))
    with pytest.raises(FtcError, match="holds a program"):
        run_recipe(chain(tmp_path), tmp_path / "program")
    assert ran() == [] and contents(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with runner._lock(out), pytest.raises(FtcError, match="another ftc run"), runner._lock(out):
        pass


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "no stages"),
        ([{"name": "x"}], "stage 1 has no kind"),
        ([{"kind": "wriet"}], "did you mean 'write'"),
        ([{"kind": "write", "txet": "x"}], "txet.*did you mean 'text'"),
        ([{"kind": "write", "times": "x"}], "times is 'x'; it must be a whole number"),
        ([{"kind": "write", "name": "A b"}], "'A b'"),
        ([{"kind": "write"}, {"kind": "write"}], "two stages are named 'write'"),
        ([{"kind": "write", "source": "@oen"}], "'oen' is not in the recipe"),
        ([{"kind": "write", "name": "a", "source": "@b"}, {"kind": "write", "name": "b"}], "comes later"),
        ([{"kind": "write", "name": "a"}, {"kind": "write", "name": "b", "source": "@a.txt"}], "did you mean 'text'"),
        ([{"kind": "write", "extra": "missing.txt"}], "missing.txt.*nothing is there"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, stages, words):
    with pytest.raises(FtcError, match=words):
        recipe(tmp_path, *stages)
    assert ran() == []


def test_wrong_sections_and_files_are_named(tmp_path):
    with pytest.raises(FtcError, match="did you mean 'stage'"):
        parse_recipe({"stages": []}, tmp_path)
    with pytest.raises(FtcError, match="recipe.nmae.*did you mean 'name'"):
        recipe(tmp_path, {"kind": "write"}, nmae="x")
    broken = tmp_path / "broken.toml"
    broken.write_text("[recipe\n")
    with pytest.raises(FtcError, match="broken.toml is not valid TOML"):
        load_recipe(broken)
    with pytest.raises(FtcError, match="no recipe"):
        load_recipe(tmp_path / "missing.toml")


def test_a_stage_may_name_words_and_lists(tmp_path):
    stage = make_stage({"kind": "write", "extra": "nothing"}, "stage 1")
    assert stage.name == "write" and stage_module.places(stage)["extra"][0] == ["nothing"]
    assert run(recipe(tmp_path, {"kind": "write", "extra": "nothing"}), tmp_path / "out") == ["write"]


def test_third_parties_add_kinds_through_an_entry_point(monkeypatch):
    class Point:
        name, dist = "count", None

        @staticmethod
        def load():
            return Count

    monkeypatch.undo()
    monkeypatch.setattr(stage_module, "entry_points", lambda group: [Point] if group == "ftc.stages" else [])
    stage_module.stage_kinds.cache_clear()
    try:
        kinds = stage_module.stage_kinds()
        assert kinds["count"] is Count and {"train", "rewrite", "evaluate", "generate", "verify"} <= set(kinds)
        Point.name = "train"
        stage_module.stage_kinds.cache_clear()
        with pytest.raises(FtcError, match="exists already"):
            stage_module.stage_kinds()
    finally:
        stage_module.stage_kinds.cache_clear()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["one", "two", "three"]), max_size=4), st.booleans())
def test_any_order_of_failures_ends_in_the_same_result(tmp_path_factory, failures, change):
    folder = tmp_path_factory.mktemp("run")
    final = chain(folder, second="B" if change else "b")
    for name in failures:
        FAIL.clear()
        FAIL[name] = FtcFailure("stopped")
        try:
            run_recipe(chain(folder), folder / "out", quiet=True)
        except FtcFailure:
            pass
    FAIL.clear()
    run_recipe(final, folder / "out", quiet=True)
    assert (folder / "out" / "three" / "text").read_text() == ("aBc" if change else "abc")
    assert run(final, folder / "out") is not None and run(final, folder / "out") == []


def test_shipped_recipes_name_known_stages_and_keys(monkeypatch):
    monkeypatch.undo()
    assert "quickstart" in shipped_recipes()
    for name in shipped_recipes():
        assert load_recipe(name).name == name


def test_stages_are_frozen_and_say_what_they_are(monkeypatch):
    monkeypatch.undo()
    stage_module.stage_kinds.cache_clear()
    for name, kind in stage_module.stage_kinds().items():
        assert (
            kind.kind == name and kind.summary and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
        )


def test_a_recipe_measures_and_generates_with_a_real_model(tmp_path, monkeypatch):
    monkeypatch.undo()
    import ftc.models

    from ftc.data.bpe import train_bpe
    from ftc.open_model import open_model

    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 3, 300, tmp_path / "tokenizer")
    ftc.models.save(open_model("preset:tiny"), tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "book.txt").write_text("the cat sat on the dog")
    path = tmp_path / "small.toml"
    path.write_text(
        textwrap.dedent("""
        [[stage]]
        kind = "evaluate"
        model = "model"
        data = ["book.txt"]

        [[stage]]
        kind = "generate"
        model = "model"
        prompts = ["the <cat>"]
        max_tokens = 3
        """)
    )
    result = run_recipe(load_recipe(path), tmp_path / "out", quiet=True)
    assert [stage["name"] for stage in result["stages"]] == ["evaluate", "generate"]
    page = Path(result["report"]).read_text()
    assert "book.txt" in page and "the &lt;cat&gt;" in page and "the <cat>" not in page
    assert json.loads((tmp_path / "out/evaluate/results.json").read_text())["sources"]["book.txt"]["bytes"] == 22

"""The command line: what it answers, and how every wrong input ends."""

import json
import os
import subprocess
import sys
import time

import pytest

from ftc import cli
from ftc.errors import FtcError, FtcFailure, Interrupted

COMMANDS = ("passes", "capture", "rewrite", "heal", "sweep", "memory", "explain", "verify", "evaluate", "generate", "train", "run", "bench")


@pytest.fixture
def command(capsys):
    """Run a command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Hugging Face folder with a tokenizer."""
    import ftc.models

    from ftc.data.bpe import train_bpe
    from ftc.open_model import open_model

    path = tmp_path_factory.mktemp("model") / "hf"
    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 3, 300, path.parent / "tokenizer")
    ftc.models.save(open_model("preset:tiny"), path, tokenizer=tokenizer)
    return path


def damaged(folder, tmp_path):
    """A copy of the model and its weights file, to be damaged."""
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    return copy, next(copy.glob("*.safetensors"))


def assert_one_paragraph(err, *words):
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err, (word, err)


def test_help_answers_quickly_as_a_module_and_imports_nothing_heavy():
    code = "import sys; sys.argv = ['ftc', '--help']\nimport ftc.cli\nassert ftc.cli.run(['--help']) == 0\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    started = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-m", "ftc", "--help"], capture_output=True, text=True, check=True)
    used = os.times().children_user - started[1]
    assert all(name in done.stdout for name in COMMANDS)
    assert used < 2, f"ftc --help took {used:.1f} s of processor time"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0 and f"ftc {name}" in out and "Examples" in out


def test_passes_lists_contract_and_meaning(command):
    code, out, _ = command("passes", "--json")
    listed = json.loads(out)
    assert code == 0 and set(listed["raise-norm"]) == {"contract", "summary", "inverse", "options"}
    assert command("passes")[0] == 0
    code, _, err = command("passes", "raise-nrom")
    assert code == 2
    assert_one_paragraph(err, "raise-nrom", "did you mean 'raise-norm'")


def test_capture_shows_regions_and_code(command):
    code, out, _ = command("capture", "preset:tiny", "--code", "--json")
    described = json.loads(out)
    assert code == 0 and [region["name"] for region in described["regions"]] == ["layers.0", "layers.1"]
    assert any("scaled_dot_product_attention" in source for source in described["code"].values())
    code, out, _ = command("capture", "preset:tiny", "--code")
    assert code == 0 and "layers.1" in out and "scaled_dot_product_attention" in out


def test_a_model_without_repeated_blocks_is_one_region_and_said_so(command, tmp_path):
    import ftc.models
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    ftc.models.save(Decoder(preset("tiny", num_hidden_layers=1)), tmp_path / "one")
    code, out, _ = command("capture", tmp_path / "one")
    assert code == 0 and ("one region" in out or "layers.0" in out)


def test_generate_is_the_same_again_and_evaluate_counts_every_byte(command, folder, tmp_path):
    arguments = ("generate", folder, "--prompt", "the cat", "--max-tokens", 5, "--temperature", 1, "--json")
    first, again = command(*arguments), command(*arguments)
    assert first[0] == 0 and first == again and json.loads(first[1])["prompt"] == "the cat"
    plain = command(*arguments[:-1])
    assert plain[1] == "the cat" + json.loads(first[1])["text"] + "\n"
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat")
    code, out, _ = command("evaluate", folder, "--data", text, "--json")
    result = json.loads(out)["sources"]["book.txt"]
    assert code == 0 and result["bytes"] == 22 and result["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["captur", "x"], ["captur", "capture"]),
        (["capture"], ["MODEL", "--help"]),
        (["capture", "preset:tniy"], ["tniy", "did you mean 'tiny'"]),
        (["capture", "/no/such/model"], ["/no/such/model", "preset:NAME"]),
        (["capture", "preset:tiny", "--cod"], ["--cod"]),
        (
            ["rewrite", "preset:tiny", "--passes", "raise-nrom", "--out", "OUT"],
            ["raise-nrom", "did you mean 'raise-norm'"],
        ),
        (["rewrite", "preset:tiny", "--passes", "raise-norm{epsilon=1}", "--out", "OUT"], ["epsilon", "raise-norm"]),
        (["rewrite", "preset:tiny", "--passes", "raise-norm", "--out", "OUT", "--calibration", "stdlib"], ["--tokenizer"]),
        (["explain", "preset:tiny", "--pass", "raise-nrom"], ["raise-nrom"]),
        (["verify", "HERE"], ["certificates"]),
        (["evaluate", "preset:tiny", "--data", "x.txt"], ["preset:tiny", "--tokenizer"]),
        (["evaluate", "MODEL", "--data", "/no/such/text.txt"], ["/no/such/text.txt"]),
        (["evaluate", "MODEL", "--data", "stdlib", "--context", "0"], ["--context", "0"]),
        (["generate", "MODEL", "--temperature", "-1"], ["-1"]),
        (["generate", "MODEL", "--tokenizer", "/no/such/tokenizer.json"], ["/no/such/tokenizer.json"]),
        (["train", "/no/such/run.toml", "--out", "OUT"], ["/no/such/run.toml"]),
        (["train", "quickstart", "--out", "OUT", "--set", "steps=3"], ["steps=3", "section.key=value"]),
        (["train", "quickstart", "--out", "OUT", "--set", "ftc.vocab_sise=3"], ["vocab_sise", "vocab_size"]),
        (["train", "quickstart", "--out", "OUT", "--set", "ftc.vocab_size='many'"], ["vocab_size", "whole number"]),
        (["run", "quikstart"], ["quikstart", "did you mean 'quickstart'"]),
        (["bench", "--folder", "HERE"], ["no benchmarks"]),
    ],
)
def test_wrong_input_ends_with_one_paragraph_and_code_2(command, folder, tmp_path, arguments, words):
    here = tmp_path / "here"
    here.mkdir()
    stand_ins = {"OUT": tmp_path / "out", "HERE": here, "MODEL": folder}
    code, out, err = command(*(stand_ins.get(argument, argument) for argument in arguments))
    assert code == 2 and out == ""
    assert_one_paragraph(err, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and not any(here.iterdir())


@pytest.fixture(scope="module")
def rewritten(folder, tmp_path_factory):
    """The model of `folder` after fuse-qkv, as a folder that ftc saved."""
    out = tmp_path_factory.mktemp("rewritten") / "out"
    assert cli.run(["rewrite", str(folder), "--passes", "raise,fuse-qkv", "--out", str(out), "--json"]) == 0
    return out


def test_a_rewritten_model_generates_the_same_text_as_before(command, folder, rewritten):
    texts = [command("generate", model, "--prompt", "the cat", "--max-tokens", 8) for model in (folder, rewritten)]
    assert texts[0][0] == 0 and texts[0] == texts[1]


def test_rewrite_reports_what_report_as_dict_says(command, folder, tmp_path):
    code, out, _ = command("rewrite", folder, "--passes", "fuse-qkv", "--out", tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0 and report["regions"] == 2
    row = report["passes"]["fuse-qkv"]
    assert {"matches", "contract", "max_output_error", "max_gradient_error", "inverse"} <= set(row)
    assert row["matches"] == 2 and row["contract"] == "exact" and row["max_output_error"] <= 1e-12


def test_a_failed_rewrite_leaves_nothing(command, folder, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("rewrite", folder, "--passes", "fuse-qkv", "--out", tmp_path / "out")
    assert code == 1 and list(tmp_path.iterdir()) == []
    assert_one_paragraph(err, "No space left")


def test_a_saved_program_is_captured_and_explained_without_its_class(command, rewritten):
    code, out, _ = command("capture", rewritten, "--json")
    assert code == 0 and len(json.loads(out)["regions"]) == 2
    code, out, _ = command("explain", rewritten, "--pass", "fuse-gate-up", "--json")
    assert code == 0 and any(graph["matches"] for graph in json.loads(out)["graphs"])


def test_verify_holds_and_fails_for_a_changed_weight(command, rewritten, tmp_path):
    import shutil

    code, out, _ = command("verify", rewritten, "--json")
    assert code == 0 and json.loads(out)["ok"] is True
    copy = tmp_path / "tampered"
    shutil.copytree(rewritten, copy)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    code, out, _ = command("verify", copy)
    assert code == 1 and "NOT verified" in out


def test_errors_are_json_with_json(command):
    code, out, err = command("capture", "/no/such/model", "--json")
    assert (
        code == 2 and out == "" and json.loads(err)["exit_code"] == 2 and "/no/such/model" in json.loads(err)["error"]
    )


def test_a_truncated_weights_file_is_named(command, folder, tmp_path):
    copy, weights = damaged(folder, tmp_path)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    code, _, err = command("capture", copy)
    assert code == 2
    assert_one_paragraph(err, weights.name)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_tensors_are_named(command, folder, tmp_path, change):
    from safetensors.torch import load_file, save_file

    copy, weights = damaged(folder, tmp_path)
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    else:
        name = "unheard.of.weight"
        tensors[name] = next(iter(tensors.values())).clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, err = command("capture", copy)
    assert code == 2
    assert_one_paragraph(err, name)


def test_a_folder_that_holds_something_else_is_not_touched(command, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for arguments in (("rewrite", "preset:tiny", "--passes", "raise-norm", "--out"), ("train", "quickstart", "--out")):
        code, _, err = command(*arguments, tmp_path)
        assert code == 2
        assert_one_paragraph(err, tmp_path)
    code, _, err = command("run", "quickstart", "--out", tmp_path)
    assert code == 2 and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FtcError("the value 3 is wrong; use 4"), 2, "use 4"),
        (FtcFailure("a proof failed"), 1, "a proof failed"),
        (OSError(28, "No space left on device", "/x/y"), 1, "disk is full (/x/y)"),
        (KeyboardInterrupt(), 130, "continues"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("from a library"), 1, "--debug"),
        (RuntimeError("boom"), 1, "RuntimeError: boom"),
    ],
)
def test_every_error_has_its_exit_code(command, monkeypatch, error, code, words):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("ftc.rewrite.registry.available", fail)
    got, _, err = command("passes")
    assert got == code
    assert_one_paragraph(err, words)
    assert "Traceback" in command("passes", "--debug")[2]


def test_an_interrupted_training_run_ends_with_130(command, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise Interrupted("the run was interrupted; the same command continues it")

    monkeypatch.setattr("ftc.train.launch.train", interrupted)
    code, _, err = command("train", "quickstart", "--out", "x")
    assert code == 130
    assert_one_paragraph(err, "continues it")


def test_bench_lists_and_runs_what_the_folder_holds(command, tmp_path):
    (tmp_path / "add_up.py").write_text('"""How long adding takes."""\nprint("table")\nprint(\'{"seconds": 1}\')\n')
    (tmp_path / "measure.py").write_text('"""Shared."""\n')
    code, out, _ = command("bench", "--folder", tmp_path, "--json")
    assert code == 0 and json.loads(out) == {"add-up": "How long adding takes."}
    (tmp_path / "fail.py").write_text("raise SystemExit(3)\n")
    assert command("bench", "fail", "--folder", tmp_path)[0] == 1
    code, _, err = command("bench", "ad-up", "--folder", tmp_path)
    assert code == 2 and "add-up" in err

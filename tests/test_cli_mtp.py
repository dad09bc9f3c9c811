"""`ftc evaluate --task mtp` and `ftc generate --speculative`, from a rewrite on the command line."""

import json

import pytest

from ftc import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with two modules and a tokenizer, made on the command line."""
    from ftc.data.bpe import train_bpe

    path = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 3, 300, path / "tokenizer")
    arguments = ["rewrite", "preset:tiny", "--passes", "add-mtp{depth=2},mtp-draft", "--tokenizer", tokenizer, "--out", path / "out"]
    assert cli.run([str(argument) for argument in arguments]) == 0
    return path / "out"


@pytest.fixture
def command(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_acceptance_is_shown_by_source_and_depth_with_a_verdict(command, folder, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} sat on the mat. " * 12)
    data = ("--data", tmp_path / "cats.txt", "--data", tmp_path / "dogs.txt", "--context", "32")
    code, out, _ = command("evaluate", folder, "--task", "mtp", *data, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["sources"]) == {"cats.txt", "dogs.txt"}
    for row in found["sources"].values():
        assert len(row["acceptance"]) == len(row["speed_up"]) == 2 and row["places"] > 0
    assert len(found["costs"]["verify"]) == 2
    code, out, err = command("evaluate", folder, "--task", "mtp", *data)
    assert code == 0 and "cats" in out and "pay" in err


def test_speculation_gives_the_greedy_text_and_counts(command, folder):
    prompt = ("--prompt", "the cat", "--max-tokens", "12")
    plain = json.loads(command("generate", folder, *prompt, "--json")[1])
    code, out, _ = command("generate", folder, *prompt, "--speculative", "--json")
    found = json.loads(out)
    assert code == 0 and found["text"] == plain["text"] and found["speculation"]["tokens"] <= 12
    code, out, err = command("generate", folder, *prompt, "--speculative", "--draft-depth", "1")
    assert code == 0 and plain["text"].strip() in out and "a run" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "MODEL", "--task", "mpt", "--data", "stdlib"], "did you mean 'mtp'"),
        (["generate", "MODEL", "--speculative", "--temperature", "0.5"], "decodes greedily"),
        (["generate", "MODEL", "--draft-depth", "1"], "is for --speculative"),
        (["generate", "MODEL", "--speculative", "--draft-depth", "0"], "--draft-depth"),
        (["rewrite", "MODEL", "--passes", "add-mtp{kind=both}", "--out", "x"], "kind"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(command, folder, arguments, words):
    code, _, err = command(*[folder if a == "MODEL" else a for a in arguments])
    assert code == 2 and words in err and err.count("\n") == 1

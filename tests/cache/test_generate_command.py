"""`ftc generate`: the text of recomputing, from a cache where the model can have one; the reason where it cannot."""

import pytest
from typer.testing import CliRunner

from ftc.cli import app

RUN = CliRunner()


def generate(*words: str):
    return RUN.invoke(app, ["generate", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    return shared_data / "stories260k"


def test_the_cache_changes_no_letter(folder):
    found, recomputed = (generate(folder, "--prompt", "Once", "--max-tokens", "20", *more) for more in ((), ("--no-cache",)))
    assert found.exit_code == recomputed.exit_code == 0, found.output
    assert found.stdout == recomputed.stdout and len(found.stdout) > 20


def test_a_text_past_the_models_positions_is_an_error(folder):
    found = generate(folder, "--prompt", "Once", "--max-tokens", "600")
    assert found.exit_code != 0 and "512 positions" in str(found.output) + str(found.exception)


def test_what_does_not_go_together_is_named(folder):
    for other in ("--no-cache", "--speculative"):
        found = generate(folder, "--compile", other)
        assert found.exit_code != 0 and other in str(found.output) + str(found.exception)


def test_a_model_that_cannot_have_a_cache_is_recomputed_and_says_why(folder, monkeypatch, capsys):
    import ftc.cache
    from ftc.errors import FtcError

    def refuse(*given, **options):
        raise FtcError("attention is not causal")

    monkeypatch.setattr(ftc.cache, "with_cache", refuse)
    found = generate(folder, "--prompt", "Once", "--max-tokens", "5")
    assert found.exit_code == 0 and "without a cache: attention is not causal" in found.output
    compiled = generate(folder, "--prompt", "Once", "--compile")
    assert compiled.exit_code != 0 and "not causal" in str(compiled.output) + str(compiled.exception)


def test_a_program_saved_with_a_cache_continues_and_one_without_gets_one(folder, tmp_path):
    for name, passes in (("cached", "insert-kv-cache{block_size=8}"), ("plain", "fuse-qkv")):
        made = RUN.invoke(app, ["rewrite", str(folder), "--passes", passes, "--out", str(tmp_path / name)])
        assert made.exit_code == 0, made.output
        found = generate(tmp_path / name, "--prompt", "Once", "--max-tokens", "12")
        assert found.exit_code == 0 and "without a cache" not in found.output
        assert found.stdout == generate(folder, "--prompt", "Once", "--max-tokens", "12", "--no-cache").stdout

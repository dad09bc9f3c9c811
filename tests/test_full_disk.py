"""A disk that is really full, wherever ftc writes: one paragraph, exit code 1, and nothing left on it."""

import ftc.models
import pytest
import torch
from ftc.models.checkpoints.llama2c import save_llama2c

import ftc
from ftc import cli
from ftc.errors import FtcFailure
from ftc.open_model import open_model

SIZE = "200k"  # preset:tiny takes more


def assert_empty(disk):
    assert not list(disk.iterdir()), list(disk.rglob("*"))


def test_rewrite_says_so(small_disk, capsys):
    disk = small_disk(SIZE)
    out = disk / "a" / "out"
    assert cli.run(["rewrite", "preset:tiny", "--passes", "raise-norm", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: could not write {out}/weights.safetensors: No space left on device; free space")
    assert err.count("\n") == 1
    assert_empty(disk)


def test_saving_models_and_programs_says_so(small_disk):
    disk, model = small_disk(SIZE), open_model("preset:tiny")
    program = ftc.capture(model, {"input_ids": torch.zeros(2, 12, dtype=torch.long)})
    for write in (lambda: ftc.models.save(model, disk / "out"), lambda: program.save(disk / "out")):
        with pytest.raises(FtcFailure, match=f"could not write {disk}/out/.*: No space left on device"):
            write()
        assert_empty(disk)


def test_saving_a_llama2c_file_says_so(small_disk, shared_data):
    disk = small_disk(SIZE)
    with pytest.raises(FtcFailure, match=f"could not write {disk}/out.bin: No space left on device"):
        save_llama2c(ftc.models.load(shared_data / "stories260k"), disk / "out.bin")
    assert_empty(disk)


def test_saving_a_transformers_model_says_so(small_disk):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=512))
    disk = small_disk(SIZE)
    with pytest.raises(FtcFailure, match=f"could not write {disk}/out: .*No space left on device"):
        ftc.models.save(model, disk / "out")
    assert_empty(disk)


def test_a_recipe_keeps_what_is_finished_and_nothing_of_the_stage(small_disk, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[stage]]\nkind = "rewrite"\nmodel = "preset:tiny"\npasses = ["raise-norm"]\n')
    out = small_disk(SIZE) / "out"
    assert cli.run(["run", str(recipe), "--out", str(out)]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: stage 'rewrite': could not write") and "No space left on device" in err
    assert sorted(path.name for path in out.iterdir()) == [".lock", "ftc.json", "recipe.toml"]

"""add-mtp through torchtitan: trained, logged part by part, saved with its modules and, stripped, as the next-token model."""

import pytest
import torch

import ftc
from ftc.data.tokenizer import load_tokenizer
from ftc.open_model import open_model
from ftc.train.metrics_file import METRICS_FILE, read_metrics

pytest.importorskip("torchtitan")


def run_file(data, **section):
    return {
        "model": {"flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "optimizer": "muon", "validate": False, **section},
        "training": {"steps": 4, "local_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 2},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }


@pytest.mark.slow
def test_a_run_trains_the_modules_and_saves_both_models(data, tmp_path):
    from ftc.train.launch import train

    loss = {"name": "mtp", "weight": [[0, 0.4], [0.5, 0.4], [0.5, 0.0]]}
    result = train(run_file(data, passes=["fuse-qkv", {"name": "add-mtp", "depth": 2}], loss=loss), tmp_path / "run", quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in row]
    for row, weight in zip(rows, (0.4, 0.4, 0.0, 0.0), strict=True):
        expected = row["next_token_loss"] + weight / 2 * (row["mtp_loss_1"] + row["mtp_loss_2"])
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    program, plain = open_model(result.program_folder), open_model(result.model_folder)
    end = load_tokenizer(result.tokenizer_folder).eos_id
    assert next(e for e in program._applied if e["pass"] == "add-mtp")["options"]["end_of_text"] == end
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    stripped = ftc.rewrite(program, ["strip-mtp"])
    assert torch.equal(stripped(input_ids=ids), program(input_ids=ids))
    torch.testing.assert_close(stripped(input_ids=ids), plain(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_modules_alone_are_trained_on_a_finished_model_on_one_rank_as_on_two(data, tmp_path):
    from ftc.train.launch import train

    base = train(run_file(data), tmp_path / "base", quiet=True)
    modules = {"name": "add-mtp", "depth": 1, "target": "model", "weight": 1.0}
    values = run_file(data, model=str(base.model_folder), passes=["fuse-qkv", modules], trainable=["mtp"], optimizer="torchtitan")
    result = train(values, tmp_path / "draft", quiet=True)
    values["training"]["local_batch_size"] = 1
    two = train(values, tmp_path / "two", quiet=True, num_processes=2)
    curves = [[row[key] for row in read_metrics(r.folder / METRICS_FILE) if "loss" in row for key in ("loss", "grad_norm")] for r in (result, two)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and len(set(curves[0])) == 8

    program, before, after = (open_model(folder) for folder in (result.program_folder, base.model_folder, result.model_folder))
    assert all(torch.equal(old, after.state_dict()[name]) for name, old in before.state_dict().items())
    assert all(parameter.requires_grad for parameter in program.parameters()), "frozen for that run only"
    example = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
    untrained = ftc.rewrite(before, ["fuse-qkv", ("add-mtp", {"depth": 1})], example=example).state_dict()
    modules = {name: weight for name, weight in program.state_dict().items() if name.startswith("mtp.")}
    assert modules and not any(torch.equal(weight, untrained[name]) for name, weight in modules.items())


@pytest.mark.slow
def test_a_stored_teacher_is_read_at_the_places_of_each_batch(data, tmp_path):
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    from ftc.data.prepare import prepare
    from ftc.data.source_table import Source
    from ftc.train.launch import train
    from ftc.train.stored_teacher import store_teacher

    prepared = prepare(tmp_path / "data", [Source(str(data))], vocab_size=300)
    torch.manual_seed(5)
    size = prepared.tokenizer.vocab_size
    teacher = Decoder(preset("tiny", vocab_size=size, initializer_range=0.1))
    store_teacher(teacher, prepared.train.stream(prepared.tokenizer), tmp_path / "logits", k=size, context=64)
    loss = {"name": "kl", "teacher_logits": str(tmp_path / "logits")}
    result = train(run_file(data, loss=loss, tokenizer=str(tmp_path / "data" / "tokenizer")), tmp_path / "run", quiet=True)
    rows = [row for row in read_metrics(result.folder / METRICS_FILE) if "loss" in row]
    assert 0 < rows[-1]["loss"] < rows[0]["loss"]

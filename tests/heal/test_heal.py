"""Healing: the closed form where it helps, text drawn from the model, and distillation through the trainer, resumed and on two ranks."""

import importlib.util
import json
import math

import pytest
import torch
from ftc.models import save
from ftc.models.decoder import Decoder, DecoderConfig

import ftc
from ftc.data.bpe import train_bpe
from ftc.errors import FtcError
from ftc.heal.closed_form import fit_outputs
from ftc.heal.heal import FITTED, RESULT, RUN, HealSettings, heal
from ftc.heal.sampling import sample
from ftc.rewrite.calibration import kl_divergence
from ftc.rewrite_folder import copy_tokenizer, run_usual_shapes

# Looked for, not imported: ftc.train.adapter has to come before it in a process.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs torchtitan")
V = 300


def model(seed=0):
    torch.manual_seed(seed)
    return Decoder(DecoderConfig(V, 32, 48, 2, 4, 2, 8, 64, bos_token_id=256, initializer_range=0.25)).eval()


def ids(rows, seed, length=24):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def converted(original, cache=0.4):
    example = {"input_ids": ids(2, 0, 12)}
    return ftc.rewrite(original, [("gqa-to-mla", {"cache": cache})], example=example, calibration=ids(32, 1), check=False)


def test_a_fit_is_kept_only_where_the_answer_is_nearer():
    original = model()
    program = converted(original)
    apart = [{"input_ids": ids(16, 7)}]
    before = kl_divergence(original, program, apart)
    rows = fit_outputs(original, program, [{"input_ids": ids(48, 3)}])
    assert len(rows) == 2 and {row["weight"] for row in rows} == {f"layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    assert all(row["kept"] == (row["after"] < row["before"]) for row in rows)
    assert kl_divergence(original, program, apart) <= before * 1.05


def test_a_fit_of_what_is_exact_changes_nothing_and_of_nothing_latent_is_an_error():
    original = model()
    program = ftc.rewrite(original, ["gqa-to-mla"], example={"input_ids": ids(2, 0, 12)}, check=False)
    fit_outputs(original, program, [{"input_ids": ids(16, 3)}])
    torch.testing.assert_close(program(ids(2, 5)), original(ids(2, 5)), rtol=1e-4, atol=1e-5)
    with pytest.raises(FtcError, match="no latent attention"):
        fit_outputs(original, ftc.capture(original, {"input_ids": ids(2, 0, 12)}), [{"input_ids": ids(8, 3)}])


def test_drawn_text_follows_the_models_own_distribution():
    original = model()
    drawn = sample(original, 256, 256, 3, seed=1)
    assert drawn.shape == (256, 3) and bool((drawn[:, 0] == 256).all())
    with torch.no_grad():
        expected = torch.softmax(original(torch.tensor([[256]]))[0, -1], -1)
    found = torch.bincount(drawn[:, 1], minlength=V) / 256
    likeliest = int(expected.argmax())
    spread = math.sqrt(float(expected[likeliest]) * (1 - float(expected[likeliest])) / 256)
    assert abs(float(found[likeliest] - expected[likeliest])) <= 5 * spread + 1e-3
    assert torch.equal(sample(original, 256, 4, 3, seed=1), sample(original, 256, 4, 3, seed=1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("heal")
    original = model()
    text = base / "text.jsonl"
    lines = [f"line {i} of a text that repeats itself, {i * i}. " * 3 for i in range(120)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    tokenizer = train_bpe(lines, V, base / "tokenizer")
    save(original, base / "original", tokenizer=tokenizer)
    program = converted(original)
    run_usual_shapes(program)
    program.save(base / "converted")
    copy_tokenizer(tokenizer, base / "converted")
    return base, text


SETTINGS = {"tokens": 16 * 64 * 12, "seq_len": 32, "batch": 16, "learning_rate": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize(("store", "parameters", "nproc"), [(0, "all", 2), (8, "converted", 1)])
def test_distillation_comes_nearer_and_a_finished_run_is_kept(folders, store, parameters, nproc):
    base, text = folders
    out = base / f"out-{store}"
    settings = HealSettings(**SETTINGS, store=store, parameters=parameters, nproc=nproc)
    found = heal(base / "converted", base / "original", out, settings, data=str(text), quiet=True)
    assert found["healed"] < 0.9 * found["converted"] and found["tokens"] == settings.steps * 16 * 32
    healed = ftc.load(found["program"])
    start = ftc.load(out / FITTED)
    moved = {n for n, p in healed.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    mlp = {n for n, _ in healed.named_parameters() if "mlp" in n}
    assert (mlp <= moved) if parameters == "all" else not (mlp & moved)
    again = heal(base / "converted", base / "original", out, settings, data=str(text), quiet=True)
    assert again["healed"] == found["healed"] and json.loads((out / RESULT).read_text())["steps"] == found["steps"]
    assert (out / RUN / "result.json").is_file()


@pytest.mark.slow
def test_a_run_ends_early_when_it_is_near_enough(folders):
    base, text = folders
    settings = HealSettings(**SETTINGS, closed_form=False, stop_below=100.0)
    found = heal(base / "converted", base / "original", base / "early", settings, data=str(text), quiet=True, changes={"metrics.log_freq": 1})
    assert found["steps"] == 5


@pytest.mark.parametrize(
    ("options", "reason"), [({"parameters": "some"}, "all.*converted"), ({"tokens": 10}, "less than one step"), ({"batch": 0}, "1 or more")]
)
def test_bad_settings_are_named(options, reason):
    with pytest.raises(FtcError, match=reason):
        HealSettings(**options)


def test_what_is_no_program_is_said(folders, tmp_path):
    base, text = folders
    with pytest.raises(FtcError, match="no certificates|ftc.json"):
        heal(base / "original", base / "original", tmp_path / "out", data=str(text), quiet=True)

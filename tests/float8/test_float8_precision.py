"""The precision report: every product is there, its shares are those of the numbers, and what it reads stays as it was."""

import json

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ftc
from ftc.errors import FtcError
from ftc.float8.operand_stats import empty, look, operand_casts
from ftc.float8.precision_report import precision_report
from ftc.float8.recipes import E4M3, Cast

IDS = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))


def decoder(name: str = "tiny"):
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(1)
    return Decoder(preset(name, vocab_size=128, num_hidden_layers=1))


@settings(deadline=None, max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 99), tiny=st.integers(0, 20), rows=st.integers(1, 20), cast=st.sampled_from([Cast(E4M3), Cast(E4M3, -1, True), "tiles", "blocks", "turned tiles"]))
def test_shares_are_those_of_the_numbers(seed, tiny, rows, cast):
    torch.manual_seed(seed)
    x = torch.rand(rows, 32) + 0.5
    small = x.flatten()[torch.randperm(x.numel())[:tiny]] = 1e-9  # far below what fits beside 0.5
    x.view(-1)[torch.randperm(x.numel())[:tiny]] = small
    live = x[:, 0] > 1e-8
    stats = empty(cast)
    look(stats, x, cast, "x")
    found = stats.as_dict()
    if isinstance(cast, Cast) and cast.over is None and bool(live.any()):
        assert found["underflow"] == pytest.approx(float((x < 1e-8).float().mean()))
    assert found["saturated"] == 0 and 0 <= found["underflow"] <= 1 and found["error"] < 0.07
    assert found["amax"] == pytest.approx(float(x.max()))


def test_a_scale_that_is_not_of_the_matrix_saturates():
    stats, x = empty(Cast(E4M3)), torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    scale = torch.tensor(448.0 / 2)
    stats.add(x, x * scale, scale, (x * scale).clamp(max=448) / scale, 448.0)
    assert stats.as_dict()["saturated"] == pytest.approx(1 / 3)  # the 4, of three numbers that are not zero


@pytest.mark.parametrize("passes", [[], ["raise", ("float8", {"recipe": "tensorwise", "save": "exact"})], ["fuse-qkv", ("float8", {"recipe": "fine"})]])
def test_every_product_is_listed_with_its_format(passes):
    model = decoder()
    program = ftc.rewrite(model, passes, example={"input_ids": IDS[:, :9]}, check=False) if passes else model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = precision_report(program, IDS, recipe="rowwise")
    rows = {row["weight"]: row for row in json.loads(json.dumps(report.as_dict()))["products"]}
    recipe = passes[-1][1]["recipe"] if passes else "rowwise"
    in_region = {name for name in rows if name != "lm_head.weight"}
    assert len(in_region) == (5 if "fuse-qkv" in passes else 7)
    for name in in_region:
        assert rows[name]["runs_in"] == (f"float8 {recipe}" if passes else "float32 (as rowwise)")
        assert set(rows[name]["operands"]) == set(operand_casts(recipe))
        assert all(0 < stats["error"] < 0.07 for stats in rows[name]["operands"].values())
    assert rows["lm_head.weight"]["runs_in"] == "float32 (as rowwise)" and rows["lm_head.weight"]["role"] == "head"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    assert "mlp.down_proj.weight" in str(report) and "underflow" in str(report)


def test_routers_and_experts_are_listed():
    program = ftc.rewrite(decoder("tiny-moe"), ["fuse-moe", "float8"], example={"input_ids": IDS[:, :9]}, check=False)
    rows = {row["weight"]: row for row in precision_report(program, IDS).as_dict()["products"]}
    assert rows["mlp.gate.weight"]["role"] == "router" and rows["mlp.gate.weight"]["runs_in"].startswith("float32")
    assert rows["mlp.experts.gate_up"]["runs_in"] == "float8 rowwise" and rows["mlp.experts.gate_up"]["note"]


@pytest.mark.parametrize(("dtype", "least"), [("fp8", 1 / 64), ("int4", 1 / 16)])
def test_stored_weights_are_listed_as_they_are_stored(dtype, least):
    ids = torch.randint(128, (8, 64), generator=torch.Generator().manual_seed(0))
    program = ftc.rewrite(decoder(), [("quantize", {"dtype": dtype, "rounding": "nearest"})], example={"input_ids": IDS[:, :9]}, check=False, calibration=ids)
    row = next(row for row in precision_report(program, IDS).as_dict()["products"] if row["weight"].startswith("self_attn.q_proj"))
    assert row["runs_in"].startswith(dtype) and row["operands"]["weight"]["error"] is None
    assert least <= row["operands"]["weight"]["saturated"] < 0.3  # each row's or group's largest is at the end of the format


def test_what_cannot_be_reported_is_named():
    model = decoder()
    with pytest.raises(FtcError, match="rowwise"):
        precision_report(model, IDS, recipe="rowwize")
    with pytest.raises(FtcError, match="text"):
        precision_report(model, None)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FtcError, match="mlp.down_proj.weight holds numbers that are not finite"):
        precision_report(model, IDS)


def test_the_command_takes_one_of_pass_and_precision(capsys):
    from ftc.cli import run

    assert run(["explain", "preset:tiny"]) == 2
    assert run(["explain", "preset:tiny", "--pass", "float8", "--precision"]) == 2
    assert run(["explain", "preset:tiny", "--precision"]) == 2
    assert run(["explain", "preset:tiny", "--precision", "--calibration", "self", "--recipe", "fien"]) == 2
    said = capsys.readouterr().err
    assert "--pass NAME or --precision" in said and "--calibration text.jsonl" in said and "fine" in said

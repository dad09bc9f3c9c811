"""A checkpoint carried over to another list of passes: values and moments go through the lenses, all else stays."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ftc.models.decoder import Decoder
from ftc.models.presets import preset

import ftc
from ftc.errors import FtcError

pytest.importorskip("torchtitan")

from ftc.train.carry_over import GROUPS, MODEL, STATE, _read, carry_over  # noqa: E402

EXAMPLE = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
MOMENTS = ("exp_avg", "exp_avg_sq")


def program(passes):
    torch.manual_seed(0)
    return ftc.rewrite(Decoder(preset("tiny", vocab_size=64)), passes, example=EXAMPLE, check=False)


def stored(folder, model, step=3, **rest):
    """A checkpoint of `model` as a training run writes it, with random moments; returns its entries."""
    entries = dict(rest)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        entries[MODEL + name] = parameter.detach().clone()
        for moment in MOMENTS:
            entries[f"{STATE}{name}.{moment}"] = torch.rand(parameter.shape, generator=generator)
        entries[f"{STATE}{name}.step"] = torch.tensor(float(step))
        entries[f"{GROUPS}{name}.lr"] = 0.5
    dcp.save(dict(entries), checkpoint_id=folder / f"step-{step}", no_dist=True)
    return entries


def test_fused_parameters_hold_the_values_and_moments_of_their_parts(tmp_path):
    folder, plain, fused = tmp_path / "checkpoint", program([]), program(["fuse-qkv"])
    before = stored(folder, plain, **{"train_state.step": 3})
    assert carry_over(folder, plain, fused) == 3
    after = _read(folder / "step-3")
    assert {n.removeprefix(MODEL) for n in after if n.startswith(MODEL)} == {n for n, _ in fused.named_parameters()}
    assert after["train_state.step"] == 3
    (target,) = [n for n, _ in fused.named_parameters() if n.startswith("layers.1.self_attn.qkv")]
    parts = [f"layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert torch.equal(after[MODEL + target], torch.cat([before[MODEL + part] for part in parts]))
    for moment in MOMENTS:
        expected = torch.cat([before[f"{STATE}{part}.{moment}"] for part in parts])
        assert torch.equal(after[f"{STATE}{target}.{moment}"], expected)
    assert after[f"{GROUPS}{target}.lr"] == 0.5
    assert (tmp_path / "checkpoint-before-3" / "step-3" / ".metadata").is_file()


def test_there_and_back_gives_the_same_bits(tmp_path):
    folder, plain, fused = tmp_path / "checkpoint", program([]), program(["raise", "fuse-qkv", "fuse-gate-up"])
    before = stored(folder, plain)
    carry_over(folder, plain, fused)
    carry_over(folder, fused, plain)
    after = _read(folder / "step-3")
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value, name


def test_parameters_with_different_options_do_not_become_one(tmp_path):
    folder, plain = tmp_path / "checkpoint", program([])
    stored(folder, plain, **{f"{GROUPS}layers.0.self_attn.q_proj.weight.weight_decay": 0.1})
    with pytest.raises(FtcError, match="different optimizer options"):
        carry_over(folder, plain, program(["fuse-qkv"]))
    assert (folder / "step-3" / ".metadata").is_file() and len(list(tmp_path.iterdir())) == 1


def test_passes_that_add_parameters_are_refused(tmp_path):
    folder, plain = tmp_path / "checkpoint", program([])
    stored(folder, plain)
    ids = EXAMPLE["input_ids"]
    model = Decoder(preset("tiny", vocab_size=64))
    grown = ftc.rewrite(model, ["add-mtp"], example={"input_ids": ids, "labels": ids}, check=False)
    with pytest.raises(FtcError, match="the passes add"):
        carry_over(folder, plain, grown)


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(FtcError, match="no finished checkpoint"):
        carry_over(tmp_path, program([]), program([]))

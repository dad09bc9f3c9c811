"""Every listed family in each attention spelling, captured and raised: each block's parts recognised, nothing left over."""

import pytest
import torch
from capture_families import LISTED, SPELLINGS, UNLISTED, family, ids, structures

import ftc

# Norms, rotations, attentions and MLP parts of one block; None where the number differs between blocks.
PARTS = {
    "Llama": (2, 2, 1, 1),
    "Mistral": (2, 2, 1, 1),
    "Qwen2": (2, 2, 1, 1),
    "Qwen3": (4, 2, 1, 1),
    "Gemma2": (4, 2, 1, 1),
    "Phi3": (2, 2, 1, 1),
    "Olmo2": (4, 2, 1, 1),
    "Granite": (2, 2, 1, 1),
    "GPTNeoX": (2, 2, 1, 0),
    "GPT2": (2, 0, 1, 1),
    "Mixtral": (2, 2, 1, 0),  # its gates are inside ftc.moe
    "DeepseekV3": (4, 2, 1, None),
    "Starcoder2": (2, 2, 1, 0),
}
MIXTURES = {"Mixtral": 3, "DeepseekV3": 2}  # of three blocks; DeepSeek's first is dense
PASSES = ("raise-norm", "raise-rope", "raise-attention", "raise-mlp")
QUICK = [("Llama", "eager"), ("Gemma2", "eager"), ("GPT2", "eager"), ("DeepseekV3", "sdpa")]


def check(name: str, spelling: str, dtype: torch.dtype) -> None:
    model = family(name, spelling).to(dtype)
    program = ftc.rewrite(model, ["raise"], example={"input_ids": ids(2, 12)})
    report = program.report.as_dict()
    assert report["residue"] == []
    for pass_name, expected in zip(PASSES, PARTS.get(name, (None,) * 4), strict=True):
        entry = report["passes"][pass_name]
        assert entry["contract"] == "exact" and entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12
        for region in program.regions:
            site = entry["sites"][region.ftc_name]
            if expected is not None:
                assert len(site["matches"]) + site["already"] >= expected, (pass_name, region.ftc_name)
    assert report["passes"]["raise-moe"]["matches"] == MIXTURES.get(name, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for structure in ("other size", "past a window", "left padding"):
        inputs = structures()[structure]
        found, expected = program(**inputs).logits, model(**inputs, use_cache=False).logits
        rows = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(found.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(found[rows], expected[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "spelling"), QUICK)
def test_some_families_are_raised_without_residue(name, spelling):
    check(name, spelling, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", [*LISTED, *UNLISTED])
def test_every_family_is_raised_without_residue(name, spelling):
    check(name, spelling, torch.float32)


BFLOAT16 = [
    ("Llama", "eager"), ("Qwen3", "sdpa"), ("Gemma2", "eager"), ("GPT2", "eager"), ("Mixtral", "eager"), ("Mixtral", "sdpa"), ("DeepseekV3", "eager"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spelling"), BFLOAT16)
def test_bfloat16_graphs_are_raised_too(name, spelling):
    check(name, spelling, torch.bfloat16)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_raised_norms_keep_the_bits_of_a_bfloat16_model(name):
    model = family(name, "eager").to(torch.bfloat16)  # one ulp elsewhere, and a router picks another expert
    program = ftc.rewrite(model, ["raise-norm"], example={"input_ids": ids(2, 12)})
    assert program.report.as_dict()["passes"]["raise-norm"]["matches"] == 7
    inputs = structures()["other size"]
    assert torch.equal(program(**inputs).logits, model(**inputs, use_cache=False).logits)

"""Captured programs have the bits of the models they were captured from, whatever the family, spelling and input."""

import pytest
import torch
from capture_families import LISTED, SPELLINGS, UNLISTED, assert_same_bits, family, ids, structures

import ftc

QUICK = {
    ("Llama", "sdpa"): ("example", "other size", "left padding"),
    ("Gemma2", "eager"): ("past a window",),
    ("Mistral", "sdpa"): ("other size", "past a window"),
    ("GPT2", "eager"): ("labels",),
    ("DeepseekV3", "sdpa"): ("other size",),
    ("Starcoder2", "sdpa"): ("packed",),
}


@pytest.mark.parametrize(("name", "spelling"), QUICK)
def test_a_few_structures(name, spelling):
    model = family(name, spelling)
    program = ftc.capture(model, {"input_ids": ids(2, 12)})
    assert program.state_dict().keys() == model.state_dict().keys()
    for structure in QUICK[name, spelling]:
        assert_same_bits(program, model, structures()[structure], use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", [*LISTED, *UNLISTED])
def test_every_structure(name, spelling):
    model = family(name, spelling)
    program = ftc.capture(model, {"input_ids": ids(2, 12)})
    for inputs in structures().values():
        assert_same_bits(program, model, inputs, use_cache=False)
    model.train(), program.train()
    assert_same_bits(program, model, dict(input_ids=ids(2, 12)), use_cache=False)
    model.eval(), program.eval()
    model.bfloat16(), program.bfloat16()
    for structure in ("other size", "left padding"):
        assert_same_bits(program, model, structures()[structure], use_cache=False)


def test_dropout_with_the_same_seed():
    model = family("GPT2", "sdpa").train()
    program = ftc.capture(model, {"input_ids": ids(2, 12)})
    assert_same_bits(program, model, dict(input_ids=ids(3, 9)), use_cache=False)
    torch.manual_seed(0)
    one = program(input_ids=ids(2, 12)).logits
    assert not torch.equal(one, program(input_ids=ids(2, 12)).logits)
    program.eval(), model.eval()
    assert_same_bits(program, model, dict(input_ids=ids(2, 12)), use_cache=False)


def test_blocks_of_one_structure_share_one_graph():
    program = ftc.capture(family("Llama", "sdpa"), {"input_ids": ids(2, 12)})
    assert len(program.regions) == 3 and len({region.code for region in program.regions}) == 1
    mixed = ftc.capture(family("DeepseekV3", "sdpa"), {"input_ids": ids(2, 12)})
    assert len({region.code for region in mixed.regions}) == 2  # one dense block, then mixtures of experts


def test_a_cache_is_refused():
    model = family("Llama", "sdpa")
    program = ftc.capture(model, {"input_ids": ids(2, 12)})
    from transformers import DynamicCache

    with pytest.raises(ftc.FtcError, match="use_cache=False"):
        program(input_ids=ids(2, 12), past_key_values=DynamicCache())

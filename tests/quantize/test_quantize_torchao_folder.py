"""A quantised program in transformers with torchao: the same bits."""

import json

import pytest
import torch

import ftc
from ftc.errors import FtcError

pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers")
from ftc.quantize.torchao_folder import save_torchao  # noqa: E402

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="sdpa", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def quantized(model, text=None, **options):
    return ftc.rewrite(model, [("quantize", options)], example={"input_ids": IDS}, calibration=text, check=False).eval()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"dtype": "int8"}, {"dtype": "fp8", "granularity": "tensor"}, {"dtype": "int4"}, {"dtype": "int8", "keep": ["*o_proj*"]}])
def test_transformers_gives_the_same_logits(model, options, tmp_path):
    program = quantized(model, **options)
    program.save(tmp_path / "program")
    count = save_torchao(ftc.load(tmp_path / "program"), tmp_path / "torchao")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torchao").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, program(input_ids=IDS).logits)
    assert count == (12 if "keep" in options else 14)
    assert json.loads((tmp_path / "torchao" / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"


def test_what_torchao_has_no_form_for_is_an_error(model, tmp_path):
    with pytest.raises(FtcError, match="fp8-block"):
        save_torchao(quantized(model, dtype="fp8", granularity="block"), tmp_path / "t")
    with pytest.raises(FtcError, match="groups that divide"):
        save_torchao(quantized(model, dtype="int4", group=40), tmp_path / "t")
    with pytest.raises(FtcError, match="no quantised weights"):
        save_torchao(ftc.capture(model, {"input_ids": IDS}), tmp_path / "t")
    fused = ftc.rewrite(model, ["fuse-qkv", ("quantize", {"dtype": "int8"})], example={"input_ids": IDS}, check=False)
    with pytest.raises(FtcError, match="stack lens"):
        save_torchao(fused, tmp_path / "t")
    assert not (tmp_path / "t").exists()

"""Converted attentions in DeepSeek's form give the same outputs in transformers' own DeepSeek-V3 attention."""

import json

import pytest
import torch
from ftc.models.checkpoints.deepseek_attention import save_deepseek_attention
from ftc.models.checkpoints.safetensors_io import read_index
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ftc
from ftc.errors import FtcError
from ftc.rewrite.observe import observing

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(seed, bias=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_bias=bias
    )
    return transformers.LlamaForCausalLM(config).eval()


@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(options=st.sampled_from([{}, {"rank": 12, "rope": 8}, {"rank": 9, "rope": 12}]), seed=st.integers(0, 50))
def test_deepseeks_attention_runs_a_converted_llama(options, seed, tmp_path_factory):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    calibration = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    example = {"input_ids": IDS, "use_cache": False}
    program = ftc.rewrite(llama(seed), [("gqa-to-mla", options)], example=example, calibration=calibration, check=False)
    folder = tmp_path_factory.mktemp("attention") / "deepseek"
    save_deepseek_attention(program, folder, [example])
    given_config = json.loads((folder / "config.json").read_text())
    given_config["architectures"], given_config["rope_parameters"] = None, {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.DeepseekV3Config(**{k: v for k, v in given_config.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    tensors = {name: stored.read() for name, stored in read_index(folder / "model.safetensors").items()}
    columns = json.loads((folder / "rope_columns.json").read_text())
    seen = {}

    def names(variant):
        nodes = {node.name: node for node in variant.captured.graph.nodes}
        latent = next(n for n in nodes.values() if n.target is torch.ops.ftc.latent_attention.default)
        out = latent
        while out.target is not torch.ops.aten.linear.default:
            out = next(iter(out.users))
        tables = [n.name for n in nodes.values() if n.op == "placeholder" and "position_embeddings" in n.name]
        return [latent.args[2].args[0].args[0].name, out.name, *tables]

    with torch.no_grad(), observing(program, {r.name: names for r in program.regions}, lambda region, values: seen.setdefault(region, values)):
        program(**example)
    for number, region in enumerate(program.regions):
        x, wanted, cos, sin = seen[region.name]
        attention = DeepseekV3Attention(config, number).eval()
        prefix = f"model.layers.{number}.self_attn."
        attention.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        with torch.no_grad():
            found, _ = attention(x, (cos[..., columns[number]], sin[..., columns[number]]), None)
        assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_what_has_no_place_is_said(tmp_path):
    example = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(FtcError, match="no latent attention"):
        save_deepseek_attention(ftc.capture(llama(0), example), tmp_path / "a", [example])
    program = ftc.rewrite(llama(0, bias=True), ["gqa-to-mla"], example=example, check=False)
    with pytest.raises(FtcError, match="queries have a bias"):
        save_deepseek_attention(program, tmp_path / "b", [example])
    assert not list(tmp_path.iterdir())

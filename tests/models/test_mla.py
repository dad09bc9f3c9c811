"""Latent attention: against its equations written out, against transformers' DeepSeek-V3, and to folders and back."""

import math

import ftc.models
import pytest
import torch
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.mla import LATENT_SIZES, LatentAttention, LatentConfig, softmax_scale
from ftc.models.presets import preset
from ftc.models.rope import RopeConfig, rope_cos_sin
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
from ftc.errors import FtcError

YARN = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)


@st.composite
def configs(draw):
    latent = LatentConfig(
        kv_lora_rank=draw(st.integers(1, 12)), qk_nope_head_dim=draw(st.integers(1, 9)), v_head_dim=draw(st.integers(1, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)), q_lora_rank=draw(st.none() | st.integers(1, 9)),
    )  # fmt: skip
    heads, bias = draw(st.integers(1, 3)), draw(st.booleans())
    return DecoderConfig(
        vocab_size=31, hidden_size=draw(st.integers(2, 12)), intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=latent.qk_rope_head_dim, max_position_embeddings=64, latent=latent,
        attention_bias=bias, attention_output_bias=bias, rope_interleaved=draw(st.booleans()), rope=draw(st.sampled_from([RopeConfig(), YARN])),
    )  # fmt: skip


def drawn(config, seed):
    """A decoder with all weights, norms and biases drawn anew."""
    model, generator = Decoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() > 1 else 1.0))
    return model


def turned(x_TE, cos_TE, sin_TE, interleaved):
    """RoPE pair by pair, as complex numbers."""
    half = x_TE.shape[-1] // 2
    pairs = [(2 * i, 2 * i + 1) for i in range(half)] if interleaved else [(i, i + half) for i in range(half)]
    out = torch.empty_like(x_TE)
    for a, b in pairs:
        number = torch.complex(x_TE[:, a], x_TE[:, b]) * torch.complex(cos_TE[:, a], sin_TE[:, a])
        out[:, a], out[:, b] = number.real, number.imag
    return out


def written_out(attention, x_TD, cos_TE, sin_TE):
    """Equations 9 to 19 of the report for one sequence, head by head and place by place."""
    sizes, weight = attention.latent, {name: value for name, value in attention.named_parameters()}

    def linear(name, value):
        return value @ weight[f"{name}.weight"].T + weight.get(f"{name}.bias", 0.0)

    def norm(name, value):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[f"{name}.weight"]

    down = linear("kv_a_proj_with_mqa", x_TD)
    c_TL = norm("kv_a_layernorm", down[:, : sizes.kv_lora_rank])
    r_TE = turned(down[:, sizes.kv_lora_rank :], cos_TE, sin_TE, attention.rope_interleaved)
    q = linear("q_proj", x_TD) if sizes.q_lora_rank is None else linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x_TD)))
    per_query, per_kv, outputs = sizes.qk_head_dim, sizes.qk_nope_head_dim + sizes.v_head_dim, []
    for head in range(q.shape[1] // per_query):
        q_TK = q[:, head * per_query : (head + 1) * per_query]
        up = weight["kv_b_proj.weight"][head * per_kv : (head + 1) * per_kv]
        q_TN, q_TE = q_TK[:, : sizes.qk_nope_head_dim], turned(q_TK[:, sizes.qk_nope_head_dim :], cos_TE, sin_TE, attention.rope_interleaved)
        # absorbed: W_UK goes to the query's side, so that keys are the latent itself
        scores = (q_TN @ up[: sizes.qk_nope_head_dim]) @ c_TL.T + q_TE @ r_TE.T
        scores = (scores * attention.scale).masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ c_TL @ up[sizes.qk_nope_head_dim :].T)
    return linear("o_proj", torch.cat(outputs, -1))


@given(configs(), st.integers(1, 9), st.integers(0, 99))
def test_it_is_the_reports_equations_absorbed(config, tokens, seed):
    attention = drawn(config, seed).layers[0].self_attn.double()
    assert isinstance(attention, LatentAttention)
    x_BTD = torch.randn(2, tokens, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    places = torch.arange(tokens)[None]
    cos, sin = rope_cos_sin(config.rope, config.head_dim, config.max_position_embeddings, places, config.rope_interleaved, torch.float64)
    found = attention(x_BTD, cos, sin)
    expected = torch.stack([written_out(attention, x_TD, cos[0], sin[0]) for x_TD in x_BTD])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inputs = [x_BTD, *attention.parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), inputs, allow_unused=True) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@settings(max_examples=8)
@given(configs(), st.integers(0, 99))
def test_a_folder_is_read_by_transformers_and_back(tmp_path_factory, config, seed):
    transformers = pytest.importorskip("transformers")
    folder, model = tmp_path_factory.mktemp("mla") / "m", drawn(config, seed).eval()
    ftc.models.save(model, folder)
    back = ftc.models.load(folder)
    assert back.config == config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5 * float(model(ids).abs().max()))


def test_folders_of_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    common = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2, "n_routed_experts": 8}
    common |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    dense = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**common, **sizes, first_k_dense_replace=2)).eval()
    dense.save_pretrained(tmp_path / "dense")
    model, ids = ftc.models.load(tmp_path / "dense"), torch.arange(12)[None]
    assert isinstance(model, Decoder) and model.config.latent == LatentConfig(**sizes)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dense(ids).logits, rtol=1e-4, atol=1e-6)


def test_it_is_captured_raised_and_proved():
    model = Decoder(preset("tiny-mla")).eval()
    ids = torch.arange(24).view(2, 12)
    program = ftc.rewrite(model, ["raise", "fuse-gate-up"], example={"input_ids": ids})
    torch.testing.assert_close(program(input_ids=ids), model(ids), rtol=1e-5, atol=1e-5)
    found = {entry["pass"] for entry in program._applied}
    assert "fuse-gate-up" in found


def test_published_sizes_and_what_a_cache_keeps():
    assert {name: latent.cache_elements for name, latent in LATENT_SIZES.items()} == dict.fromkeys(LATENT_SIZES, 576)
    config = preset("tiny", latent="deepseek-v3")
    assert config.latent == LATENT_SIZES["deepseek-v3"] and config.head_dim == 64 and config.num_key_value_heads == config.num_attention_heads
    assert softmax_scale(LATENT_SIZES["deepseek-v3"], RopeConfig()) == 192**-0.5
    assert preset("tiny", latent={"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 4}).head_dim == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent": "deepseek-v4"}, "unknown latent sizes 'deepseek-v4'; did you mean 'deepseek-v"),
        ({"latent": {"kv_rank": 4}}, "unknown field 'kv_rank' of latent; did you mean 'kv_lora_rank'"),
        ({"latent": {"kv_lora_rank": 4}}, "latent lacks qk_nope_head_dim, qk_rope_head_dim, v_head_dim"),
        ({"latent": "deepseek-v3", "head_dim": 32}, "head_dim is 32, but RoPE turns qk_rope_head_dim 64"),
        ({"latent": "deepseek-v3", "num_key_value_heads": 2}, "num_key_value_heads is 2; latent attention has one for each of the 4 heads"),
        ({"latent": "deepseek-v3", "attention_bias": True}, "attention_bias and attention_output_bias differ"),
        ({"latent": {"kv_lora_rank": 0, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 4}}, "kv_lora_rank is 0"),
        ({"latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 5, "v_head_dim": 4}}, "qk_rope_head_dim is 5; RoPE turns pairs"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, said):
    with pytest.raises(FtcError) as raised:
        preset("tiny", **changes)
    assert said in str(raised.value)

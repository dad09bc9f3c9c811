"""Folders with experts: transformers' own read and written back, ours read by transformers, and what is refused."""

import dataclasses
import json

import ftc.models
import pytest
import torch
from ftc.models.checkpoints.huggingface import huggingface_lens, load_huggingface
from ftc.models.checkpoints.huggingface_config import (
    NotRepresentable,
    config_from_dict,
    config_to_dict,
    family_config_to_dict,
)
from ftc.models.checkpoints.huggingface_experts import EXPERTS
from ftc.models.decoder import Decoder
from ftc.models.moe import MoeConfig
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError

CLASSES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "deepseek_v3": "DeepseekV3"}


def ids_of():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def assert_close(ours, theirs, bound=1e-5):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def on_disk(folder):
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@st.composite
def huggingface_configs(draw):
    family, groups = draw(st.sampled_from(sorted(CLASSES))), draw(st.sampled_from([1, 2]))
    experts, layers = draw(st.sampled_from([4, 6])), draw(st.integers(1, 2))
    config = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 20, "initializer_range": 0.2, "tie_word_embeddings": draw(st.booleans()), "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": None, "num_experts_per_tok": draw(st.integers(1, 2)),
    }  # fmt: skip
    config[EXPERTS[family].count] = experts
    dense = draw(st.integers(0, layers - 1))
    if family in ("qwen3_moe", "olmoe"):
        config |= {"norm_topk_prob": draw(st.booleans()), "attention_bias": draw(st.booleans())}
    if family == "qwen3_moe":
        config |= {"moe_intermediate_size": 16, "mlp_only_layers": list(range(dense)), "head_dim": 8}
    if family == "deepseek_v3":
        config |= {"moe_intermediate_size": 16, "first_k_dense_replace": dense, "n_group": groups, "topk_group": draw(st.integers(1, groups))}
        config |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
        config |= {"n_shared_experts": draw(st.integers(1, 2)), "norm_topk_prob": draw(st.booleans()), "routed_scaling_factor": 1.5}
    return family, config


def theirs_of(family, config, seed, dtype=torch.float32):
    """A tiny random model of transformers, norms, biases and selection biases drawn too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**config)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                tensor.normal_(mean=float("norm" in name), std=0.3)
            elif "gate.weight" in name:
                tensor.normal_()
    return model.to(dtype).eval()


@settings(max_examples=16)
@given(huggingface_configs(), st.integers(0, 99), st.sampled_from([10**9, 20_000]))
def test_folders_of_transformers_give_the_same_logits_and_go_back(tmp_path_factory, drawn, seed, shard_bytes):
    import transformers

    theirs, folder = theirs_of(*drawn, seed), tmp_path_factory.mktemp("moe")
    theirs.save_pretrained(folder / "theirs", max_shard_size=shard_bytes)
    ours = ftc.models.load(folder / "theirs")
    assert isinstance(ours, Decoder) and ours.config.moe is not None and not ours.training
    with torch.no_grad():
        expected = theirs(ids_of()).logits
        assert_close(ours(ids_of()), expected)
        ftc.models.save(ours, folder / "ours", max_shard_bytes=shard_bytes)
        back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager", experts_implementation="eager")
        assert_close(back.eval()(ids_of()).logits, expected)
    before, after = on_disk(folder / "theirs"), on_disk(folder / "ours")
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name: type(module).__name__ for name, module in back.named_modules()} == {name: type(m).__name__ for name, m in theirs.named_modules()}


@settings(max_examples=6)
@given(huggingface_configs(), st.sampled_from([torch.bfloat16, torch.float64]))
def test_other_dtypes_go_back_with_the_same_bits(tmp_path_factory, drawn, dtype):
    theirs, folder = theirs_of(*drawn, 0, dtype), tmp_path_factory.mktemp("moe")
    theirs.save_pretrained(folder / "theirs")
    ours = ftc.models.load(folder / "theirs")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ftc.models.save(ours, folder / "ours")
    before, after = on_disk(folder / "theirs"), on_disk(folder / "ours")
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())


FORMS = {
    "mixtral": {},
    "qwen3_moe": {"qk_norm": "head", "first_dense_layers": 1, "attention_bias": True, "attention_output_bias": True},
    "olmoe": {"qk_norm": "projection", "head_dim": 8, "moe": {"norm_topk_prob": False}},
    "deepseek_v3": {
        "latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, "first_dense_layers": 1,
        "moe": {"gate": "sigmoid", "selection_bias": True, "groups": 4, "topk_groups": 2, "shared_intermediate_size": 256, "routed_scaling_factor": 2.5},
    },
    "qwen3": {"qk_norm": "head", "moe": None},
}  # fmt: skip


def ours_of(form, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 32, "initializer_range": 0.2}
    model = Decoder(preset("tiny-moe", **sizes | FORMS[form] | changes)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                tensor.normal_(mean=float("norm" in name), std=0.3)
    return model


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_our_own_folders_there_and_back(tmp_path, form, interleaved):
    transformers = pytest.importorskip("transformers")
    model = ours_of(form, **({} if form == "deepseek_v3" else {"rope_interleaved": interleaved}))
    ftc.models.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == form
    same = load_huggingface(tmp_path / "m", rope_interleaved=model.config.rope_interleaved)
    assert same.config == model.config
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        assert_close(theirs(ids_of()).logits, model(ids_of()))
        assert_close(ftc.models.load(tmp_path / "m")(ids_of()), model(ids_of()))


def test_the_names_on_disk_are_those_of_released_folders():
    def stored(form):
        return [name for name in huggingface_lens(ours_of(form).config).targets if "layers.1." in name and ("moe" in name or "mlp" in name)]

    assert {name.replace("experts.7", "experts.0") for name in stored("mixtral")} >= {
        f"model.layers.1.block_sparse_moe.{name}.weight" for name in ("gate", "experts.0.w1", "experts.0.w2", "experts.0.w3")
    }
    assert len(stored("mixtral")) == len(stored("olmoe")) == 1 + 8 * 3
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in stored("olmoe")
    more = {"gate.e_score_correction_bias", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"}
    assert set(stored("deepseek_v3")) == {*stored("olmoe"), *(f"model.layers.1.mlp.{name}" for name in more)}


def test_a_selection_bias_keeps_its_float32_beside_bfloat16_weights(tmp_path):
    model = ours_of("deepseek_v3").bfloat16()
    router = model.layers[1].mlp.gate
    router.e_score_correction_bias = torch.arange(8) * 0.001 + 1  # what bfloat16 would round to 1
    ftc.models.save(model, tmp_path / "m")
    back = ftc.models.load(tmp_path / "m")
    assert back.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(back.layers[1].mlp.gate.e_score_correction_bias, router.e_score_correction_bias)


def test_a_blueprint_has_parameters_on_meta_and_real_selection_biases(tmp_path):
    ftc.models.save(ours_of("deepseek_v3"), tmp_path / "m")
    model = ftc.models.blueprint(tmp_path / "m")
    assert all(p.is_meta for p in model.parameters())
    assert [not b.is_meta and not b.any() for b in model.buffers()] == [True]


@pytest.mark.parametrize("form", [form for form in FORMS if form in EXPERTS])
def test_configs_there_and_back_under_each_spelling_of_the_count(form):
    config = ours_of(form).config
    given = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(given) == config
    count = given.pop(EXPERTS[form].count)
    for spelling in ("num_local_experts", "num_experts", "n_routed_experts"):
        assert config_from_dict({**given, spelling: count}) == config


# --- what is refused ----------------------------------------------------------------------------------------------


def edit(folder, change, **changes):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def without_expert(tensors, number):
    for name in [name for name in tensors if f"layers.1.block_sparse_moe.experts.{number}." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "changes", "words"),
    [
        (lambda t: None, {"num_local_experts": 4}, r"layers\.0 has the tensors of 8 experts, but config.json says 4; they do not belong"),
        (lambda t: None, {"num_local_experts": 16}, r"layers\.0 has the tensors of 8 experts, but config.json says 16"),
        (lambda t: without_expert(t, 7), {}, r"layers\.1 has the tensors of 7 experts, but config.json says 8"),
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), {}, r"lacks 1 of the tensors.*experts\.3\.w2"),
        (lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(2)}), {}, r"layers\.1 has all experts in one tensor"),
        (lambda t: None, {"intermediate_size": 99}, r"\[128, 32\].*\[99, 32\]"),
        (lambda t: None, {"num_experts_per_tok": 9}, r"layers\.0\.mlp: top_k is 9; a token has at most num_experts = 8"),
        (lambda t: None, {"num_hidden_layers": 3}, r"lacks .* of the tensors.*layers\.2"),
    ],
)
def test_weights_and_config_that_do_not_belong_together_are_named(tmp_path, change, changes, words):
    pytest.importorskip("safetensors")
    ftc.models.save(ours_of("mixtral"), tmp_path / "m")
    edit(tmp_path / "m", change, **changes)
    with pytest.raises(FtcError, match=words) as caught:
        ftc.models.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("mixtral", {"sliding_window": 16}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"head_dim": 16}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"use_sliding_window": True}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
    ],
)
def test_near_misses_are_left_to_transformers(form, changes):
    (key,) = changes
    with pytest.raises(NotRepresentable, match=key.removeprefix("use_")):
        config_from_dict({**config_to_dict(ours_of(form).config), **changes})


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("mixtral", {"capacity_factor": 1.25}, r"\(mixtral\) cannot hold capacity_factor 1.25, only None"),
        ("mixtral", {"expert_choice": True, "norm_topk_prob": False}, "cannot hold norm_topk_prob False, only True"),
        ("mixtral", {"gate": "sigmoid"}, "cannot hold gate 'sigmoid', only 'softmax'"),
        ("mixtral", {"weight_on_input": True}, "cannot hold weight_on_input True"),
        ("mixtral", {"virtual_groups": 2}, "cannot hold virtual_groups 2"),
        ("olmoe", {"shared_intermediate_size": 64}, "cannot hold shared_intermediate_size 64, only 0"),
        ("deepseek_v3", {"shared_intermediate_size": 200}, "cannot hold shared_intermediate_size 200, only 128"),
        ("deepseek_v3", {"shared_intermediate_size": 0}, "cannot hold shared_intermediate_size 0, only 128"),
        ("deepseek_v3", {"selection_bias": False}, "cannot hold selection_bias False"),
    ],
)
def test_experts_that_no_family_has_are_written_in_a_form_of_ours(tmp_path, form, changes, words):
    config = ours_of(form).config
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes), rope_interleaved=True, eos_token_ids=(3, 4))
    with pytest.raises(FtcError, match=words):
        family_config_to_dict(config)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    ftc.models.save(model, tmp_path / "m")
    with torch.no_grad():
        assert_close(ftc.models.load(tmp_path / "m")(ids_of()), model(ids_of()))
    same = load_huggingface(tmp_path / "m", rope_interleaved=True)
    assert same.config == config
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="ftc_decoder"):
        transformers.AutoConfig.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, "unknown field 'num_layers' of a decoder; did you mean 'num_hidden_layers'"),
        ({"moe": {"top_k": 2}}, "num_experts"),
        ({"moe": 3}, "is not valid"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs factor"),
    ],
)
def test_a_config_of_ours_that_cannot_be_is_named(changes, words):
    given = config_to_dict(ours_of("mixtral", moe={"capacity_factor": 1.25}).config)
    assert given["model_type"] == "ftc_decoder"
    with pytest.raises(FtcError, match=words):
        config_from_dict(given | changes)


def test_attentions_that_no_family_has_are_named():
    for changes, words in [
        ({"first_dense_layers": 1}, r"\(mixtral\) cannot hold first_dense_layers 1, only 0"),
        ({"attention_bias": True, "attention_output_bias": True}, "go without biases"),
        ({"qk_norm": "projection", "head_dim": 16}, r"\(olmoe\) cannot hold head_dim 16, only hidden_size / num_attention_heads"),
        ({"qk_norm": "projection", "moe": None}, "no Hugging Face family has qk_norm 'projection' without experts"),
    ]:
        with pytest.raises(FtcError, match=words):
            family_config_to_dict(ours_of("mixtral", **changes).config)


def test_a_llama2c_file_cannot_hold_experts(tmp_path):
    from ftc.models.checkpoints.llama2c import save_llama2c

    with pytest.raises(FtcError, match="cannot hold experts"):
        save_llama2c(ours_of("mixtral"), tmp_path / "m.bin")
    with pytest.raises(FtcError, match="cannot hold norms of queries and keys"):
        save_llama2c(ours_of("qwen3"), tmp_path / "m.bin")


def test_released_configs_are_read():
    # What config.json of Mixtral 8x7B, Qwen3-30B-A3B and OLMoE 1B-7B says of experts and attention, and of DeepSeek-V3 without its quantisation.
    common = {"hidden_act": "silu", "attention_dropout": 0.0, "vocab_size": 32000}
    mixtral = common | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336}
    mixtral |= {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert config_from_dict(mixtral | {"rope_theta": 1e6, "sliding_window": None}).moe == MoeConfig(8, 2, 14336)
    qwen = common | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
    qwen |= {"num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "num_experts_per_tok": 8}
    qwen |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "max_window_layers": 48}
    found = config_from_dict(qwen)
    assert found.moe == MoeConfig(128, 8, 768) and found.qk_norm == "head" and found.head_dim == 128
    olmoe = common | {"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
    olmoe |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 16, "norm_topk_prob": False, "clip_qkv": None}
    olmoe |= {"vocab_size": 50304, "eos_token_id": 50279, "rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    assert config_from_dict(olmoe) == preset("olmoe-1b-7b")
    deepseek = common | {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048}
    deepseek |= {"num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128, "first_k_dense_replace": 3, "moe_layer_freq": 1}
    deepseek |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True}
    deepseek |= {"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    routed = {"gate": "sigmoid", "selection_bias": True, "routed_scaling_factor": 2.5, "groups": 8, "topk_groups": 4}
    found = config_from_dict(deepseek)
    assert found.moe == MoeConfig(256, 8, 2048, shared_intermediate_size=2048, **routed) and found.first_dense_layers == 3

import dataclasses
import json
import struct
import subprocess
import sys

import ftc.models
import pytest
import torch
from ftc.models.checkpoints import huggingface, safetensors_io
from ftc.models.checkpoints.huggingface import huggingface_lens, load_huggingface
from ftc.models.checkpoints.huggingface_config import FAMILIES, NotRepresentable, config_from_dict, config_to_dict
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.models.rope import RopeConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError, FtcFailure

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def decoder(seed=0, dtype=torch.float32, **changes) -> Decoder:
    torch.manual_seed(seed)
    changes = {"vocab_size": 61, "initializer_range": 0.2, **changes}
    model = Decoder(preset("tiny", **changes)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def ids_of(tokens=24):
    return torch.randint(0, 61, (2, tokens), generator=torch.Generator().manual_seed(0))


def assert_close(ours, theirs, bound=1e-5):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@st.composite
def huggingface_models(draw):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    kind, family = draw(st.sampled_from(sorted(ROPES))), draw(st.sampled_from(["Llama", "Mistral", "Qwen2"]))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0])), **ROPES[kind]}
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]))
    config = {
        "vocab_size": 61,
        "hidden_size": heads * draw(st.sampled_from([8, 16])),
        "head_dim": 8,
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 20,  # shorter than the texts: dynamic and longrope must notice
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.2,
        "rope_parameters": rope,
    }
    if family == "Llama":
        config |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family == "Mistral":
        config["sliding_window"] = None
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model.eval()


@settings(max_examples=15)
@given(huggingface_models(), st.sampled_from([10**9, 4000]), st.sampled_from([torch.float32, torch.float64]))
def test_folders_of_transformers_give_the_same_logits_and_go_back(tmp_path_factory, theirs, shard_bytes, dtype):
    import transformers

    folder = tmp_path_factory.mktemp("model")
    theirs = theirs.to(dtype)
    theirs.save_pretrained(folder / "theirs", max_shard_size=shard_bytes)
    ours = ftc.models.load(folder / "theirs")
    assert isinstance(ours, Decoder) and not ours.training
    ids = ids_of()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert_close(ours(ids), expected)

        ftc.models.save(ours, folder / "ours", max_shard_bytes=shard_bytes)
        back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", dtype="auto").eval()
        assert_close(back(ids).logits, expected)
    stored = {name: p.detach() for name, p in theirs.state_dict().items()}
    assert all(torch.equal(value, stored[name]) for name, value in back.state_dict().items())


configs = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 2),
        "tie_word_embeddings": st.booleans(),
        "rope_interleaved": st.booleans(),
        "mlp_bias": st.booleans(),
        "bos_token_id": st.none() | st.integers(0, 60),
        "eos_token_ids": st.lists(st.integers(0, 60), max_size=2).map(tuple),
        "initializer_range": st.just(0.2),
    }
)


@settings(max_examples=15)
@given(
    configs, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from([1, 10**9])
)
def test_our_own_folders_there_and_back(tmp_path_factory, changes, bias, dtype, shard_bytes):
    model = decoder(dtype=dtype, attention_bias=bias, attention_output_bias=bias, **changes)
    folder = tmp_path_factory.mktemp("model") / "saved"
    ftc.models.save(model, folder, max_shard_bytes=shard_bytes)
    half_split = ftc.models.load(folder)
    assert half_split.config == dataclasses.replace(model.config, rope_interleaved=False)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    with torch.no_grad():
        assert_close(half_split(ids_of()), model(ids_of()), bound)
    same = load_huggingface(folder, rope_interleaved=model.config.rope_interleaved)
    assert same.config == model.config
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    assert (same.lm_head.weight is same.embed_tokens.weight) == model.config.tie_word_embeddings


def test_the_lens_maps_a_whole_state_dict_there_and_back():
    model = decoder(rope_interleaved=True)
    lens, state = huggingface_lens(model.config), model.state_dict()
    there = lens.forward(state)
    assert "model.layers.0.self_attn.q_proj.weight" in there
    assert not torch.equal(there["model.layers.0.self_attn.k_proj.weight"], state["layers.0.self_attn.k_proj.weight"])
    back = lens.backward(there)
    assert all(torch.equal(back[name], value) for name, value in state.items()) and back.keys() == state.keys()


def test_safetensors_files_agree_with_the_reference_library(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}.{shape}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for dtype in safetensors_io.DTYPES.values()
        for shape in [(), (0, 3), (5,), (3, 7)]
    }

    def entries(tensors):
        return [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]

    safetensors_io.write_file(tmp_path / "ours", entries(tensors), tensors.__getitem__)
    safetensors.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    theirs = safetensors.load_file(tmp_path / "ours")
    ours = {name: stored.read() for name, stored in safetensors_io.read_index(tmp_path / "theirs").items()}
    for read in (ours, theirs):
        assert read.keys() == tensors.keys()
        for name, value in tensors.items():
            assert read[name].dtype == value.dtype and read[name].shape == value.shape
            assert torch.equal(read[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


@given(configs)
def test_configs_there_and_back(changes):
    config = preset("tiny", **{**changes, "rope_interleaved": False})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_a_family_equal_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    for key, value in FAMILIES[model_type].defaults.items():
        assert getattr(theirs, key) == value, key


@pytest.mark.parametrize("kind", ROPES)
def test_rope_settings_survive_config_json(kind):
    rope = RopeConfig(rope_type=kind, rope_theta=777.0, **ROPES[kind])
    config = preset("tiny", rope=rope, head_dim=8)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))).rope == rope


def test_other_architectures_are_built_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=61, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ftc.models.save(theirs, tmp_path / "a")
    loaded = ftc.models.load(tmp_path / "a")
    assert type(loaded) is type(theirs) and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(ids_of()).logits, theirs(ids_of()).logits)
    ftc.models.save(loaded, tmp_path / "a")  # ours, so it may be replaced


def test_other_architectures_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FtcError, match=r"gpt2.*pip install ftc\[hf\]"):
        ftc.models.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "mistral"},  # its default is a window
        {"model_type": "qwen2", "use_sliding_window": True},
        {"quantization_config": {"quant_method": "awq"}},
        {"partial_rotary_factor": 0.5},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_near_misses_are_left_to_transformers(changes):
    given_config = {**config_to_dict(preset("tiny")), **changes}
    if "model_type" in changes:
        del given_config["architectures"]
    with pytest.raises(NotRepresentable):
        config_from_dict(given_config)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    ftc.models.save(decoder(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def overwrite(folder, start, data):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[start : start + len(data)] = data
    file.write_bytes(bytes(content))


def shard_holds_another(folder):
    ftc.models.save(ftc.models.load(folder), folder, max_shard_bytes=40_000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.write_bytes(second.read_bytes())


def shard_is_missing(folder):
    ftc.models.save(ftc.models.load(folder), folder, max_shard_bytes=40_000)
    min(folder.glob("model-*.safetensors")).unlink()


def shard_holds_one_more(folder):
    ftc.models.save(ftc.models.load(folder), folder, max_shard_bytes=40_000)
    from safetensors.torch import load_file, save_file

    shard = min(folder.glob("model-*.safetensors"))
    save_file(load_file(shard) | {"surprise": torch.ones(2)}, shard)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f, -100), "truncated"),
        (lambda f: cut(f, 30), "no valid header"),
        (lambda f: cut(f, 0), "0 bytes"),
        (lambda f: overwrite(f, 0, struct.pack("<Q", 2**60)), "no valid header"),
        (lambda f: overwrite(f, 8, b"{{{{"), "corrupt safetensors header"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "reads no pickled weights"),
        (lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight")), "lacks 1 of the tensors.*model.norm.weight"),
        (lambda f: edit_weights(f, lambda t: t.update(surprise=torch.ones(2))), "surprise"),
        (lambda f: edit_config(f, num_hidden_layers=3), "lacks 9 of the tensors.*layers.2"),
        (lambda f: edit_config(f, num_hidden_layers=1), "does not account for.*layers.1.*num_hidden_layers"),
        (lambda f: edit_config(f, intermediate_size=99), r"\[176, 64\].*\[99, 64\]"),
        (lambda f: edit_config(f, tie_word_embeddings=True), "lm_head.weight differs"),
        (lambda f: edit_config(f, vocab_size=...), "lacks vocab_size"),
        (lambda f: edit_config(f, vocab_size="many"), "vocab_size is 'many'"),
        (lambda f: edit_config(f, num_key_value_heads=3), "num_key_value_heads 3"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}), "needs factor"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "list"),
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (shard_holds_another, "no shard holds"),
        (shard_is_missing, "model-00001-of-.*does not exist; download or copy"),
        (shard_holds_one_more, "does not account for: surprise"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    ],
)
def test_damage_is_named(saved, damage, words):
    damage(saved)
    with pytest.raises(FtcError, match=words) as caught:
        ftc.models.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "lacks tensors.*ln_f.bias; download"),
        (lambda t: t.update(surprise=torch.ones(2)), "does not account for: surprise"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(3)}),
            r"other shapes.*ln_f.bias \[3\] instead of \[16\]",
        ),
    ],
)
def test_a_transformers_folder_that_does_not_fit_its_config_is_refused(tmp_path, capfd, damage, words):
    transformers = pytest.importorskip("transformers")
    ftc.models.save(transformers.GPT2LMHeadModel(_tiny_gpt2()), tmp_path / "a")
    edit_weights(tmp_path / "a", damage)
    capfd.readouterr()
    with pytest.raises(FtcError, match=words):
        ftc.models.load(tmp_path / "a")
    assert capfd.readouterr() == ("", ""), "the library's own report is not printed beside the error"


def test_an_unknown_architecture_is_refused(saved):
    pytest.importorskip("transformers")
    edit_config(saved, model_type="llamma", architectures=["LlammaForCausalLM"])
    with pytest.raises(FtcError, match="llamma"):
        ftc.models.load(saved)


@pytest.mark.parametrize("path", ["nowhere", "model/model.safetensors", "model/config.json"])
def test_a_wrong_path_is_named(saved, path):
    with pytest.raises(FtcError, match=path):
        ftc.models.load(saved.parent / path)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for model in (decoder(), pytest.importorskip("transformers").GPT2LMHeadModel(_tiny_gpt2())):
        with pytest.raises(FtcError, match="did not write"):
            ftc.models.save(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def _tiny_gpt2():
    import transformers

    return transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=61, n_positions=32)


def test_a_failed_write_leaves_the_old_folder(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def full(*_):
        raise FtcFailure("could not write: No space left on device")

    monkeypatch.setattr(huggingface, "write_file", full)
    with pytest.raises(FtcFailure, match="No space left"):
        ftc.models.save(decoder(seed=1), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's full disk")
def test_a_full_disk_is_a_failure_that_says_so():
    with pytest.raises(FtcFailure, match="No space left on device"):
        safetensors_io.write_file("/dev/full", [("a", torch.float32, (5000,))], lambda name: torch.zeros(5000))


def test_models_that_cannot_be_saved_say_so(tmp_path):
    with pytest.raises(FtcError, match="Linear"):
        ftc.models.save(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(FtcError, match="attention_output_bias"):
        ftc.models.save(decoder(attention_output_bias=True), tmp_path / "x")
    mixed = decoder()
    mixed.norm.bfloat16()
    with pytest.raises(FtcError, match="mix torch.bfloat16, torch.float32"):
        ftc.models.save(mixed, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_travels_along(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    ftc.models.save(decoder(), tmp_path / "other", tokenizer=tmp_path / "tokenizer.json")
    ftc.models.save(decoder(), saved, tokenizer=tmp_path / "other")
    assert (saved / "tokenizer.json").read_text() == "{}"
    with pytest.raises(FtcError, match="no tokenizer"):
        ftc.models.save(decoder(), saved, tokenizer=tmp_path / "nowhere")


MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
import ftc.models
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = ftc.models.load(sys.argv[1])
parameters = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / parameters)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_loading_peaks_near_the_size_of_the_parameters(tmp_path):
    # 130 MB in 24 layers, so that one tensor more is small.
    shape = dict(hidden_size=256, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=4, head_dim=64)
    ftc.models.save(decoder(**shape), tmp_path / "model")
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "model"], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 1.1

"""ftc memory: predictions against what is allocated, forms against the passes that make them, and what it says to wrong input."""

import json

import pytest
import torch
from ftc.models.checkpoints import meta_decoder
from ftc.models.decoder import Decoder
from ftc.models.mla import LatentConfig
from ftc.models.presets import preset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc import cli
from ftc.cache import PagedCache
from ftc.errors import FtcError
from ftc.memory import Plan, measure, predict
from ftc.memory.picture import curves, picture
from ftc.memory.predict import weights_of, with_cache
from ftc.train.ledger import num_bytes

LATENT = LatentConfig(kv_lora_rank=130, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, q_lora_rank=24)
MODELS = {
    "GQA": {"num_hidden_layers": 2},
    "MHA": {"num_hidden_layers": 1, "num_key_value_heads": 4},
    "MQA, tied": {"num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "MLA": {"latent": LATENT},
}


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(preset("tiny", **MODELS[name])).to(dtype).eval()


def window(tokens: int = 24) -> nn.Module:
    """Full attention and a window in turns, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(**sizes, head_dim=8, sliding_window=tokens, max_position_embeddings=512)
    config._attn_implementation, config.use_cache = "sdpa", False
    return transformers.MistralForCausalLM(config).eval()


def assert_within(measured: dict) -> None:
    for name, each in measured.items():
        assert each["measured"] > 0 and abs(each["ratio"] - 1) <= 0.01, (name, each)


@settings(max_examples=5, phases=[Phase.generate], report_multiple_bugs=False)
@given(
    name=st.sampled_from(sorted(MODELS)), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), context=st.integers(2, 255),
    batch=st.integers(1, 3), block_size=st.sampled_from([1, 7, 16, 33]), chunk=st.integers(1, 200),
)  # fmt: skip
def test_predictions_are_within_one_percent_of_what_is_allocated(name, dtype, context, batch, block_size, chunk):
    with torch.device("meta"):
        bare = Decoder(preset("tiny", **MODELS[name])).to(dtype).eval()
        bare.tie_weights()
    predicted = predict(bare, Plan(context, batch, block_size, chunk))
    assert_within(measure(model(name, dtype), predicted))


@pytest.mark.parametrize("name, form", [("GQA", "fp8"), ("GQA", "int8"), ("MLA", "fp8")])
def test_rounded_caches_are_predicted_and_measured(name, form):
    program = ftc.rewrite(model(name), [("insert-kv-cache", {"dtype": form, "block_size": 7})], example={"input_ids": torch.ones(2, 12, dtype=torch.long)})
    predicted = predict(program, Plan(context=101, batch=2, chunk=30))
    assert predicted.stored == form and predicted.plan.block_size == 7
    assert_within(measure(program, predicted))


def test_a_window_is_named_and_says_what_it_keeps_and_reads():
    predicted = predict(window(24), Plan(context=200, batch=2, block_size=16, chunk=50))
    assert {layer.window for layer in predicted.layers} == {24}
    row = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8, float32
    assert predicted.windows == {"kept": 2 * row * 2 * 13 * 16, "needed": 2 * row * 2 * 3 * 16}
    assert_within(measure(window(24), predicted))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("form", ["model", "fp8", "int8"])
def test_forms_are_the_bytes_of_the_cache_that_the_pass_makes(name, form):
    predicted = predict(model(name), Plan(context=64), activations=False)
    if form == "int8" and name == "MLA":
        assert form not in predicted.forms
        return
    program, _ = with_cache(model(name), Plan(), form)
    assert PagedCache(program, 3).bytes_per_token == predicted.bytes_per_token(form)


@pytest.mark.parametrize("rank, rope", [(24, 8), (40, 2), (32, 32)])
def test_latents_are_what_gqa_to_mla_makes(rank, rope):
    before = model("GQA")
    predicted = predict(before, Plan(context=64, rank=rank, rope=rope), activations=False)
    ids = torch.randint(0, 512, (8, 40), generator=torch.Generator().manual_seed(0))
    converted = ftc.rewrite(before, [("gqa-to-mla", {"rank": rank, "rope": rope})], example={"input_ids": ids[:2]}, calibration=ids, check=False)
    program, _ = with_cache(converted.eval(), Plan())
    assert PagedCache(program, 2).bytes_per_token == predicted.bytes_per_token("latent") == 2 * (rank + rope) * 4
    assert num_bytes(weights_of(program)) == predicted.weight_bytes_latent
    assert "latent" not in predict(program, Plan(context=64), activations=False).forms


def test_deepseek_sizes_take_no_memory_and_are_as_published():
    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_hidden_layers": 2}
    bare = meta_decoder(preset("llama-1b", **sizes, latent="deepseek-v3", rope=preset("tiny").rope)).to(torch.bfloat16).eval()
    found = predict(bare, Plan(context=131072, batch=32), activations=False)
    assert [found.bytes_per_token(f) // 2 for f in ("mha", "model", "fp8")] == [65536, 1152, 656]
    assert round(found.below_mha("model"), 1) == 56.9 and round(found.below_mha("fp8"), 1) == 99.9
    assert found.cache_bytes("model") == 2 * 1152 * 131072 * 32


def test_measure_finds_a_wrong_prediction():
    predicted = predict(model("GQA"), Plan(context=100, batch=2, chunk=20))
    measured = measure(model("MHA"), predicted)
    assert max(abs(each["ratio"] - 1) for each in measured.values()) > 0.3


def test_the_picture_has_a_line_for_each_form_at_whole_blocks():
    found = predict(model("GQA"), Plan(context=200, batch=3, block_size=7, rank=24, rope=8), activations=False)
    lines = curves([found])
    assert set(lines) == {"MHA", "GQA", "GQA, FP8 or GQA, INT8", "MLA 24 + 8", "MLA 24 + 8, FP8"}
    assert lines["MHA"][-1] == (200, found.bytes_per_token("mha") * 3 * 29 * 7)
    assert all(f">{name}<" in picture([found]) for name in lines)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_prints_json_and_writes_a_page(capsys, tmp_path):
    out = tmp_path / "memory.html"
    code, said, _ = run(capsys, "memory", "preset:tiny", "preset:tiny-mla", "--context", 64, "--dtype", "bf16", "--measure", "--out", out, "--json")
    assert code == 0
    first, second = json.loads(said)["models"]
    assert first["forms"]["model"]["bytes_per_token"] == 2 * 64 * 2 and second["forms"]["model"]["bytes_per_token"] == 2 * 24 * 2
    assert_within(first["measured"])
    page = out.read_text()
    assert "preset:tiny-mla: MLA 16 + 8" in page and "<table>" in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("preset:tiny", "--context", 300), ("300", "256 positions")),
        (("preset:tiny", "--rank", 8), ("--rank and --rope go together",)),
        (("preset:tiny", "--rank", 8, "--rope", 3), ("--rope 3", "even number")),
        (("preset:tiny", "--rank", 64, "--rope", 8), ("--rank 64", "1 to 56")),
        (("preset:tiny", "--dtype", "bf61"), ("bf61", "bf16")),
        (("preset:tiny", "--batch", 0), ("--batch is 0",)),
        (("preset:tiny", "--out", "memory.png"), ("memory.png",)),
        (("preset:tniy",), ("tniy", "tiny")),
    ],
)
def test_wrong_input_is_named_with_what_is_valid(capsys, arguments, words):
    code, _, err = run(capsys, "memory", *arguments)
    assert code == 2 and all(word in err for word in words), err


def test_a_model_that_is_on_the_meta_device_cannot_be_measured():
    bare = meta_decoder(preset("tiny")).eval()
    with pytest.raises(FtcError, match="meta"):
        measure(bare, predict(bare, Plan(context=20)))

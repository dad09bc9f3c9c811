import struct

import ftc.models
import pytest
import torch
from ftc.models.checkpoints.llama2c import llama2c_lens, load_llama2c, save_llama2c
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.models.rope import RopeConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.data.tokenizer import load_tokenizer
from ftc.errors import FtcError

GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)

shapes = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "heads": st.sampled_from([(4, 4), (4, 2), (2, 1)]),
        "head_dim": st.sampled_from([2, 8]),
        "intermediate_size": st.integers(1, 30),
        "max_position_embeddings": st.integers(1, 40),
        "tie_word_embeddings": st.booleans(),
        "seed": st.integers(0, 2**31 - 1),
    }
)


def config_of(shape, **changes):
    heads, kv_heads = shape["heads"]
    return preset(
        "tiny",
        **{key: value for key, value in shape.items() if key not in ("heads", "seed")},
        hidden_size=heads * shape["head_dim"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=61,
        initializer_range=0.2,
        **changes,
    )


def raw_file(shape) -> bytes:
    """A file built from the format's description alone: header, then random float32 weights and random tables."""
    heads, kv_heads = shape["heads"]
    dim, hidden, layers = heads * shape["head_dim"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv_dim, length, vocab = kv_heads * shape["head_dim"], shape["max_position_embeddings"], 61
    count = vocab * dim + dim + length * shape["head_dim"]
    count += layers * (2 * dim + 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * hidden)
    count += 0 if shape["tie_word_embeddings"] else vocab * dim
    values = torch.randn(count, generator=torch.Generator().manual_seed(shape["seed"]))
    signed = vocab if shape["tie_word_embeddings"] else -vocab
    return struct.pack("<7i", dim, hidden, layers, heads, kv_heads, signed, length) + values.numpy().tobytes()


@given(shapes)
def test_a_file_read_and_written_again_has_the_same_bytes(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("llama2c")
    (folder / "a.bin").write_bytes(raw_file(shape))
    model = ftc.models.load(folder / "a.bin")
    assert isinstance(model, Decoder) and model.config.rope_interleaved and not model.training
    save_llama2c(model, folder / "b.bin")
    assert (folder / "b.bin").read_bytes() == raw_file(shape)


@settings(max_examples=15)
@given(shapes, st.booleans())
def test_a_decoder_there_and_back_is_the_same_function(tmp_path_factory, shape, interleaved):
    torch.manual_seed(shape["seed"])
    model = Decoder(config_of(shape, rope_interleaved=interleaved)).eval()
    path = tmp_path_factory.mktemp("llama2c") / "a.bin"
    save_llama2c(model, path)
    again = load_llama2c(path)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    if interleaved:
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@given(shapes, st.booleans())
def test_the_lens_inverts_bitwise(shape, interleaved):
    model = Decoder(config_of(shape, rope_interleaved=interleaved))
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    lens = llama2c_lens(model.config)
    back = lens.backward(lens.forward(state))
    assert lens.moments == "bitwise" and set(lens.sources) == set(state)
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())


def test_weights_land_in_their_places(tmp_path):
    """Number every float of a file and look some of them up by the format's description."""
    dim, hidden, layers, vocab = 4, 3, 2, 5
    sizes = {"embed": vocab * dim, "rms_att": layers * dim, "wq": layers * dim * dim, "wk": layers * 2 * dim}
    sizes |= {"wv": layers * 2 * dim, "wo": layers * dim * dim, "rms_ffn": layers * dim, "w1": layers * hidden * dim}
    sizes |= {"w2": layers * dim * hidden, "w3": layers * hidden * dim, "rms": dim, "tables": 6 * 2}
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name], end = end, end + size
    header = struct.pack("<7i", dim, hidden, layers, 2, 1, vocab, 6)
    (tmp_path / "checkpoint.bin").write_bytes(header + torch.arange(end, dtype=torch.float32).numpy().tobytes())
    model = ftc.models.load(tmp_path)
    second = model.layers[1]
    assert model.embed_tokens.weight[1, 0] == starts["embed"] + dim
    assert second.self_attn.q_proj.weight[0, 1] == starts["wq"] + dim * dim + 1
    assert second.self_attn.k_proj.weight[1, 0] == starts["wk"] + 2 * dim + dim
    assert second.mlp.gate_proj.weight[0, 0] == starts["w1"] + hidden * dim
    assert second.mlp.down_proj.weight[1, 0] == starts["w2"] + dim * hidden + hidden
    assert second.mlp.up_proj.weight[0, 0] == starts["w3"] + hidden * dim
    assert second.post_attention_layernorm.weight[0] == starts["rms_ffn"] + dim
    assert model.norm.weight[-1] == starts["rms"] + dim - 1
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.fixture
def stories(shared_data):
    folder = shared_data / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"needs the trained checkpoint: {folder} is missing")
    return folder


@pytest.mark.parametrize("through_huggingface", [False, True])
def test_stories260k_tells_its_known_story(stories, tmp_path, through_huggingface):
    model, tokenizer = ftc.models.load(stories), load_tokenizer(stories)
    if through_huggingface:
        ftc.models.save(model, tmp_path / "hf", tokenizer=stories)
        model, tokenizer = ftc.models.load(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
        assert not model.config.rope_interleaved
    ids = torch.tensor([[tokenizer.bos_id]])
    with torch.no_grad():
        while len(tokenizer.decode(ids[0].tolist())) < len(GREEDY):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    assert tokenizer.decode(ids[0].tolist()).startswith(GREEDY)


def test_stories260k_written_again_has_the_same_bytes(stories, tmp_path):
    model = ftc.models.load(stories)
    assert not hasattr(model, "llama2c_tables")  # ours have the same bits
    save_llama2c(model, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (stories / "checkpoint.bin").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (struct.pack("<7i", 0, 1, 1, 1, 1, 1, 1), "hidden_size is 0"),
        (struct.pack("<7i", 8, 1, 1, 0, 1, 1, 1), "no llama2.c file"),
        (struct.pack("<7i", 8, 8, 1, 4, 3, 9, 4), "num_key_value_heads 3"),
        (struct.pack("<7i", 8, 8, 1, 4, 4, 9, 4) + bytes(100), "128 bytes.*asks for"),
        (b"#!/usr/bin/env python3\nprint('hello world')\n", "no llama2.c file"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FtcError, match=words) as caught:
        ftc.models.load(tmp_path / "x.bin")
    assert "x.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "biases"),
        ({"rope": RopeConfig(rope_theta=500000.0)}, "500000"),
        ({"rms_norm_eps": 1e-6}, "1e-06"),
        ({"head_dim": 8}, "head_dim 8"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, changes, words):
    with pytest.raises(FtcError, match=words):
        save_llama2c(Decoder(preset("tiny", **changes)), tmp_path / "x.bin")
    with pytest.raises(FtcError, match="float64"):
        save_llama2c(Decoder(preset("tiny")).double(), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())

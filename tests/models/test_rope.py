import pytest
import torch
from ftc.models.rope import RopeConfig, apply_rope, half_split_rows, inverse_frequencies, rope_cos_sin
from hypothesis import given
from hypothesis import strategies as st

factors = st.floats(1.0, 64.0)


@st.composite
def huggingface_configs(draw):
    """(dict for a config.json in either spelling, head_dim) with any of the six types."""
    head_dim = draw(st.sampled_from([4, 8, 16, 64, 128]))
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    original = draw(st.sampled_from([32, 64, 2048, 8192]))
    stretched = draw(st.integers(1, 16)) * original
    rope = {"rope_type": kind}
    if kind in ("linear", "dynamic", "llama3") or (kind in ("yarn", "longrope") and draw(st.booleans())):
        rope["factor"] = draw(factors)
    if kind in ("yarn", "longrope", "llama3") and draw(st.booleans()):
        rope["original_max_position_embeddings"] = original
    if kind == "yarn":
        rope.setdefault("factor", None)  # transformers reads the key, whatever its value
        for name, values in (
            ("beta_fast", st.floats(8, 64)),
            ("beta_slow", st.floats(0.5, 4)),
            ("attention_factor", st.floats(0.5, 2)),
            ("mscale", st.floats(0.5, 2)),
            ("mscale_all_dim", st.floats(0.5, 2)),
            ("truncate", st.booleans()),
        ):
            if draw(st.booleans()):
                rope[name] = draw(values)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rope[name] = draw(st.lists(factors, min_size=head_dim // 2, max_size=head_dim // 2))
        if draw(st.booleans()):
            rope["attention_factor"] = draw(st.floats(0.5, 2))
    if kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = draw(st.floats(0.5, 2)), draw(st.floats(2.5, 8))
    theta = draw(st.sampled_from([100.0, 10000.0, 500000.0]))
    config = {"max_position_embeddings": stretched}
    if kind in ("yarn", "longrope", "llama3") and draw(st.booleans()):
        config["original_max_position_embeddings"] = draw(st.sampled_from([16, original]))
    if draw(st.booleans()):
        config["rope_parameters"] = {**rope, "rope_theta": theta}
    else:
        old = {("type" if key == "rope_type" and draw(st.booleans()) else key): value for key, value in rope.items()}
        config["rope_scaling"], config["rope_theta"] = old, theta
    return config, head_dim


def transformers_frequencies(config, head_dim, seq_len):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **config)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    return ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=seq_len)


@given(huggingface_configs(), st.one_of(st.none(), st.floats(0.01, 8.0)))
def test_frequencies_and_attention_factor_equal_transformers(case, length):
    config, head_dim = case
    trained = config["max_position_embeddings"]
    seq_len = None if length is None else max(1, int(length * trained))
    inv_freq, attention_factor = transformers_frequencies(_copy(config), head_dim, seq_len)
    ours, our_factor = inverse_frequencies(RopeConfig.from_huggingface(config), head_dim, trained, seq_len)
    torch.testing.assert_close(ours, inv_freq.float(), rtol=1e-7, atol=1e-7)
    assert our_factor == pytest.approx(attention_factor, rel=1e-7)
    if seq_len is not None:  # a length that is a tensor, as inside a forward pass
        traced, _ = inverse_frequencies(RopeConfig.from_huggingface(config), head_dim, trained, torch.tensor(seq_len))
        torch.testing.assert_close(traced, inv_freq.float(), rtol=1e-7, atol=1e-7)


def test_yarn_defaults_equal_transformers():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
    config = {"max_position_embeddings": 8192, "rope_parameters": {**rope, "truncate": False}}
    inv_freq, _ = transformers_frequencies(_copy(config), 64, None)
    ours, _ = inverse_frequencies(RopeConfig.from_huggingface(config), 64, 8192)
    torch.testing.assert_close(ours, inv_freq, rtol=1e-7, atol=1e-7)


def _copy(config):
    return {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}


@given(huggingface_configs())
def test_rope_config_survives_its_own_spelling(case):
    config, _ = case
    rope = RopeConfig.from_huggingface(config)
    assert RopeConfig.from_huggingface({"rope_parameters": rope.as_huggingface()}) == rope


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_longer_texts_change_the_length_dependent_types(kind):
    rope = RopeConfig(
        rope_type=kind,
        factor=2.0,
        original_max_position_embeddings=16,
        short_factor=(1.0,) * 4,
        long_factor=(2.0,) * 4,
    )
    short, same, long = (inverse_frequencies(rope, 8, 16, length)[0] for length in (None, 16, 17))
    assert torch.equal(short, same) and not torch.equal(short, long)


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 4, 16]), st.integers(0, 2**31 - 1))
def test_half_split_of_permuted_rows_equals_interleaved(batch, heads, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, 5, head_dim, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 40, (batch, 5), generator=generator)
    rows = half_split_rows(1, head_dim)
    scores = {}
    for interleaved in (True, False):
        cos, sin = rope_cos_sin(RopeConfig(), head_dim, 64, positions, interleaved, torch.float64)
        a, b = (q, k) if interleaved else (q[..., rows], k[..., rows])
        scores[interleaved] = apply_rope(a, cos, sin, interleaved) @ apply_rope(b, cos, sin, interleaved).mT
    torch.testing.assert_close(scores[True], scores[False], rtol=1e-12, atol=1e-12)
    assert sorted(half_split_rows(heads, head_dim).tolist()) == list(range(heads * head_dim))


@given(st.booleans(), st.integers(0, 30), st.integers(0, 2**31 - 1))
def test_scores_depend_on_relative_position_only(interleaved, shift, seed):
    q, k = torch.randn(2, 1, 1, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = []
    for start in (0, shift):
        positions = torch.arange(start, start + 6)[None]
        cos, sin = rope_cos_sin(RopeConfig(), 8, 64, positions, interleaved, torch.float64)
        scores.append(apply_rope(q, cos, sin, interleaved) @ apply_rope(k, cos, sin, interleaved).mT)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)  # angles are float32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"type": "yarm", "factor": 2.0}}, "yarm"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 9}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_tehta": 5.0}}, "rope_tehta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": -1.0}, "-1.0"),
    ],
)
def test_bad_parameters_are_named(config, words):
    with pytest.raises(ValueError, match=words):
        RopeConfig.from_huggingface(config)

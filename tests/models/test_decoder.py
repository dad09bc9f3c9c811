import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder, causal_mask
from ftc.models.presets import PRESETS, preset
from hypothesis import given
from hypothesis import strategies as st

from ftc.errors import FtcError


def tiny(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = Decoder(preset("tiny", vocab_size=61, initializer_range=0.2, **changes)).to(dtype).eval()
    return model


def random_ids(seed, batch, tokens):
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


sizes = st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(2, 12))


@given(sizes, st.booleans())
def test_later_tokens_do_not_change_earlier_logits(size, interleaved):
    seed, batch, tokens = size
    model, ids = tiny(rope_interleaved=interleaved), random_ids(*size)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, -1], b[:, -1])


@given(sizes, st.integers(1, 5))
def test_left_padding_leaves_the_text_alone(size, padding):
    """RoPE is relative, so padded texts agree without position_ids too (to the rounding of float32 angles)."""
    model, ids = tiny(), random_ids(*size)
    batch, tokens = ids.shape
    padded = torch.cat((torch.zeros(batch, padding, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(batch, padding, dtype=torch.long), torch.ones_like(ids)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(ids)
    exact = model(padded, attention_mask=mask, position_ids=positions)[:, padding:]
    torch.testing.assert_close(exact, alone, rtol=1e-10, atol=1e-10)
    relative = model(padded, attention_mask=mask.bool())
    torch.testing.assert_close(relative[:, padding:], alone, rtol=1e-4, atol=1e-4)
    assert relative.isfinite().all()
    assert not torch.allclose(model(padded)[:, padding:], alone, rtol=1e-4, atol=1e-4)


@given(sizes)
def test_no_row_of_a_padding_mask_is_empty(size):
    mask = random_ids(*size) % 2
    allowed = causal_mask(mask, mask.shape[1])[:, 0]
    assert allowed.any(-1).all() and not allowed.triu(1).any()
    others = ~torch.eye(mask.shape[1], dtype=torch.bool)
    assert torch.equal(allowed & others, (mask.bool()[:, None, :] & others).tril().expand_as(allowed))


@given(sizes)
def test_packed_documents_stay_apart_under_a_block_mask(size):
    model, ids = tiny(), random_ids(*size)
    batch, tokens = ids.shape
    packed = torch.cat((ids, ids.flip(1)), 1)
    document = torch.arange(2 * tokens) // tokens
    mask = (document[:, None] == document) & torch.ones(2 * tokens, 2 * tokens, dtype=torch.bool).tril()
    positions = (torch.arange(2 * tokens) % tokens)[None]
    together = model(packed, attention_mask=mask.expand(batch, 1, -1, -1), position_ids=positions)
    apart = torch.cat((model(ids), model(ids.flip(1))), 1)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


@given(sizes, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_loss_is_the_mean_over_labels_that_count(size, dtype):
    model, ids = tiny(dtype=dtype), random_ids(*size)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    logits = model(ids)
    assert logits.shape == (*ids.shape, 61) and logits.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    picked = F.log_softmax(logits.to(wide), -1)[:, :-1].gather(-1, labels[:, :-1, None])
    loss = model(ids, labels=labels)
    assert loss.dtype == wide
    torch.testing.assert_close(loss, -picked.mean())


def test_tied_heads_share_one_parameter_also_off_the_meta_device():
    config = preset("tiny", tie_word_embeddings=True)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu").init_weights()
    for built in (model, Decoder(config)):
        assert built.lm_head.weight is built.embed_tokens.weight
        assert built(random_ids(0, 1, 5)).isfinite().all()
    assert Decoder(preset("tiny")).lm_head.weight is not Decoder(preset("tiny")).embed_tokens.weight


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = Decoder(preset("tiny"))
    ids = torch.randint(0, 512, (8, 64))
    assert model(ids, labels=ids.roll(1, 1)).item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.05)


def test_the_model_exports_with_dynamic_sizes():
    model = tiny(dtype=torch.float32)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        model, (random_ids(0, 2, 12),), dynamic_shapes=({0: auto, 1: auto},), strict=False
    ).module()
    ids = random_ids(1, 3, 17)
    torch.testing.assert_close(exported(ids), model(ids))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = Decoder(preset(name))
    assert sum(p.numel() for p in model.parameters()) > 100_000


def test_named_presets_have_the_published_parameter_counts():
    counts = {}
    for name in ("stories260k", "llama-1b", "llama-3-8b"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in Decoder(preset(name)).parameters())
    assert counts == {"stories260k": 260_032, "llama-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": 6.5}, "6.5"),
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
    ],
)
def test_bad_fields_are_named(changes, words):
    with pytest.raises(FtcError, match=words):
        preset("tiny", **changes)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(FtcError, match="did you mean 'llama-3-8b'"):
        preset("llama-3-8B")


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[5\]"):
        tiny()(random_ids(0, 1, 5), attention_mask=torch.ones(5))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").vocab_size = 3

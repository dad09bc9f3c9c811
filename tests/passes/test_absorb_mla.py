"""absorb-mla: cached latent attention gives the same in both forms, whatever the sizes; a cache comes first."""

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.mla import LatentConfig
from ftc.models.presets import PRESETS, preset
from ftc.passes.absorb_mla import PAGED, AbsorbMla
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
from ftc.cache import PagedCache
from ftc.errors import FtcError
from ftc.rewrite.pipeline import copy_graph


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decoder(seed: int = 0, **latent) -> Decoder:
    torch.manual_seed(seed)
    config = PRESETS["tiny-mla"] if not latent else preset("tiny", latent=LatentConfig(**latent))
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    return model


def rewritten(model, up_to: int | None = 4, dtype: str = "model"):
    cache = ("insert-kv-cache", {"block_size": 4, "dtype": dtype})
    absorb = ("absorb-mla", {} if up_to is None else {"up_to": up_to})
    return ftc.rewrite(model, [cache, absorb], example={"input_ids": ids(2, 7)})


def continued(program, text: torch.Tensor, rooms: list[int]) -> torch.Tensor:
    cache = PagedCache(program, 16)
    sequence, parts, at = cache.add(), [], 0
    for room in rooms:
        parts.append(cache.forward({sequence: text[at : at + room]})[sequence])
        at += room
    return torch.cat(parts)


@settings(max_examples=4, deadline=None)
@given(
    latent=st.sampled_from([4, 16]), nope=st.sampled_from([4, 8]), value=st.sampled_from([4, 12]),
    dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 1_000),
)  # fmt: skip
def test_absorbed_decode_equals_expanded(latent, nope, value, dtype, seed):
    model = decoder(seed, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=8, v_head_dim=value).to(dtype)
    text = ids(1, 20, seed)[0]
    expected = model(text[None])[0].detach()
    found = continued(rewritten(model), text, [9, 1, 4, 1, 1, 4])
    assert float((found - expected).abs().max() / expected.abs().max()) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_the_crossover_is_measured_and_shown():
    entry = rewritten(decoder(), up_to=None)._applied[-1]
    detail = entry["sites"]["layers.0"]["matches"][0]["detail"]
    assert detail["up_to"] >= 1 and "ms at 1 absorbed / expanded" in detail
    assert entry["contract"] == "exact" and entry["max_output_error"] < 1e-12


def test_a_saved_program_is_verified(tmp_path):
    rewritten(decoder(), dtype="fp8").save(tmp_path / "saved")
    verified = ftc.verify(tmp_path / "saved")
    assert verified.ok, str(verified)


def test_a_changed_operand_fails_the_proof():
    program = ftc.rewrite(decoder(), [("insert-kv-cache", {"block_size": 4})], example={"input_ids": ids(2, 7)})
    before = program.codes[0].all_variants()[0].captured.graph
    after, pass_ = copy_graph(before), AbsorbMla(up_to=4)
    assert len(pass_.apply(after).matches) == 1
    assert all(t["output_error"] <= t["bound"] for t in pass_.prove(before, after))
    node = next(n for n in after.nodes if n.target is PAGED)
    node.kwargs = dict(node.kwargs) | {"scale": 1.001 * node.kwargs["scale"]}
    assert all(t["output_error"] > t["bound"] for t in pass_.prove(before, after))


def test_applied_twice_and_without_a_cache():
    again = ftc.rewrite(rewritten(decoder()), ["absorb-mla"])
    assert again._applied[-1]["already"] == 2 and not again._applied[-1]["matches"]
    with pytest.raises(FtcError, match="put insert-kv-cache before"):
        ftc.rewrite(decoder(), ["raise-mla", "absorb-mla"], example={"input_ids": ids(2, 7)})
    with pytest.raises(ValueError, match="up_to = 0"):
        AbsorbMla(up_to=0)


def test_an_fp8_latent_is_smaller_and_int8_is_declined():
    small, plain = (PagedCache(rewritten(decoder(), dtype=d), 4).bytes_per_token for d in ("fp8", "model"))
    assert (small, plain) == (2 * (16 + 4 + 2 * 8), 2 * 4 * (16 + 8))
    with pytest.raises(FtcError, match="int8 is for keys and values"):
        rewritten(decoder(), dtype="int8")

"""What a step keeps between forward and backward, counted by storage, against the same model in bfloat16."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ftc
from ftc.float8.kept_bytes import kept_bytes

IDS = torch.randint(128, (2, 128), generator=torch.Generator().manual_seed(0))


def block_bytes(passes: list, heads: int = 4, layers: int = 2) -> int:
    """Bytes that the blocks keep: what the whole model keeps less what a model of no block does is not needed, as the shell is small."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 64}
    model = Decoder(preset("tiny", vocab_size=128, num_hidden_layers=layers, **sizes)).bfloat16()
    program = ftc.rewrite(model, passes, example={"input_ids": IDS[:, :9]}, check=False)
    return kept_bytes(lambda: program(input_ids=IDS), program.parameters())[0]


@pytest.mark.parametrize("before", [["raise"], ["fuse-qkv", "fuse-gate-up"]])
def test_a_step_keeps_less_than_0_6_of_bfloat16(before):
    plain = block_bytes(before)
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp", "fine"):
        assert block_bytes([*before, ("float8", {"recipe": recipe, "save": "exact"})]) <= 0.6 * plain
        assert block_bytes([*before, ("float8", {"recipe": recipe, "save": "float8"})]) <= 0.5 * plain
    assert block_bytes([*before, ("float8", {"recipe": "rowwise"})]) >= 0.95 * plain  # the inputs as they are, as torchao keeps them


@settings(deadline=None, max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(rows=st.integers(1, 9), width=st.integers(1, 9), times=st.integers(1, 3))
def test_a_storage_counts_once_and_parameters_not_at_all(rows, width, times):
    weight = torch.randn(width, width, requires_grad=True)
    x = torch.randn(rows, width, requires_grad=True)

    def run():
        h = x @ weight  # keeps x and weight
        return sum((h * h).sum() for _ in range(times)) + h[:, :1].exp().sum()  # keeps h once, whatever reads it, and the exponential

    assert kept_bytes(run, [weight])[0] == 4 * (2 * rows * width + rows)
    assert kept_bytes(run)[0] == 4 * (2 * rows * width + rows + width * width)

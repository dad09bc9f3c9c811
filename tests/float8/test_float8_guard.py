"""A run whose float8 products meet numbers that are not finite stops before the optimizer step, and the operand is named."""

from types import SimpleNamespace

import pytest
import torch

import ftc
from ftc.errors import FtcFailure
from ftc.train.non_finite import NonFiniteGuard

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("broken", ["weight", "x"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_operand_without_a_scale_is_named_and_no_weight_moves(recipe, broken):
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(0)
    body = ftc.rewrite(Decoder(preset("tiny", vocab_size=64)), [("float8", {"recipe": recipe})], example={"input_ids": IDS}, check=False)
    with torch.no_grad():
        (body.layers[1].mlp.up_proj.weight if broken == "weight" else body.layers[1].input_layernorm.weight)[..., 0] = float("inf")
    optimizer = torch.optim.SGD(body.parameters(), lr=1.0)
    run = SimpleNamespace(model_parts=[SimpleNamespace(body=body, parameters=body.parameters)], step=7, pipeline=None, optimizers=SimpleNamespace(optimizers=[optimizer]))

    def run_again(batch):
        optimizer.zero_grad()
        body(**batch).square().sum().backward()

    run.run_again = run_again
    guard = NonFiniteGuard(run)
    guard.remember({"input_ids": IDS})
    before = {name: t.clone() for name, t in body.state_dict().items()}
    run_again({"input_ids": IDS})
    shape = r"\[176, 64\]" if broken == "weight" else r"\[24, 64\]"
    with pytest.raises(FtcFailure, match=rf"in the output of region layers\.1 \(the first operand that float8 has no scale for: {broken} {shape} in float32 holds"):
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in body.state_dict().items())

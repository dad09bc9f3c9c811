"""A gradient that is not finite stops before the optimizer step, and the region where it began is named."""

from types import SimpleNamespace

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset

import ftc
from ftc.errors import FtcFailure
from ftc.train.non_finite import NonFiniteGuard

IDS = torch.arange(24).view(2, 12)


class OneStep:
    """What the guard needs of a trainer: a captured model, an optimizer, and a microbatch that can run again."""

    def __init__(self):
        torch.manual_seed(0)
        self.body = ftc.capture(Decoder(preset("tiny", vocab_size=64)), {"input_ids": IDS})
        self.model_parts, self.step, self.pipeline = [torch.nn.Module()], 7, None
        self.model_parts[0].body = self.body
        self.optimizer = torch.optim.SGD(self.body.parameters(), lr=1.0)
        self.optimizers = SimpleNamespace(optimizers=[self.optimizer], zero_grad=self.optimizer.zero_grad)
        self.guard = NonFiniteGuard(self)

    def run_again(self, batch):
        self.optimizer.zero_grad()
        self.body(**batch).square().sum().backward()

    def train(self):
        self.guard.remember({"input_ids": IDS})
        self.run_again({"input_ids": IDS})
        self.optimizer.step()


def test_a_finite_step_is_taken():
    run = OneStep()
    before = run.body.lm_head.weight.detach().clone()
    run.train()
    assert not torch.equal(run.body.lm_head.weight, before)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_region_whose_output_is_not_finite_is_named_and_no_weight_moves(layer):
    run = OneStep()
    with torch.no_grad():
        run.body.layers[layer].mlp.down_proj.weight[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in run.body.state_dict().items()}
    with pytest.raises(FtcFailure, match=rf"at step 7 .* in the output of region layers\.{layer}\. .*those of step 6"):
        run.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.body.state_dict().items())


def test_what_begins_outside_the_regions_is_said_to():
    run = OneStep()
    run.body.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FtcFailure, match="in the embedding, the head or the loss"):
        run.train()

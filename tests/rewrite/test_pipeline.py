"""Rewriting programs: proof before commitment, expectations that fail loud, variants captured later, forks and places."""

import dataclasses

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.outcome import Match, Outcome
from ftc.rewrite.passes import Pass
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request

aten = torch.ops.aten


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(preset("tiny")).eval()


def tokens(model, batch=2, length=12):
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@dataclasses.dataclass(frozen=True)
class Scaling(Pass):
    """Multiplies every residual sum by a factor; exact only for a factor of 1."""

    factor: float = 1.0
    name = "scaling"
    summary = "for tests"

    def apply(self, graph):
        outcome = Outcome()
        for node in [n for n in graph.nodes if n.target is aten.add.Tensor]:
            with graph.inserting_after(node):
                scaled = graph.call_function(aten.mul.Tensor, (node, self.factor))
            scaled.meta = dict(node.meta)
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, s=scaled: user is not s)
            outcome.matches.append(Match("sum", (scaled.name,), {}, "here"))
        return outcome


def test_fused_program_equals_the_model_in_outputs_gradients_and_weights_there_and_back(model):
    ids = tokens(model)
    program = ftc.rewrite(model, ["fuse-qkv", "fuse-gate-up"], example={"input_ids": ids}).double()
    reference = Decoder(model.config).double().eval()
    reference.load_state_dict(model.state_dict())
    program(ids).square().sum().backward()
    reference(ids).square().sum().backward()
    torch.testing.assert_close(program(ids), reference(ids), rtol=1e-12, atol=1e-12)
    back = program.original_state_dict()
    assert all(torch.equal(back[name], value.double()) for name, value in model.state_dict().items())
    fused = [name for name, _ in program.named_parameters() if "qkv" in name or "gate_up" in name]
    assert len(fused) == 2 * model.config.num_hidden_layers
    layer = reference.layers[0]
    attention = program.get_submodule("layers.0")
    stacked = next(p for n, p in attention.named_parameters() if "qkv" in n).grad
    parts = [p.grad for n, p in layer.named_parameters() if any(f"{k}_proj" in n or n.endswith(f"w{k}.weight") for k in "qkv")]
    torch.testing.assert_close(stacked, torch.cat(parts), rtol=1e-10, atol=1e-10)


def test_a_pass_that_breaks_its_contract_is_refused_and_the_program_left_as_it_was(model):
    program = ftc.capture(model, {"input_ids": tokens(model)})
    before = [variant.source for code in program.codes for variant in code.all_variants()]
    with pytest.raises(FtcFailure, match="does not keep its contract"):
        apply_request(program, Request(Scaling(1.0 + 1e-9), "some"))
    assert before == [variant.source for code in program.codes for variant in code.all_variants()]
    assert not program._applied
    apply_request(program, Request(Scaling(1.0), "some"))
    assert program.report.as_dict()["passes"]["scaling"]["max_output_error"] == 0


def test_a_pass_without_a_site_is_an_error_with_the_nearest_miss(model):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(x)))

    net = nn.Sequential(Plain(), Plain())
    example = (torch.randn(2, 5, 8),)
    with pytest.raises(FtcError, match="found no site; nearest miss: .*plain MLP"):
        ftc.rewrite(net, ["fuse-gate-up"], example=example)
    program = ftc.rewrite(net, [("fuse-gate-up", {"expect": "any"})], example=example)
    assert program.report.as_dict()["passes"]["fuse-gate-up"]["matches"] == 0
    with pytest.raises(FtcError, match="expected 3 sites and found 0"):
        ftc.rewrite(net, [("fuse-gate-up", {"expect": 3})], example=example)


def test_a_variant_captured_after_a_rewrite_goes_through_the_same_passes(model):
    program = ftc.rewrite(model, ["fuse-qkv"], example={"input_ids": tokens(model)})
    certificates = len(program._applied[-1]["certificates"])
    single = tokens(model, 1, 9)
    torch.testing.assert_close(program(single), model(single), rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    ids = tokens(model)
    out, expected = program(ids, attention_mask=mask), model(ids, attention_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert len(program._applied[-1]["certificates"]) > certificates


def test_rewriting_a_program_leaves_it_and_shares_what_is_untouched(model):
    ids = tokens(model)
    program = ftc.capture(model, {"input_ids": ids})
    fused = ftc.rewrite(program, ["fuse-qkv"])
    assert list(program.state_dict()) == list(model.state_dict()) and not program._applied
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert len(shared) == len(list(model.parameters())) - 3 * model.config.num_hidden_layers
    again = ftc.rewrite(fused, ["fuse-gate-up"])
    assert [e["pass"] for e in again._applied][: len(fused._applied)] == [e["pass"] for e in fused._applied]
    assert torch.allclose(again(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_in_place_the_model_itself_runs_the_program():
    torch.manual_seed(1)
    own = Decoder(preset("tiny")).eval()
    ids = tokens(own)
    expected = own(ids)
    program = ftc.rewrite(own, ["fuse-qkv"], example={"input_ids": ids}, inplace=True)
    assert list(own.state_dict()) == list(program.state_dict())
    assert any("qkv" in name for name in own.state_dict())
    torch.testing.assert_close(own(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_second_application_finds_the_sites_already_done(model):
    program = ftc.rewrite(model, ["fuse-qkv", "fuse-qkv"], example={"input_ids": tokens(model)})
    entry = program._applied[-1]
    assert entry["matches"] == 0 and entry["already"] == model.config.num_hidden_layers


def test_explain_names_matches_and_misses(model):
    text = str(ftc.explain(model, "fuse-gate-up", {"input_ids": tokens(model)}))
    assert "match gate-up" in text
    with pytest.raises(FtcError, match="pipeline"):
        ftc.explain(model, "raise", {"input_ids": tokens(model)})


def test_what_the_user_can_mend_is_an_ftc_error(model):
    with pytest.raises(FtcError, match="needs an example"):
        ftc.rewrite(model, ["fuse-qkv"])
    with pytest.raises(FtcError, match="do not fit"):
        ftc.rewrite(model, ["fuse-qkv"], example={"inputs": tokens(model)})
    with pytest.raises(FtcError, match="example must be"):
        ftc.rewrite(model, ["fuse-qkv"], example=3)

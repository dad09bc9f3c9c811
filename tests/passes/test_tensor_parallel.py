"""tensor-parallel: every rank's graph in lock step is the model; sabotage is refused; what cannot be divided is declined with the sizes."""

import dataclasses

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.passes.tensor_parallel import TensorParallel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.parallel import divided_parameters
from ftc.rewrite.lockstep import axis_of
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request

aten, dialect = torch.ops.aten, torch.ops.ftc
VOCABULARY = 48


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=24, num_hidden_layers=1, head_dim=4, num_attention_heads=4, num_key_value_heads=2)
    model = Decoder(preset("tiny", **(sizes | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(0, VOCABULARY, (2, 6), generator=generator) for _ in range(2))
    labels[0, 2] = -100
    return {"input_ids": ids, "labels": labels}


def assert_equals(program, model) -> None:
    """Loss and gradients of an unbound program, run on all its ranks, against the model; float64."""
    loss, expected = program(**batch()), model(**batch())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    model.zero_grad()
    loss.backward()
    expected.backward()
    found = {n: p.grad for n, p in program.named_parameters()}
    for prefix, code in [(f"{r.ftc_name}.", r.code) for r in program.regions] + [("", program.code)]:
        for lens in reversed(code.lenses):
            if set(lens.with_prefix(prefix).targets) <= set(found):
                found = lens.with_prefix(prefix).backward(found)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=10)
@given(
    degree=st.sampled_from([2, 4]),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2)]),
    biases=st.booleans(),
    tied=st.booleans(),
    before=st.sampled_from([[], ["fuse-qkv"], ["fuse-gate-up", "chunk-cross-entropy"], ["fuse-qkv", "fuse-gate-up"]]),
    vocabulary=st.booleans(),
)
def test_all_ranks_together_are_the_model(degree, heads, biases, tied, before, vocabulary):
    model = decoder(
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        attention_bias=biases,
        attention_output_bias=biases,
        mlp_bias=biases,
        tie_word_embeddings=tied,
    )
    passes = [*before, ("tensor-parallel", {"degree": degree, "vocabulary": vocabulary})]
    program = ftc.rewrite(model, passes, example=batch(), check=False)
    kinds = [m["kind"] for site in program.report.as_dict()["passes"]["tensor-parallel"]["sites"].values() for m in site["matches"]]
    assert {"attention", "mlp"} <= set(kinds) and ("embedding" in kinds) == vocabulary
    assert_equals(program, model)


@pytest.mark.parametrize("after", [["fuse-qkv"], ["fuse-gate-up"], ["fuse-qkv", "fuse-gate-up"]])
def test_products_may_be_stacked_afterwards(after):
    model = decoder(attention_bias=True)
    program = ftc.rewrite(model, [("tensor-parallel", {"degree": 2}), *after], example=batch())
    assert all(entry["max_gradient_error"] <= 1e-12 for entry in program._applied)
    assert_equals(program, model)
    again = ftc.rewrite(model, [*after, ("tensor-parallel", {"degree": 2})], example=batch())
    mine, theirs = divided_parameters(program), divided_parameters(again)
    assert mine.keys() == theirs.keys() and all(mine[n].blocks == theirs[n].blocks for n in mine)
    back = program.original_state_dict()
    assert all(torch.equal(back[n], p) for n, p in model.state_dict().items())


class Norms(nn.Module):
    """Attention whose queries and keys are normalised over all heads, a plain MLP beside it, and a head under a cap."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.q_norm, self.k_norm, self.out = nn.RMSNorm(16), nn.RMSNorm(16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return x + self.out(out) + self.down(nn.functional.gelu(self.up(h)))


def test_norms_over_all_heads_plain_mlps_and_capped_heads_are_divided():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks, self.head = nn.Embedding(40, 16, padding_idx=1), nn.ModuleList([Norms(), Norms()]), nn.Linear(16, 40)

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return 5 * torch.tanh(self.head(x) / 5)

    torch.manual_seed(0)
    net, ids = Net().double(), torch.randint(0, 40, (2, 7))
    program = ftc.rewrite(net, [("tensor-parallel", {"degree": 4})], example=(ids,))
    entry = program._applied[-1]
    assert entry["matches"] == 6 and entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12
    torch.testing.assert_close(program(ids), net(ids), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ sabotage


@dataclasses.dataclass(frozen=True)
class Sabotaged(TensorParallel):
    """The pass, and then something broken in its result."""

    how: str = ""

    def apply(self, graph):
        outcome = super().apply(graph)
        if self.how == "lens":  # the pieces of stacked products as if they were one block
            outcome.lenses = [dataclasses.replace(lens, blocks=(sum(lens.blocks),)) for lens in outcome.lenses]
            return outcome
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target.__class__.__name__ == "OpOverload" and node.target.name() == self.how:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            elif self.how == "bias" and node.target is aten.add.Tensor and axis_of(node.args[0]) and node.args[1].op == "get_attr":
                product = node.args[0].args[0]
                product.args = (*product.args, node.args[1])
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        return outcome


@pytest.mark.parametrize("how", ["ftc::reduce_from_ranks", "ftc::copy_to_ranks", "ftc::rank_offset", "lens", "bias"])
def test_sabotage_does_not_pass(how):
    program = ftc.rewrite(decoder(attention_output_bias=True, mlp_bias=True), ["raise", "fuse-qkv"], example=batch())
    with pytest.raises(FtcFailure, match="does not keep its contract"):
        apply_request(program, Request(Sabotaged(2, how=how), "some"))
    assert all(entry["pass"] != "tensor-parallel" for entry in program._applied)


def test_ranks_that_are_exchanged_do_not_pass():
    from ftc.rewrite import certificate_ranks

    program = ftc.rewrite(decoder(), ["raise"], example=batch())
    honest = certificate_ranks.on_ranks
    certificate_ranks.on_ranks = lambda lenses, degree, wholes: honest(lenses, degree, wholes)[::-1]
    try:
        with pytest.raises(FtcFailure, match="does not keep its contract"):
            apply_request(program, Request(TensorParallel(2), "some"))
    finally:
        certificate_ranks.on_ranks = honest


# ------------------------------------------------------------------------------------------------------- what is declined


@pytest.mark.parametrize(
    ("changes", "degree", "reason"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "6 heads cannot be divided over 4 ranks; 2, 3, 6 can be"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 heads cannot be divided over 2 ranks"),
        ({"intermediate_size": 25}, 2, "25 features cannot be divided over 2 ranks"),
        ({"vocab_size": 47}, 2, "47 ids of the vocabulary cannot be divided over 2 ranks; 47 can be"),
    ],
)
def test_what_cannot_be_divided_is_declined_with_its_size(changes, degree, reason):
    program = ftc.rewrite(decoder(**changes), [("tensor-parallel", {"degree": degree})], example={"input_ids": batch()["input_ids"] % 47}, check=False)
    assert any(reason in miss["reason"] for miss in program._applied[-1]["misses"])
    strict = [("tensor-parallel", {"degree": degree, "strict": True})]
    with pytest.raises(FtcError, match=f"degree of {degree} does not fit the model: {reason}"):
        ftc.rewrite(decoder(**changes), strict, example={"input_ids": batch()["input_ids"] % 47}, check=False)
    with pytest.raises(FtcError, match="not in every region|nearest miss"):
        ftc.rewrite(decoder(**changes), [("tensor-parallel", {"degree": degree, "expect": "all"})], example={"input_ids": batch()["input_ids"] % 47}, check=False)


def test_bad_options_are_errors_that_say_what_to_do():
    for options, words in (({"degree": 1}, "divides nothing"), ({"degree": 2, "axis": "a b"}, "no name"), ({}, "needs the option 'degree'")):
        with pytest.raises(FtcError, match=words):
            ftc.rewrite(decoder(), [("tensor-parallel", options)], example=batch())
    program = ftc.rewrite(decoder(), [("tensor-parallel", {"degree": 2})], example=batch(), check=False)
    again = ftc.rewrite(program, [("tensor-parallel", {"degree": 2})])
    assert again._applied[-1]["matches"] == 0 and again._applied[-1]["already"]
    with pytest.raises(FtcError, match="has 2 ranks in this program already"):
        ftc.rewrite(program, [("tensor-parallel", {"degree": 4})])


# ------------------------------------------------------------------------------------------------------ files and variants


def test_a_saved_program_names_no_group_and_verifies(tmp_path):
    model = decoder()
    program = ftc.rewrite(model, ["fuse-qkv", ("tensor-parallel", {"degree": 2}), "fuse-gate-up"], example=batch())
    program.save(tmp_path / "p")
    loaded = ftc.load(tmp_path / "p")
    assert loaded.axes == program.axes and not loaded.bound
    torch.testing.assert_close(loaded(**batch()), model(**batch()), rtol=1e-12, atol=1e-12)
    found = ftc.verify(tmp_path / "p")
    assert found.ok, str(found)


def test_a_variant_captured_later_is_divided_too():
    model = decoder().eval()
    program = ftc.rewrite(model, ["fuse-qkv", ("tensor-parallel", {"degree": 2}), "fuse-gate-up"], example=batch())
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    out, expected = (m(batch()["input_ids"], attention_mask=mask) for m in (program, model))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

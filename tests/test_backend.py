"""`torch.compile(model, backend="ftc")`: rewritten inside torch.compile, parameters kept."""

import pytest
import torch
from ftc.models.decoder import Decoder, DecoderConfig
from torch._dynamo.exc import BackendCompilerFailed

from ftc.errors import FtcError


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return Decoder(DecoderConfig(**sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=64))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, passes, inner="eager", **keywords):
    return torch.compile(model, backend="ftc", options={"passes": passes, "inner": inner}, **keywords)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_raised_model_equals_eager_with_gradients_at_several_sizes(inner):
    model = decoder()
    fast = compiled(model, ["raise"], inner)
    for batch, tokens in ((2, 7), (3, 12)):
        ids = torch.randint(61, (batch, tokens))
        expected, actual = model(ids, ids), fast(ids, ids)
        assert close(expected, actual)
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        found = torch.autograd.grad(actual, list(model.parameters()))
        assert all(close(a, b) for a, b in zip(wanted, found, strict=True))


def test_passes_see_the_graph(monkeypatch):
    import ftc.rewrite.pipeline as pipeline

    matches = {}
    original = pipeline.apply_to_graph

    def counting(request, graph, *args, **kwargs):
        result = original(request, graph, *args, **kwargs)
        matches[request.name] = len(result[1].matches) + result[1].already
        return result

    monkeypatch.setattr(pipeline, "apply_to_graph", counting)
    compiled(decoder(), ["raise"])(torch.randint(61, (2, 7)))
    assert (
        matches["raise-attention"] == 2
        and matches["raise-norm"] == 5
        and matches["raise-mlp"] == 2
        and matches["raise-rope"] >= 2
    )


def test_dynamic_sizes_compile_once():
    model, frames = decoder(), torch._dynamo.utils.counters["stats"]
    frames.clear()
    fast = compiled(model, ["raise-norm"], dynamic=True)
    for shape in ((2, 7), (3, 12), (5, 9)):
        ids = torch.randint(61, shape)
        assert close(fast(ids), model(ids))
    assert frames["unique_graphs"] == 1


def test_without_passes_the_graph_goes_through():
    model = decoder()
    ids = torch.randint(61, (2, 7))
    assert torch.equal(compiled(model, [])(ids), model(ids))


def test_pass_that_changes_parameters_is_refused():
    with pytest.raises(BackendCompilerFailed, match="ftc.rewrite") as error:
        compiled(decoder(), ["fuse-gate-up"])(torch.randint(61, (2, 7)))
    assert isinstance(error.value.inner_exception, FtcError)


def test_pass_without_a_site_fails_loud_unless_allowed():
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    with pytest.raises(BackendCompilerFailed, match="raise-norm expected some sites"):
        compiled(layer, [("raise-norm", {"expect": "some"})])(x)
    torch._dynamo.reset()
    assert torch.equal(compiled(layer, [("raise-norm", {"expect": "any"})])(x), layer(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pases": []}, "did you mean 'passes'"),
        ({"inner": "inductr"}, "did you mean 'inductor'"),
        ({"passes": ["raise-nrom"]}, "did you mean 'raise-norm'"),
    ],
)
def test_wrong_options_name_the_nearest_valid_one(options, words):
    with pytest.raises(BackendCompilerFailed, match=words):
        torch.compile(decoder(), backend="ftc", options=options)(torch.randint(61, (2, 7)))

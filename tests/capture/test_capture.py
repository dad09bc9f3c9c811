"""Capture of plain PyTorch models: structures, sharing, in place and as a copy, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from capture_families import assert_same_bits
from ftc.models.decoder import Decoder, DecoderConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import Stack
from torch import nn

import ftc
from ftc.capture.variants import MAX_VARIANTS


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    return Decoder(DecoderConfig(**(sizes | changes)))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def pair(request):
    model = decoder().to(request.param)
    return ftc.capture(model, {"input_ids": torch.randint(61, (2, 7))}), model


@settings(max_examples=8)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 20),
    mask=st.sampled_from(["none", "ones", "left", "full"]),
    packed=st.booleans(),
    labels=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_structure_has_the_same_bits(pair, batch, tokens, mask, packed, labels, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids}
    if mask == "full":
        inputs["attention_mask"] = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    elif mask != "none":
        inputs["attention_mask"] = torch.ones(batch, tokens, dtype=torch.long)
        if mask == "left":
            inputs["attention_mask"][0, : tokens // 2] = 0
    if packed:
        inputs["position_ids"] = (torch.arange(tokens) % (tokens // 2 + 1))[None].expand(batch, -1)
    if labels:
        inputs["labels"] = ids.roll(-1, 1)
    assert_same_bits(*pair, inputs)


def test_copy_shares_parameters_and_leaves_the_model_alone():
    model = decoder(tie_word_embeddings=True)
    keys, forward = list(model.state_dict()), type(model).forward
    program = ftc.capture(model, (torch.randint(61, (2, 7)),))
    assert list(program.state_dict()) == keys == list(model.state_dict())
    for (_, ours), (_, theirs) in zip(program.named_parameters(), model.named_parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert type(model).forward is forward and "forward" not in vars(model)
    assert type(model.layers[0]).__name__ == "Block"


def test_in_place_the_model_runs_the_program():
    model, reference = decoder(), decoder()
    keys = list(model.state_dict())
    program = ftc.capture(model, {"input_ids": torch.randint(61, (2, 7))}, inplace=True)
    assert list(model.state_dict()) == keys and model.layers[0] is program.regions[0]
    ids = torch.randint(61, (3, 5))
    assert torch.equal(model(ids), reference(ids))
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert not torch.equal(program(ids), reference(ids))


def test_replaced_parameters_are_seen():
    model, other = decoder(), decoder()
    ids = torch.randint(61, (2, 7))
    program = ftc.capture(model, {"input_ids": ids})
    program(ids)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    program.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(program(ids), other(ids))
    assert torch.equal(program.to(torch.bfloat16)(ids), other.to(torch.bfloat16)(ids))


def test_train_and_eval_mode_are_kept():
    model = decoder().train()
    model.layers[1].eval()
    program = ftc.capture(model)
    assert [r.training for r in program.regions] == [True, False, True] and program.training


class Sizes(nn.Module):
    """A model whose blocks are attributes, with an argument that is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Gate(), Gate()

    def forward(self, x, scale=1, add=0.0):
        return self.second(self.first(x, scale), scale) + add


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, scale=1):
        if scale is True:
            return x
        return x + scale * self.down(F.gelu(self.up(x)))


def test_blocks_as_attributes():
    model = Sizes()
    program = ftc.capture(model, (torch.randn(2, 8),))
    assert len(program.regions) == 2
    assert len({r.code for r in program.regions}) == 1
    assert_same_bits(program, model, {"x": torch.randn(5, 8)})


def test_constants_that_compare_equal_are_told_apart():
    model, x = Sizes(), torch.randn(2, 8)
    program = ftc.capture(model, (x,))
    for scale in (1, True, 1.0, 2, 1):
        assert torch.equal(program(x, scale), model(x, scale)), scale
    zero = torch.zeros(2, 8) * -1.0
    for add in (0.0, -0.0):
        assert torch.equal(torch.signbit(program(zero, True, add)), torch.signbit(model(zero, True, add)))


def test_no_repeated_blocks_is_one_region_and_said_so():
    model = nn.Sequential()
    model.add_module("only", nn.Linear(4, 4))
    program = ftc.capture(model, (torch.randn(3, 4),))
    assert program.regions == [] and "no repeated blocks" in program.describe()["note"]
    assert torch.equal(program(torch.ones(5, 4)), model(torch.ones(5, 4)))


class Indexed(nn.Module):
    """A block with a layer index that is used, or not."""

    def __init__(self, index, used):
        super().__init__()
        self.layer_idx, self.used = index, used
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * (self.layer_idx + 1) if self.used else self.inner(x)


class Later(Indexed):
    """The index matters in training only, which is seen when that variant is captured."""

    def forward(self, x):
        return self.inner(x) * (self.layer_idx + 1) if self.training else self.inner(x)


@pytest.mark.parametrize(("used", "codes"), [(True, 3), (False, 1)])
def test_a_layer_index_that_matters_is_not_shared(used, codes):
    model = Stack(lambda i: Indexed(i, used))
    program = ftc.capture(model, (torch.randn(2, 4),))
    assert len({r.code for r in program.regions}) == codes
    assert_same_bits(program, model, {"x": torch.randn(3, 4)})


def test_twins_that_part_in_another_mode_are_split_then():
    model = Stack(lambda i: Later(i, True)).eval()
    program = ftc.capture(model, (torch.randn(2, 4),))
    assert len({r.code for r in program.regions}) == 1
    assert_same_bits(program.train(), model.train(), {"x": torch.randn(3, 4)})
    assert_same_bits(program.eval(), model.eval(), {"x": torch.randn(3, 4)})


class Opaque:
    def __init__(self, factor):
        self.factor = factor


def test_twins_that_differ_in_an_object_of_their_own_are_not_shared():
    class Scaled(Indexed):
        def __init__(self, index):
            super().__init__(index, False)
            self.opaque = Opaque(index + 2)

        def forward(self, x):
            return self.inner(x) * self.opaque.factor

    model = Stack(Scaled)
    assert_same_bits(ftc.capture(model, (torch.randn(2, 4),)), model, {"x": torch.randn(3, 4)})


def test_more_structures_than_allowed_are_refused():
    program = ftc.capture(Sizes().requires_grad_(False))
    x = torch.randn(2, 8)
    code = program.code
    code.variants[()] = [None] * (MAX_VARIANTS - 1)
    program(x, 1)
    with pytest.raises(ftc.FtcError, match=f"more than {MAX_VARIANTS} structures"):
        program(x, 2)


@pytest.mark.parametrize(
    ("example", "words"),
    [({"ids": torch.zeros(1, 2)}, "takes input_ids"), ("text", "dict of keyword inputs"), ((), "missing a required")],
)
def test_example_that_does_not_fit_the_signature(example, words):
    with pytest.raises(ftc.FtcError, match=words):
        ftc.capture(decoder(), example)


def test_compiled_program_has_one_frame_for_all_twins_and_new_variants_are_compiled():
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    model = decoder(num_hidden_layers=6)
    program = ftc.capture(model, {"input_ids": torch.randint(61, (2, 7))}).compile(backend="eager", dynamic=True)
    for shape in ((2, 7), (3, 9)):
        assert torch.equal(program(ids := torch.randint(61, shape)), model(ids))
    assert frames["unique_graphs"] == 1
    mask = torch.ones(2, 7, dtype=torch.long)
    ids = torch.randint(61, (2, 7))
    assert torch.equal(program(ids, attention_mask=mask), model(ids, attention_mask=mask))
    assert frames["unique_graphs"] == 2
    torch._dynamo.reset()

"""Rewriting a Hugging Face model that carries its weights along, in place and as a copy that shares what is untouched."""

import pytest
import torch

import ftc

transformers = pytest.importorskip("transformers")
PASSES = ["fuse-qkv", "fuse-gate-up"]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=61, max_position_embeddings=64)


def model_of(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, attention_dropout=0.0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def ids(seed=1, batch=2, tokens=9):
    return torch.randint(61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, **inputs):
    return model(**inputs, use_cache=False).logits if not isinstance(model, ftc.Program) else model(**inputs).logits


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_in_place_the_model_itself_runs_on_the_fused_weights(family):
    model, reference = model_of(family), model_of(family)
    keys = list(model.state_dict())
    program = ftc.rewrite(model, PASSES, example={"input_ids": ids()}, inplace=True)
    assert program.report.as_dict()["passes"]["fuse-qkv"]["matches"] == 3
    for mode in (True, False):
        model.train(mode), reference.train(mode)
        assert all(module.training == mode for module in (*model.modules(), *program.regions))
        found, wanted = model(input_ids=ids(2)).logits, logits(reference, input_ids=ids(2))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    held = list(model.state_dict())
    assert any("qkv" in name for name in held) and not any("q_proj.weight" in name for name in held)
    assert [name for name in held if "layers" not in name] == [name for name in keys if "layers" not in name]
    back = program.original_state_dict()
    assert set(back) == set(keys) and all(torch.equal(back[name], reference.state_dict()[name]) for name in keys)


def test_in_place_the_model_trains_and_its_weights_go_back():
    model = model_of("Llama")
    keys = list(model.state_dict())
    program = ftc.rewrite(model.train(), PASSES, example={"input_ids": ids()}, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    fresh = model_of("Llama")
    fresh.load_state_dict({name: program.original_state_dict()[name] for name in keys})
    torch.testing.assert_close(logits(fresh, input_ids=ids(3)), model.eval()(input_ids=ids(3)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", [["raise"], PASSES])
def test_a_copy_shares_what_is_untouched_and_leaves_the_model_as_it_was(passes):
    model = model_of("Llama").train()
    keys, before = list(model.state_dict()), {name: value.clone() for name, value in model.state_dict().items()}
    program = ftc.rewrite(model, passes, example={"input_ids": ids()})
    assert list(model.state_dict()) == keys and all(torch.equal(model.state_dict()[n], before[n]) for n in keys)
    assert model.training and program.training and type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    ours, theirs = dict(program.named_parameters()), dict(model.named_parameters())
    shared = set(ours) & set(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in shared)
    if passes == ["raise"]:
        assert list(program.state_dict()) == keys
    else:
        fused = {name for name in theirs if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}
        assert shared == set(theirs) - fused
    program.eval()
    assert model.training, "the copy has a mode of its own"
    torch.testing.assert_close(program(input_ids=ids(2)).logits, logits(model.eval(), input_ids=ids(2)), rtol=1e-5, atol=1e-5)

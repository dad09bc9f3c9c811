"""Which parameters a run trains: names, modules and patterns; what names nothing is an error."""

import pytest
from ftc.models.decoder import Decoder
from ftc.models.presets import preset

from ftc.errors import FtcError
from ftc.train.trainable import train_only


def trained(patterns, **changes):
    model = Decoder(preset("tiny", **changes))
    train_only(model, patterns)
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}, model


def test_without_patterns_all_are_trained():
    names, model = trained([])
    assert names == {name for name, _ in model.named_parameters(remove_duplicate=False)}


def test_a_module_stands_for_all_that_it_holds_and_a_star_for_any_part():
    assert trained(["norm"])[0] == {"norm.weight"}
    layers, model = trained(["layers.*.mlp", "layers.0.input_layernorm.weight"])
    assert layers == {n for n, _ in model.named_parameters() if ".mlp." in n} | {"layers.0.input_layernorm.weight"}
    assert all("norm" in name for name in trained(["*norm*"])[0])


def test_tied_parameters_are_one():
    names, _ = trained(["lm_head"], tie_word_embeddings=True)
    assert names == {"lm_head.weight", "embed_tokens.weight"}


def test_a_pattern_that_names_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(FtcError, match=r"ftc.trainable names 'layer.0.mlp'.*did you mean 'layers.0.mlp"):
        trained(["norm", "layer.0.mlp"])

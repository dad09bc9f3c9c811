"""Small models, batches and helpers that the tests of cut programs share. Models are drawn from a seed, so every process builds the same."""

import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
from ftc.rewrite import probe

VOCABULARY = 64
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, head_dim=8)
DECODERS = {
    "decoder": {},
    "tied decoder": {"tie_word_embeddings": True},
    "mixture": {"moe": dict(num_experts=4, top_k=2, intermediate_size=16)},
}
_FAMILY = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
FAMILIES = {
    "Llama": {},
    "tied Llama": {"tie_word_embeddings": True},
    # Tied, an embedding times a scale, two kinds of attention with rotary tables of their own.
    "Gemma3Text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8},
}


def build(name: str, layers: int = 4) -> nn.Module:
    """A small model with random weights and norm gains."""
    torch.manual_seed(1)
    if name in DECODERS:
        model = Decoder(preset("tiny", **SMALL, num_hidden_layers=layers, **DECODERS[name]))
    else:
        import transformers

        config = getattr(transformers, f"{name.split()[-1]}Config")(**_FAMILY, num_hidden_layers=layers, **FAMILIES[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch(size: int = 4, tokens: int = 16, packed: bool = False, seed: int = 5) -> dict[str, torch.Tensor]:
    """Ids and labels [B, T] (shifted), one in each row ignored; with `packed` positions that begin anew after a third of a window."""
    ids = torch.randint(1, VOCABULARY, (size, tokens + 1), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    labels[:, 3] = -100
    given = {"input_ids": ids[:, :-1].contiguous(), "labels": labels}
    if packed:
        given["position_ids"] = torch.arange(tokens).remainder(tokens // 3 + 1).expand(size, tokens).contiguous()
    return given


def program_of(name: str, passes: list = (), layers: int = 4, given: dict | None = None, dtype: torch.dtype = torch.float32):
    """The model captured for a batch, and rewritten."""
    model = build(name, layers).to(dtype)
    return ftc.rewrite(model, list(passes), example=given or batch(), check=False)


def run_stages(stages, given: dict, extras: bool = False):
    """What the stages give, called one after the other."""
    crossing: tuple = ()
    for stage in stages[:-1]:
        crossing = stage(*crossing, ftc_extras=extras, **given)
    return stages[-1](*crossing, ftc_extras=extras, **given)


def loss_of(output) -> torch.Tensor:
    """The loss in what a model returns for a call with labels."""
    return output if isinstance(output, torch.Tensor) else output.loss


def gradients(program) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def summed_gradients(stages) -> dict[str, torch.Tensor]:
    """Gradients by name, those of several holders added up."""
    total: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, p in stage.body.named_parameters():
            if p.grad is not None:
                total[name] = total[name] + p.grad if name in total else p.grad.clone()
    return total


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of all gradients, as certificates measure it."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(probe.relative_error(found[name], expected[name], largest) for name in expected)

"""Mixtures of experts as Hugging Face writes them, each `experts_implementation`: all are raised, fused, proved, and go back with the same bits."""

import pytest
import torch

import ftc

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Mixtral": dict(num_local_experts=4),
    "Qwen3Moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True),
    "Olmoe": dict(num_experts=8, num_experts_per_tok=3),
    "DeepseekV3": dict(
        num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    ),
    "GptOss": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=8),
    "Llama4Text": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size_mlp=24, moe_layers=[0, 1]),
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MIXTURES = {"DeepseekV3": 1}  # its first layer is dense


def family(name: str, implementation: str):
    """A model with random weights; skips an implementation that the library refuses for it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
    try:
        if name == "Llama4Text":  # text alone, and one spelling of its experts
            if implementation != "eager":
                pytest.skip("Llama 4 has one implementation of its experts")
            model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager")
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation=implementation)
    except ValueError as error:
        pytest.skip(str(error)[:80])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # GPT-OSS's router starts as zeros: all experts alike
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 99, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def check(name: str, implementation: str) -> None:
    model = family(name, implementation)
    program = ftc.rewrite(model, ["fuse-moe"], example={"input_ids": ids(2, 7)})
    report = program.report.as_dict()
    assert report["passes"]["raise-moe"]["matches"] == report["passes"]["fuse-moe"]["matches"] == MIXTURES.get(name, 2)
    assert report["passes"]["raise-moe"]["max_output_error"] <= 1e-12 and report["passes"]["raise-moe"]["max_gradient_error"] <= 1e-12
    assert not any(leftover["kind"] == "moe" for leftover in report["residue"])
    for inputs in (ids(2, 7), ids(3, 5), ids(1, 1)):
        torch.testing.assert_close(program(input_ids=inputs).logits, model(input_ids=inputs, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    back = program.original_state_dict()
    assert all(torch.equal(value, state[key]) for key, value in back.items())


@pytest.mark.parametrize(("name", "implementation"), [("Mixtral", "eager"), ("GptOss", "batched_mm"), ("DeepseekV3", "grouped_mm"), ("Llama4Text", "eager")])
def test_some_families_are_raised_and_fused(name, implementation):
    check(name, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_raised_and_fused(name, implementation):
    check(name, implementation)


def test_an_expert_that_computes_something_else_is_named_as_the_nearest_miss():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(8, 4)
            self.experts = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 8)) for _ in range(4))

        def forward(self, x):
            weights, indices = self.router(x).softmax(-1).topk(2, -1)
            return sum((weights * (indices == e)).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(self.experts))

    model = torch.nn.Sequential(Odd(), Odd())
    with pytest.raises(ftc.FtcError, match="no known expert"):
        ftc.rewrite(model, ["fuse-moe"], example=(torch.randn(5, 8),))

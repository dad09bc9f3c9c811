"""insert-kv-cache on the decoders of transformers, as they come: chunks of ragged texts give the logits of whole ones, greedy tokens the same."""

import sys
from pathlib import Path

import pytest
import torch

import ftc
from ftc.cache import PagedCache, generate_batch, with_cache
from ftc.cache.flat import flatten

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
from capture_families import WINDOW, family, ids  # noqa: E402  beside the tests of capture

# What each is here for: plain, window of 16 (the example is shorter than it), norms on queries and keys, soft caps and windows in turns, learned
# positions and fused projections, latent attention with experts, partial rotation beside attention.
FAMILIES = {"Llama": "sdpa", "Mistral": "sdpa", "Qwen3": "sdpa", "Gemma2": "eager", "GPT2": "sdpa", "DeepseekV3": "sdpa", "Glm": "sdpa"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_continues_ragged_texts(name):
    model = family(name, FAMILIES[name])
    program = ftc.rewrite(model, ["insert-kv-cache"], example={"input_ids": ids(2, 12)})
    entry = program._applied[-1]
    assert entry["max_output_error"] < (1e-12 if name != "Gemma2" else 1e-5) and not entry["misses"]
    cache = PagedCache(program, 16)
    texts = {cache.add(): ids(1, n, n)[0] for n in (2 * WINDOW + 9, 20)}
    whole = {s: model(input_ids=text[None]).logits[0].detach() for s, text in texts.items()}
    parts, at = {s: [] for s in texts}, dict.fromkeys(texts, 0)
    for counts in ((17, 2), (1, 1), (1, 0), (13, 9), (0, 1), (9, 7)):
        chunks = {s: texts[s][at[s] : at[s] + n] for s, n in zip(texts, counts, strict=True)}
        for s, logits in cache.forward(chunks).items():
            parts[s].append(logits)
            at[s] += len(chunks[s])
    for s, text in texts.items():
        assert at[s] == len(text)
        found = torch.cat(parts[s])
        assert float((found - whole[s]).abs().max() / whole[s].abs().max()) < 1e-5
        assert torch.equal(found.argmax(-1), whole[s].argmax(-1))


def test_a_window_is_seen_though_the_example_was_shorter():
    model = family("Mistral", "sdpa")
    program = ftc.rewrite(model, ["insert-kv-cache"], example={"input_ids": ids(2, 12)})
    graph = flatten(program, program.code.all_variants()[0]).graph
    assert [n.kwargs["window"] for n in graph.nodes if n.target is torch.ops.ftc.paged_attention.default] == [WINDOW] * 3
    without = family("Mistral", "sdpa")
    without.config.sliding_window = None
    without.load_state_dict(model.state_dict())
    prompt = ids(1, 40)[0].tolist()
    assert generate_batch(program, [prompt], 12) != generate_batch(with_cache(without), [prompt], 12)


def test_greedy_tokens_are_those_of_the_librarys_own_generate():
    model = family("Llama", "sdpa")
    prompts = [ids(1, n, n)[0].tolist() for n in (11, 4)]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=15, min_new_tokens=15, do_sample=False, eos_token_id=None)[0, len(p) :].tolist() for p in prompts
    ]
    assert generate_batch(with_cache(model), prompts, 15) == expected

"""Latent attentions of a rewritten program in DeepSeek's form, as transformers' DeepSeek-V3 attention loads and runs them.

DeepSeek's attention norms its latent (`kv_a_layernorm`), and a converted one has no norm. One more, constant channel passes it unharmed: with M far above all
latents, M / rms([c, M]) = sqrt(n) (1 - |c|^2 / 2 M^2 ...), so a gain of M / sqrt(n) gives c back, to 5e-7 at M = 1000 |c|. The channel comes from the bias
of the down-projection, and no row of the up-projection reads it. Its scale is 1 / sqrt(N + E), so the queries carry what ours differs by.

    model.layers.I.self_attn.{q_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj}    in model.safetensors
    config.json                                                                            sizes of DeepSeek-V3's attention
    rope_columns.json                                                                      a layer's columns of the original cos and sin tables
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from ftc.models.checkpoints.safetensors_io import write_file

from ftc.errors import FtcError
from ftc.files import atomic_folder, atomic_write
from ftc.rewrite.attention_site import LATENT, LINEAR, ROPE, attention_nodes, latent_nodes, output_product

HEADROOM = 1e3  # of the constant channel over the largest latent
KIND = "deepseek-attention"


@dataclass(frozen=True)
class LayerInDeepseekForm:
    """One layer: tensors by DeepSeek's names inside `self_attn`, and the columns of the original's tables for cos and sin."""

    tensors: dict[str, torch.Tensor]
    sizes: dict[str, int]
    interleaved: bool
    columns: tuple[int, ...]


def deepseek_layer(region, largest_latent: float) -> LayerInDeepseekForm:
    """The latent attention of one region of a program. `largest_latent`: the largest norm of a latent that it will meet.

    Raises FtcError where there is none, or DeepSeek's form has no place for something (a bias of the queries).
    """
    node = _latent_node(region)
    groups, scale = node.kwargs["groups"], node.kwargs["scale"]
    q_nope, q_pe, latent = (node.args[i].meta["val"] for i in (0, 1, 2))
    heads, nope, rotated, rank = int(q_nope.shape[1]), int(q_nope.shape[-1]), int(q_pe.shape[-1]), int(latent.shape[-1])
    weights = _weights(region, node)
    up = weights["up"].unflatten(0, (groups, -1))
    value = up.shape[1] - nope
    kept = max(nope, 2)  # DeepSeek's heads have a part without RoPE
    query = weights["query"].unflatten(0, (heads, -1)) * (scale * (kept + rotated) ** 0.5)
    if nope < kept:
        query = torch.cat([query.new_zeros(heads, kept - nope, query.shape[-1]), query], 1)
        up = torch.cat([up.new_zeros(groups, kept - nope, rank), up], 1)
    up = torch.cat([up, up.new_zeros(groups, up.shape[1], 1)], -1).repeat_interleave(heads // groups, 0)
    constant = HEADROOM * largest_latent
    down, bias = weights["down"], weights.get("down_bias", weights["down"].new_zeros(rank + rotated))
    down = torch.cat([down[:rank], down.new_zeros(1, down.shape[1]), down[rank:]])
    bias = torch.cat([bias[:rank], bias.new_full((1,), constant), bias[rank:]])
    tensors = {
        "q_proj.weight": query.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": down,
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": down.new_full((rank + 1,), constant / (rank + 1) ** 0.5),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": weights["out"],
        "o_proj.bias": weights.get("out_bias", weights["out"].new_zeros(weights["out"].shape[0])),
    }
    sizes = {"kv_lora_rank": rank + 1, "qk_nope_head_dim": kept, "qk_rope_head_dim": rotated, "v_head_dim": value, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": heads, "hidden_size": weights["query"].shape[1]}
    interleaved, columns = _rope(node)
    return LayerInDeepseekForm({n: t.detach().contiguous() for n, t in tensors.items()}, sizes, interleaved, columns)


def _latent_node(region):
    nodes = latent_nodes(region.code)
    if not nodes:
        raise FtcError(f"{region.name} has no latent attention; convert the model first: ftc rewrite MODEL --passes gqa-to-mla")
    return nodes[0]


def _weights(region, node) -> dict[str, torch.Tensor]:
    def product(start):
        while start.target is not LINEAR:
            start = start.args[0]
        return start

    query, down, out = product(node.args[0]), product(node.args[2]), output_product(node)
    if out is None:
        raise FtcError(f"{region.name}: no output product follows the attention alone")
    if len(query.args) > 2:
        raise FtcError(f"{region.name}: the queries have a bias, and DeepSeek's form has none for them")
    found = {"query": query.args[1], "down": down.args[1], "up": node.args[4], "out": out.args[1]}
    found |= {name: n.args[2] for name, n in (("down_bias", down), ("out_bias", out)) if len(n.args) > 2}
    return {name: region.fetch(str(n.target)).detach() for name, n in found.items()}


def _rope(node) -> tuple[bool, tuple[int, ...]]:
    rope = node.args[1]
    if rope.target is not ROPE:
        return False, ()
    table = rope.args[1]
    width = int(table.meta["val"].shape[-1])
    columns = table.args[2].meta["constant"].tolist() if table.target is torch.ops.aten.index_select.default else range(width)
    return bool(len(rope.args) > 3 and rope.args[3]), tuple(columns)


def save_deepseek_attention(program, folder: str | Path, batches) -> None:
    """Write the attentions of a program that gqa-to-mla made, ranks padded to the widest layer's, in one step.

    `batches` are calibration text ({"input_ids"}): the largest latent on it, times two, sets the constant channel. Raises FtcError where layers differ in
    heads or in their number of rotated elements; convert with `rank` and `rope` then, which gives all layers the same.
    """
    largest = _largest_latents(program, batches)
    layers = {name: deepseek_layer(program._regions[name], 2 * size) for name, size in largest.items()}
    sizes = [layer.sizes | {"kv_lora_rank": 0} for layer in layers.values()]
    if any(other != sizes[0] for other in sizes):
        raise FtcError("the layers differ in their number of rotated elements, and DeepSeek's configuration has one for all; convert with rank and rope")
    rank = max(layer.sizes["kv_lora_rank"] for layer in layers.values())
    tensors = {}
    for number, layer in enumerate(layers.values()):
        tensors |= {f"model.layers.{number}.self_attn.{n}": t for n, t in _padded(layer, rank).items()}
    any_layer = next(iter(layers.values()))
    config = any_layer.sizes | {"model_type": "deepseek_v3", "kv_lora_rank": rank, "q_lora_rank": None, "attention_bias": True}
    config |= {"rope_interleave": any_layer.interleaved, "num_hidden_layers": len(layers)}
    with atomic_folder(folder, KIND) as place:
        write_file(place / "model.safetensors", [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], lambda n: tensors[n])
        atomic_write(place / "config.json", json.dumps(config, indent=2) + "\n")
        atomic_write(place / "rope_columns.json", json.dumps([layer.columns for layer in layers.values()]) + "\n")


def _padded(layer: LayerInDeepseekForm, rank: int) -> dict[str, torch.Tensor]:
    """The layer with channels of zeros in its latent, up to `rank`; the constant channel stays the last of its own."""
    own, tensors = layer.sizes["kv_lora_rank"], dict(layer.tensors)
    if own == rank:
        return tensors
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        value = tensors[name]
        tensors[name] = torch.cat([value[:own], value.new_zeros(rank - own, *value.shape[1:]), value[own:]])
    up = tensors["kv_b_proj.weight"]
    tensors["kv_b_proj.weight"] = torch.cat([up, up.new_zeros(len(up), rank - own)], 1)
    gain = tensors["kv_a_layernorm.weight"][:1] * (own / rank) ** 0.5
    tensors["kv_a_layernorm.weight"] = gain.expand(rank).contiguous()
    return tensors


def _largest_latents(program, batches) -> dict[str, float]:
    from ftc.rewrite.observe import no_trained_parameters, observing

    largest: dict[str, float] = {}

    def latent(variant) -> list[str]:
        return [next(n for n in attention_nodes(variant.captured.graph) if n.target is LATENT).args[2].name]

    def watch(region: str, values) -> None:
        largest[region] = max(largest.get(region, 0.0), float(values[0].detach().norm(dim=-1).max()))

    regions = [region.name for region in program.regions if latent_nodes(region.code)]
    if not regions:
        raise FtcError("the program has no latent attention; convert the model first: ftc rewrite MODEL --passes gqa-to-mla")
    with torch.no_grad(), no_trained_parameters(program), observing(program, {name: latent for name in regions}, watch):
        for batch in batches:
            program(**batch)
    return largest

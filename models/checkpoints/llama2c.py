"""llama2.c files (https://github.com/karpathy/llama2.c, "version 0", the legacy export): read and written by a lens.

    seven int32     dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: untied head), seq_len
    float32         token embedding, then each kind of weight for all layers in turn: attention norm, wq, wk, wv, wo,
                    ffn norm, w1 (gate), w2 (down), w3 (up); final norm; cos and sin tables; the head when untied

Little endian, rows of a matrix are outputs. RoPE is interleaved with theta 10000, the norms' epsilon is 1e-5.
Token 1 begins a text, token 2 ends it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.rope import RopeConfig, half_split_rows

from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.rewrite.lens import Compose, Lens, Permute, Rename, Stack

HEADER = struct.Struct("<7i")
_PER_LAYER = {  # file name -> the decoder's name inside a layer, in file order
    "attention_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "w1": "mlp.gate_proj.weight",
    "w2": "mlp.down_proj.weight",
    "w3": "mlp.up_proj.weight",
}
TABLES = ("freq_cos", "freq_sin")
_AGAIN = "download or copy it again, or name a llama2.c file (version 0)"


def read_header(path: str | Path) -> DecoderConfig:
    """The architecture of a file. Raises FtcError when it is missing, no llama2.c file, or of the wrong size."""
    path = Path(path)
    if not path.is_file():
        raise FtcError(f"{path} does not exist")
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise FtcError(f"{path} has {len(header)} bytes; a llama2.c file begins with seven int32; {_AGAIN}")
    dim, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack(header)
    if heads < 1 or dim % heads:
        raise FtcError(f"{path} is no llama2.c file: its header says dim {dim} and {heads} heads; {_AGAIN}")
    try:
        config = DecoderConfig(
            vocab_size=abs(vocab),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=vocab > 0,
            rope_interleaved=True,
            bos_token_id=1,
            eos_token_ids=(2,),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise FtcError(
            f"{path} is no llama2.c file: {error} (header {dim, hidden, layers, heads, kv_heads}); {_AGAIN}"
        ) from error
    expected = HEADER.size + 4 * sum(torch.Size(shape).numel() for _, shape in file_layout(config))
    actual = path.stat().st_size
    if actual != expected:
        raise FtcError(
            f"{path} has {actual} bytes, its header asks for {expected}: it is truncated or no llama2.c file; {_AGAIN}"
        )
    return config


def file_layout(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each float32 array after the header, layers stacked along the first dim."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    Q, G = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"wq": (Q, D), "wk": (G, D), "wv": (G, D), "wo": (D, Q), "w1": (F, D), "w2": (D, F), "w3": (F, D)}
    yield "tok_embeddings", (config.vocab_size, D)
    for name in _PER_LAYER:
        rows, *columns = shapes.get(name, (D,))
        yield name, (L * rows, *columns)
    yield "norm", (D,)
    for name in TABLES:
        yield name, (config.max_position_embeddings, config.head_dim // 2)
    if not config.tie_word_embeddings:
        yield "output", (config.vocab_size, D)


def llama2c_lens(config: DecoderConfig) -> Compose:
    """From the decoder's parameter names to a file's arrays: half-split rows permuted, then all layers stacked."""
    steps: list[Lens] = [Rename("embed_tokens.weight", "tok_embeddings")]
    layout = dict(file_layout(config))
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    for file_name, name in _PER_LAYER.items():
        names = [f"layers.{layer}.{name}" for layer in range(config.num_hidden_layers)]
        if file_name in heads and not config.rope_interleaved:
            to_interleaved = half_split_rows(heads[file_name], config.head_dim).argsort()
            steps += [Permute(name, f"{name}.interleaved", to_interleaved) for name in names]
            names = [f"{name}.interleaved" for name in names]
        rows = layout[file_name][0] // config.num_hidden_layers
        steps.append(Stack(tuple(names), file_name, (rows,) * config.num_hidden_layers))
    steps.append(Rename("norm.weight", "norm"))
    if not config.tie_word_embeddings:
        steps.append(Rename("lm_head.weight", "output"))
    return Compose(tuple(steps))


def frequency_tables(config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [seq_len, K/2] in float32, as llama2.c's export computes them; its runtime does not read them."""
    exponents = torch.arange(0, config.head_dim, 2)[: config.head_dim // 2].float() / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings), 1.0 / (10000.0**exponents)).float()
    return angles.cos(), angles.sin()


def load_llama2c(path: str | Path) -> Decoder:
    """A float32 decoder with interleaved RoPE, in eval mode; memory peaks at about twice the parameters.

    Tables that differ from our own in any bit are kept as `llama2c_tables` on the decoder, so that writing it again
    gives the same bytes. Raises FtcError when the file is missing, of the wrong size, or no llama2.c file.
    """
    config = read_header(path)
    arrays = {}
    with open(path, "rb") as file:
        file.seek(HEADER.size)
        for name, shape in file_layout(config):
            values = np.fromfile(file, dtype="<f4", count=torch.Size(shape).numel())
            arrays[name] = torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)
    tables = tuple(arrays.pop(name) for name in TABLES)
    state = llama2c_lens(config).backward(arrays)
    model = meta_decoder(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if not all(map(torch.equal, tables, frequency_tables(config))):
        model.llama2c_tables = tables
    return model.eval()


def save_llama2c(model: Decoder, path: str | Path) -> None:
    """Write a decoder as a llama2.c file, in float32, in one step.

    Raises FtcError when the format cannot say what the model is: biases, another RoPE, epsilon or head size, or
    weights in float64.
    """
    config = model.config
    obstacles = {
        "experts": config.moe is not None,
        "norms of queries and keys": config.qk_norm is not None,
        "biases": config.attention_bias or config.attention_output_bias or config.mlp_bias,
        f"RoPE {config.rope.as_huggingface()} (it means theta 10000, unscaled)": config.rope != RopeConfig(),
        f"rms_norm_eps {config.rms_norm_eps} (it means 1e-5)": config.rms_norm_eps != 1e-5,
        f"head_dim {config.head_dim} (it means hidden_size / heads)": config.head_dim * config.num_attention_heads
        != config.hidden_size,
        "float64 weights (cast the model to float32 first)": any(p.dtype == torch.float64 for p in model.parameters()),
    }
    for what, present in obstacles.items():
        if present:
            raise FtcError(f"the llama2.c format cannot hold {what}; save a Hugging Face folder instead")
    state = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    arrays = llama2c_lens(config).forward(state)
    arrays |= dict(zip(TABLES, getattr(model, "llama2c_tables", None) or frequency_tables(config), strict=True))
    vocab = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    header = HEADER.pack(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        vocab,
        config.max_position_embeddings,
    )
    blocks = [arrays[name].contiguous().numpy().astype("<f4").tobytes() for name, _ in file_layout(config)]
    atomic_write(path, header + b"".join(blocks))

"""Begin training where counting token pairs ends, with a few heads that already look one, two, ... tokens back.

Embedding and head. With the blocks' outputs at zero the residual stream is the embedding alone, so a decoder computes

    logits(next | token) = head . rmsnorm(embedding[token]),

a bigram model of rank hidden_size. Its loss over the whole text depends on the table of pair counts C only,
sum_i [C_i. logsumexp_j z_ij] - sum_ij C_ij z_ij, so that a step over millions of tokens costs one product of V x D x V.

Heads. A query and a key that are the same for every token see positions alone: with key k and query R(-d) k under RoPE's
rotation R, the score of distance t is k . R(d - t) k, largest at t = d. The embedding's first element is the constant that
such projections read. Without them a small model spends a third of a short run on finding the previous token.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftc.errors import FtcError

_SHARPNESS = 5.0  # how far the score of the wanted distance lies above its neighbours'


def initialize_from_bigrams(model: nn.Module, stream: np.ndarray, *, steps: int = 100, lr: float = 0.03) -> nn.Module:
    """Set the weights of a plain decoder in place and return it: bigram embedding and head, block outputs zero.

    `stream`: token ids, integer [tokens]. The query heads of the first layer's first key-value head look 1, 2, ... tokens
    back. The blocks' other matrices are drawn normal with std 0.5 / sqrt(inputs), as suits a residual stream of unit size.
    Deterministic for one state of torch's random generator. Raises FtcError for a model with a tied head, which cannot
    hold a bigram table.
    """
    embedding, head = model.embed_tokens, model.lm_head
    if head.weight is embedding.weight:
        raise FtcError(
            'initialization "bigram" needs an untied head; set [ftc.architecture] tie_word_embeddings = false'
        )
    counts_VV = _pair_counts(stream, len(embedding.weight))
    embedding_VD, head_VD = _fit(counts_VV, embedding.embedding_dim, steps, lr)
    with torch.no_grad():
        for name, module in model.layers.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("o_proj", "down_proj")):
                    module.weight.zero_()
                else:
                    module.weight.normal_(0.0, 0.5 * module.in_features**-0.5)
        embedding.weight.copy_(embedding_VD)
        head.weight.copy_(head_VD)
        _look_back(model.layers[0].self_attn, model.config)
    return model


def _pair_counts(stream: np.ndarray, vocab_size: int) -> Tensor:
    """How often token j follows token i, float32 [V, V]."""
    ids = np.asarray(stream, dtype=np.int64)
    counts = np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
    return torch.from_numpy(counts.astype(np.float32)).view(vocab_size, vocab_size)


def _fit(counts_VV: Tensor, width: int, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Embedding and head, both [V, D], that minimise the cross-entropy of the pairs.

    The embedding's rows have a mean square of one and begin with the constant 1.
    """
    vocab_size, total, rows_V = len(counts_VV), counts_VV.sum(), counts_VV.sum(1)
    free = torch.randn(vocab_size, width - 1).requires_grad_()
    head_VD = (0.01 * torch.randn(vocab_size, width)).requires_grad_()
    optimizer = torch.optim.Adam([free, head_VD], lr=lr, betas=(0.8, 0.95))

    def embedding_VD() -> Tensor:
        return F.pad(F.rms_norm(free, (width - 1,)), (1, 0), value=1.0)

    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.6 * steps))
            logits_VV = embedding_VD() @ head_VD.T
            nats = (torch.logsumexp(logits_VV, 1) * rows_V).sum() - (counts_VV * logits_VV).sum()
            optimizer.zero_grad()
            (nats / total + 1e-4 * head_VD.square().mean()).backward()
            optimizer.step()
    return embedding_VD().detach(), head_VD.detach()


def _look_back(attention: nn.Module, config) -> None:
    """Make the query heads of the first key-value head attend 1, 2, ... tokens back, reading the input's first element."""
    from ftc.models.rope import apply_rope, rope_cos_sin

    size, num_heads = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    distances = torch.arange(num_heads + 1)[None]
    cos_1TK, sin_1TK = rope_cos_sin(
        config.rope, size, config.max_position_embeddings, distances, config.rope_interleaved, torch.float32
    )
    ones_TK = torch.ones(1, 1, num_heads + 1, size)
    back_TK = apply_rope(ones_TK, cos_1TK, -sin_1TK, config.rope_interleaved)[0, 0]  # R(-d) of the all-ones key
    fall = (back_TK[0] - back_TK[1]).sum()  # of the score from the wanted distance to the next, for a key of ones
    scale = (_SHARPNESS * size**0.5 / fall) ** 0.5
    attention.k_proj.weight[:size] = 0.0
    attention.k_proj.weight[:size, 0] = scale
    attention.q_proj.weight[: num_heads * size] = 0.0
    attention.q_proj.weight[: num_heads * size, 0] = scale * back_TK[1:].flatten()

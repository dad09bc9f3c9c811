"""Begin training where a bigram model ends: embedding and head fitted to the training text's table of token pairs.

With the blocks' outputs at zero the residual stream is the embedding alone, so a decoder computes

    logits(next | token) = head . rmsnorm(embedding[token]),

a bigram model of rank hidden_size. Its loss over the whole text depends on the table of pair counts C only,
sum_i [C_i. logsumexp_j z_ij] - sum_ij C_ij z_ij, so that a step over millions of tokens costs one product of V x D x V.
A short run then spends its steps on what needs context.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftc.errors import FtcError


def initialize_from_bigrams(model: nn.Module, stream: np.ndarray, *, steps: int = 100, lr: float = 0.03) -> nn.Module:
    """Set the weights of a plain decoder in place and return it: bigram embedding and head, block outputs zero.

    `stream`: token ids, integer [tokens]. The blocks' other matrices are drawn normal with std 0.5 / sqrt(inputs), as
    suits a residual stream of unit size. Deterministic for one state of torch's random generator. Raises FtcError for a
    model with a tied head, which cannot hold a bigram table.
    """
    embedding, head = model.embed_tokens, model.lm_head
    if head.weight is embedding.weight:
        raise FtcError(
            'initialization "bigram" needs an untied head; set [ftc.architecture] tie_word_embeddings = false'
        )
    with torch.no_grad():
        for name, module in model.layers.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("o_proj", "down_proj")):
                    module.weight.zero_()
                else:
                    module.weight.normal_(0.0, 0.5 * module.in_features**-0.5)
    counts_VV = _pair_counts(stream, len(embedding.weight))
    embedding_VD, head_VD = _fit(counts_VV, embedding.embedding_dim, steps, lr)
    with torch.no_grad():
        embedding.weight.copy_(embedding_VD)
        head.weight.copy_(head_VD)
    return model


def _pair_counts(stream: np.ndarray, vocab_size: int) -> Tensor:
    """How often token j follows token i, float32 [V, V]."""
    ids = np.asarray(stream, dtype=np.int64)
    counts = np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
    return torch.from_numpy(counts.astype(np.float32)).view(vocab_size, vocab_size)


def _fit(counts_VV: Tensor, width: int, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Embedding with rows of unit mean square, and head, both [V, D], that minimise the cross-entropy of the pairs."""
    vocab_size, total, rows_V = len(counts_VV), counts_VV.sum(), counts_VV.sum(1)
    embedding_VD = torch.randn(vocab_size, width).requires_grad_()
    head_VD = (0.01 * torch.randn(vocab_size, width)).requires_grad_()
    optimizer = torch.optim.Adam([embedding_VD, head_VD], lr=lr, betas=(0.8, 0.95))
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.6 * steps))
            logits_VV = F.rms_norm(embedding_VD, (width,)) @ head_VD.T
            nats = (torch.logsumexp(logits_VV, 1) * rows_V).sum() - (counts_VV * logits_VV).sum()
            optimizer.zero_grad()
            (nats / total + 1e-4 * head_VD.square().mean()).backward()
            optimizer.step()
    return F.rms_norm(embedding_VD, (width,)).detach(), head_VD.detach()

"""`ftc::chunk_logsumexp`: what cross-entropy needs of the logits, row by row, without ever holding all logits.

    z = cap(s h W^T + b):   (log sum_v exp z_v,  z_y,  sum_v z_v)     for each row h and its label y

Where each rank holds a part of the vocabulary these three are all that ranks have to tell each other. Chunks of rows are computed, reduced and
dropped; the backward pass computes each a second time, as `chunk_cross_entropy` does without a reduction. A label outside 0..V-1 (another
rank's) has z_y = 0.

Legend: N tokens, D model width, V vocabulary (of this rank), C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.dialect.chunk_cross_entropy import _capped_logits, chunk_rows
from ftc.dialect.library import LIBRARY


def reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain PyTorch: three [N] in float32 or wider; `chunk` changes nothing."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V) * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV.to(_dtype(hidden_ND))
    return logits_NV.logsumexp(-1), label_logits(logits_NV, labels_N), logits_NV.sum(-1)


def label_logits(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """The logit of each row's label, 0 where the label is none of 0..V-1."""
    own_N = (labels_N >= 0) & (labels_N < logits_NV.shape[1])
    return logits_NV.gather(1, labels_N.where(own_N, 0)[:, None]).squeeze(1).where(own_N, 0.0)


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


_SCHEMA = "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float? softcap=None, float logit_scale=1.0, int? chunk=None)"
LIBRARY.define(f"chunk_logsumexp{_SCHEMA} -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"chunk_logsumexp_forward{_SCHEMA} -> (Tensor, Tensor, Tensor)")  # without a gradient
LIBRARY.define(
    "chunk_logsumexp_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logsumexp, Tensor grad_logsumexp, "
    "Tensor grad_label, Tensor grad_sum, float? softcap, float logit_scale, int? chunk) -> (Tensor, Tensor, Tensor)"
)


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, chunk: int | None) -> tuple[list[slice], int]:
    num_tokens = hidden_ND.shape[0]
    rows = max(1, min(num_tokens, chunk_rows(weight_VD.shape[0], _dtype(hidden_ND).itemsize, chunk)))
    return [slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows)], rows


@torch.no_grad()
def _forward(hidden_ND, weight_VD, bias_V, labels_N, softcap=None, logit_scale=1.0, chunk=None):
    parts, rows = _chunks(hidden_ND, weight_VD, chunk)
    buffer_CV = hidden_ND.new_empty(rows, weight_VD.shape[0])
    found = hidden_ND.new_empty(3, hidden_ND.shape[0], dtype=_dtype(hidden_ND))
    for part in parts:
        size = part.stop - part.start
        logits_CV = _capped_logits(hidden_ND[part], weight_VD, bias_V, softcap, logit_scale, buffer_CV[:size]).to(found.dtype)
        found[0, part] = logits_CV.logsumexp(-1)
        found[1, part] = label_logits(logits_CV, labels_N[part])
        found[2, part] = logits_CV.sum(-1)
    return found[0].clone(), found[1].clone(), found[2].clone()


@torch.no_grad()
def _backward(hidden_ND, weight_VD, bias_V, labels_N, logsumexp_N, grad_lse_N, grad_label_N, grad_sum_N, softcap, logit_scale, chunk):
    """dz = d_lse exp(z - lse) + d_label onehot(y) + d_sum, through the cap and into hidden, weight and bias."""
    parts, rows = _chunks(hidden_ND, weight_VD, chunk)
    dtype, wide = hidden_ND.dtype, _dtype(hidden_ND)
    buffer_CV = hidden_ND.new_empty(rows, weight_VD.shape[0])
    hidden_grad = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
    weight_grad = weight_VD.new_zeros(weight_VD.shape, dtype=wide)
    bias_grad = weight_VD.new_zeros(weight_VD.shape[0] if bias_V is not None else 0, dtype=wide)
    own_N = (labels_N >= 0) & (labels_N < weight_VD.shape[0])
    index_N, grad_label_N = labels_N.where(own_N, 0), grad_label_N.where(own_N, 0.0)
    for part in parts:
        size = part.stop - part.start
        logits_CV = _capped_logits(hidden_ND[part], weight_VD, bias_V, softcap, logit_scale, buffer_CV[:size]).to(wide)
        grad_CV = (logits_CV - logsumexp_N[part, None]).exp_().mul_(grad_lse_N[part, None]).add_(grad_sum_N[part, None])
        grad_CV.scatter_add_(1, index_N[part, None], grad_label_N[part, None])
        if softcap is not None:
            grad_CV.mul_(1 - (logits_CV / softcap).square())
        if bias_V is not None:
            bias_grad += grad_CV.sum(0)
        grad_CV = grad_CV.to(dtype)
        hidden_grad[part] = torch.mm(grad_CV, weight_VD) * logit_scale
        weight_grad += (grad_CV.t() @ hidden_ND[part]).to(wide)
    return hidden_grad, (weight_grad * logit_scale).to(weight_VD.dtype), (bias_grad * logit_scale).to(weight_VD.dtype)


class _ChunkLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, softcap, logit_scale, chunk):
        found = torch.ops.ftc.chunk_logsumexp_forward(hidden_ND, weight_VD, bias_V, labels_N, softcap, logit_scale, chunk)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, found[0])
        ctx.options = (softcap, logit_scale, chunk)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        gradients = torch.ops.ftc.chunk_logsumexp_backward(*ctx.saved_tensors, *grads, *ctx.options)
        bias_grad = None if ctx.saved_tensors[2] is None else gradients[2]
        return gradients[0], gradients[1], bias_grad, None, None, None, None


def _autograd(hidden_ND, weight_VD, bias_V, labels_N, softcap=None, logit_scale=1.0, chunk=None):
    wanted = any(t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias_V))
    forward = torch.ops.ftc.chunk_logsumexp_forward
    function = _ChunkLogsumexp.apply if wanted and torch.is_grad_enabled() else forward
    return function(hidden_ND, weight_VD, bias_V, labels_N, softcap, logit_scale, chunk)


def _fake(hidden_ND, weight_VD, bias_V, labels_N, softcap=None, logit_scale=1.0, chunk=None):
    return tuple(hidden_ND.new_empty(hidden_ND.shape[:1], dtype=_dtype(hidden_ND)) for _ in range(3))


def _backward_fake(hidden_ND, weight_VD, bias_V, *others):
    bias = weight_VD.new_empty(weight_VD.shape[:1] if bias_V is not None else (0,))
    return torch.empty_like(hidden_ND), torch.empty_like(weight_VD), bias


LIBRARY.impl("chunk_logsumexp_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_logsumexp", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_logsumexp", _autograd, "Autograd")
LIBRARY.impl("chunk_logsumexp_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ftc::chunk_logsumexp", _fake)
torch.library.register_fake("ftc::chunk_logsumexp_forward", _fake)
torch.library.register_fake("ftc::chunk_logsumexp_backward", _backward_fake)

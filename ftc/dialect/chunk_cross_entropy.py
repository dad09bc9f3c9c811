"""`ftc::chunk_cross_entropy`: output head and cross-entropy in one op that never holds all logits.

    chunk_cross_entropy(h, W, b, y) = cross_entropy(linear(h, W, b), y)

The logits of a few tokens at a time are computed, turned into their loss and their gradient, multiplied into the gradients of
hidden states and weight, and dropped. For 'mean' and 'sum' this all happens in the forward pass (as in Liger Kernel, Hsu et al.
2024, arXiv:2410.10989), because the gradient of the loss is one number that scales the finished gradients: three matrix products,
as many as the plain spelling has. For 'none' the logits of each chunk are computed a second time in the backward pass.

Legend: N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.dialect.library import LIBRARY
from ftc.errors import FtcError, nearest

# Bytes of one chunk's logits; two such buffers live at a time. 4k tokens, width 512, vocabulary 32k, float32, 2 CPU threads: 64 MiB
# takes 0.87x the time and 0.10x the peak memory of the plain spelling, 16 MiB 0.85x and 0.06x (benchmarks/chunk_cross_entropy.py);
# the larger one keeps 128 tokens in a chunk at a vocabulary of 128k.
CHUNK_BYTES = 64 * 2**20
REDUCTIONS = ("mean", "sum", "none")


def reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    upcast: bool = True,
    chunk: int | None = None,
) -> Tensor:
    """The definition of `ftc::chunk_cross_entropy` in plain PyTorch; every argument means the same, `chunk` changes nothing."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    if logit_scale != 1.0:
        logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV.to(_loss_dtype(logits_NV.dtype, upcast))
    return F.cross_entropy(
        logits_NV, labels_N, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def chunk_rows(vocabulary: int, itemsize: int, chunk: int | None) -> int:
    """Tokens in a chunk: `chunk` where given, else as many as keep the logits within `CHUNK_BYTES`, and at least one."""
    return chunk if chunk is not None else max(1, CHUNK_BYTES // max(1, vocabulary * itemsize))


def _loss_dtype(dtype: torch.dtype, upcast: bool) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if upcast else dtype


def _check(hidden_ND, weight_VD, bias_V, labels_N, label_smoothing, reduction, softcap, chunk) -> None:
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise FtcError(
            f"chunk_cross_entropy: hidden {list(hidden_ND.shape)} and weight {list(weight_VD.shape)} do not fit; "
            "give hidden as [tokens, width] and weight as [vocabulary, width]"
        )
    if labels_N.dim() != 1 or labels_N.shape[0] != hidden_ND.shape[0]:
        raise FtcError(
            f"chunk_cross_entropy: labels {list(labels_N.shape)} must be [{hidden_ND.shape[0]}], one for each token; "
            "flatten batch and sequence of both"
        )
    if labels_N.dtype != torch.int64:
        raise FtcError(f"chunk_cross_entropy: labels are {labels_N.dtype}; give class indices as torch.int64")
    if bias_V is not None and list(bias_V.shape) != [weight_VD.shape[0]]:
        raise FtcError(f"chunk_cross_entropy: bias {list(bias_V.shape)} must be [{weight_VD.shape[0]}], the vocabulary")
    dtypes = {tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None}
    if len(dtypes) != 1 or not hidden_ND.dtype.is_floating_point:
        raise FtcError(
            f"chunk_cross_entropy: hidden, weight and bias must share one floating dtype, got {sorted(map(str, dtypes))}"
        )
    if reduction not in REDUCTIONS:
        raise FtcError(f"chunk_cross_entropy: unknown reduction {reduction!r}; {nearest(reduction, REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise FtcError(f"chunk_cross_entropy: label_smoothing {label_smoothing} must lie between 0 and 1")
    if softcap is not None and softcap <= 0:
        raise FtcError(f"chunk_cross_entropy: softcap {softcap} must be positive, or None")
    if chunk is not None and chunk < 1:
        raise FtcError(f"chunk_cross_entropy: chunk {chunk} must be at least one token, or None")


def _capped_logits(hidden_CD, weight_VD, bias_V, softcap, logit_scale, out_CV: Tensor) -> Tensor:
    """The logits of one chunk in the model's dtype, written into `out_CV`."""
    if bias_V is None:
        torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
    else:
        torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=out_CV)
    if logit_scale != 1.0:
        out_CV.mul_(logit_scale)
    if softcap is not None:
        out_CV.div_(softcap).tanh_().mul_(softcap)
    return out_CV


def _logit_gradient(logprob_CV, logits_CV, index_C1, label_smoothing, softcap) -> Tensor:
    """d loss / d logits (before `logit_scale`), computed in the memory of `logprob_CV`; spoils `logits_CV` under a soft cap.

    p - (1 - eps) onehot(y) - eps / V, times 1 - tanh^2 for the cap.
    """
    gradient_CV = logprob_CV.exp_()
    if label_smoothing:
        gradient_CV.sub_(label_smoothing / gradient_CV.shape[1])
    gradient_CV.scatter_add_(1, index_C1, gradient_CV.new_full(index_C1.shape, label_smoothing - 1.0))
    if softcap is not None:
        gradient_CV.mul_(logits_CV.div_(softcap).square_().neg_().add_(1.0))
    return gradient_CV


_OPTIONS = "int ignore_index, float label_smoothing, float? softcap, float logit_scale, bool upcast, int? chunk"
LIBRARY.define(
    "chunk_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index=-100, "
    "float label_smoothing=0.0, str reduction='mean', float? softcap=None, float logit_scale=1.0, bool upcast=True, "
    "int? chunk=None) -> Tensor"
)
# Loss of each row, and sum_n row_weights[n] * d loss[n], times `scale`, for those of hidden, weight and bias that `want` names.
LIBRARY.define(
    "chunk_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor row_weights, Tensor scale, "
    f"{_OPTIONS}, bool[] want) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.no_grad()  # a graph decomposed for inference may call this with parameters that ask for gradients
def _rows(
    hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, scale,
    ignore_index, label_smoothing, softcap, logit_scale, upcast, chunk, want,
):  # fmt: skip
    num_tokens, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    dtype, loss_dtype = hidden_ND.dtype, _loss_dtype(hidden_ND.dtype, upcast)
    sum_dtype = torch.promote_types(dtype, torch.float32)  # sums over chunks lose too much in 16 bits
    rows = max(1, min(num_tokens, chunk_rows(vocabulary, loss_dtype.itemsize, chunk)))
    losses_N = hidden_ND.new_empty(num_tokens, dtype=loss_dtype)
    want_hidden, want_weight, want_bias = want
    hidden_grad = (
        torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if want_hidden else hidden_ND.new_empty(0)
    )
    weight_grad = weight_VD.new_zeros(weight_VD.shape if want_weight else 0, dtype=sum_dtype)
    bias_grad = weight_VD.new_zeros(vocabulary if want_bias else 0, dtype=sum_dtype)
    # One pair of buffers for all chunks: fresh ones cost a page fault for each 4 KiB on CPU.
    logits_buffer, logprob_buffer = (
        hidden_ND.new_empty(rows, vocabulary),
        hidden_ND.new_empty(rows, vocabulary, dtype=loss_dtype),
    )
    index_N = labels_N.masked_fill(labels_N == ignore_index, 0)

    for start in range(0, num_tokens, rows):
        part = slice(start, min(start + rows, num_tokens))
        hidden_CD, size = hidden_ND[part], part.stop - start
        logits_CV = _capped_logits(hidden_CD, weight_VD, bias_V, softcap, logit_scale, logits_buffer[:size])
        logprob_CV = torch.log_softmax(logits_CV, -1, dtype=loss_dtype, out=logprob_buffer[:size])
        losses_N[part] = F.nll_loss(logprob_CV, labels_N[part], ignore_index=ignore_index, reduction="none")
        if label_smoothing:
            smooth_C = logprob_CV.mean(-1).masked_fill_(labels_N[part] == ignore_index, 0.0)
            losses_N[part] = losses_N[part] * (1 - label_smoothing) - smooth_C * label_smoothing
        if not any(want):
            continue
        gradient_CV = _logit_gradient(logprob_CV, logits_CV, index_N[part, None], label_smoothing, softcap)
        if want_bias:
            bias_grad += gradient_CV.t() @ row_weights_N[part].to(loss_dtype)
        gradient_CV = gradient_CV.to(dtype)
        # Row weights go on the D-wide side: a pass over C x D numbers instead of C x V.
        weights_C1 = row_weights_N[part, None]
        if want_hidden:
            hidden_grad[part] = torch.mm(gradient_CV, weight_VD) * (weights_C1 * (scale * logit_scale))
        if want_weight:
            weighted_CD = hidden_CD * weights_C1.to(dtype)
            if sum_dtype == dtype:
                weight_grad.addmm_(gradient_CV.t(), weighted_CD)
            else:
                weight_grad += gradient_CV.t() @ weighted_CD
    final = (scale * logit_scale).to(sum_dtype)
    return losses_N, hidden_grad, weight_grad.mul_(final).to(dtype), bias_grad.mul_(final).to(dtype)


def _rows_fake(hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, scale,
    ignore_index, label_smoothing, softcap, logit_scale, upcast, chunk, want,
):  # fmt: skip
    losses_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=_loss_dtype(hidden_ND.dtype, upcast))
    shapes = (hidden_ND.shape, weight_VD.shape, weight_VD.shape[:1])
    return losses_N, *(
        hidden_ND.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, want, strict=True)
    )


def _reduce(losses_N: Tensor, count: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses_N
    return losses_N.sum() / count.to(losses_N.dtype) if reduction == "mean" else losses_N.sum()


class _ChunkCrossEntropy(torch.autograd.Function):
    """Gradients in the forward pass for one-number losses; a second pass over the chunks for 'none'."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, reduction, options, want):
        ctx.reduction, ctx.options, ctx.want = reduction, options, want
        if reduction == "none":
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
            return _loss(hidden_ND, weight_VD, bias_V, labels_N, reduction, options, [False] * 3)[0]
        loss, gradients = _loss(hidden_ND, weight_VD, bias_V, labels_N, reduction, options, ctx.want)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad):
        if ctx.reduction != "none":
            gradients = [gradient * loss_grad for gradient in ctx.saved_tensors]
        else:
            hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
            one = loss_grad.new_ones(())
            row_weights_N = loss_grad.masked_fill(labels_N == ctx.options[0], 0.0)
            gradients = torch.ops.ftc.chunk_cross_entropy_rows(
                hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, one, *ctx.options, ctx.want
            )[1:]
        wanted = [gradient if want else None for gradient, want in zip(gradients, ctx.want, strict=True)]
        return (*wanted, None, None, None, None)


def _loss(hidden_ND, weight_VD, bias_V, labels_N, reduction, options, want) -> tuple[Tensor, list[Tensor]]:
    """The reduced loss, and the gradients of hidden, weight and bias that `want` names (empty tensors for the others)."""
    valid_N = labels_N != options[0]
    count = valid_N.sum()
    row_weights_N = valid_N.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    scale = row_weights_N.new_ones(())
    if reduction == "mean":
        scale = scale / count.clamp(min=1)  # no valid label: the loss is 0/0 = nan, its gradient zero, as in PyTorch
    losses_N, *gradients = torch.ops.ftc.chunk_cross_entropy_rows(
        hidden_ND, weight_VD, bias_V, labels_N, row_weights_N, scale, *options, want
    )
    return _reduce(losses_N, count, reduction), gradients


def _forward(hidden, weight, bias, labels, ignore_index=-100, label_smoothing=0.0, reduction="mean", softcap=None,
    logit_scale=1.0, upcast=True, chunk=None,
):  # fmt: skip
    """Backend kernel: the loss alone, no gradient."""
    _check(hidden, weight, bias, labels, label_smoothing, reduction, softcap, chunk)
    options = (ignore_index, label_smoothing, softcap, logit_scale, upcast, chunk)
    return _loss(hidden, weight, bias, labels, reduction, options, [False] * 3)[0]


def _forward_autograd(hidden, weight, bias, labels, ignore_index=-100, label_smoothing=0.0, reduction="mean", softcap=None,
    logit_scale=1.0, upcast=True, chunk=None,
):  # fmt: skip
    """Autograd kernel: with gradients where some input asks for one and grad mode is on."""
    _check(hidden, weight, bias, labels, label_smoothing, reduction, softcap, chunk)
    options = (ignore_index, label_smoothing, softcap, logit_scale, upcast, chunk)
    want = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    if not (torch.is_grad_enabled() and any(want)):
        return _loss(hidden, weight, bias, labels, reduction, options, [False] * 3)[0]
    return _ChunkCrossEntropy.apply(hidden, weight, bias, labels, reduction, options, want)


def _forward_fake(hidden, weight, bias, labels, ignore_index=-100, label_smoothing=0.0, reduction="mean", softcap=None,
    logit_scale=1.0, upcast=True, chunk=None,
):  # fmt: skip
    _check(hidden, weight, bias, labels, label_smoothing, reduction, softcap, chunk)
    shape = hidden.shape[:1] if reduction == "none" else ()
    return hidden.new_empty(shape, dtype=_loss_dtype(hidden.dtype, upcast))


LIBRARY.impl("chunk_cross_entropy_rows", _rows, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_cross_entropy", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_cross_entropy", _forward_autograd, "Autograd")
torch.library.register_fake("ftc::chunk_cross_entropy_rows", _rows_fake)
torch.library.register_fake("ftc::chunk_cross_entropy", _forward_fake)

"""Multi-token prediction around a plain decoder: DeepSeek-V3's sequential modules and Meta's parallel heads.

Sequential (DeepSeek-V3 report, 2024, section 2.2, equations 21 to 25), depth k = 1 .. D, position i:

    h_i^k = Block_k(M_k [RMSNorm(h_i^(k-1)); RMSNorm(Emb(t_(i+k)))]),  p(t_(i+k+1)) = softmax(Head(Norm_k(h_i^k)))

Parallel (Gloeckle et al. 2024): h^k = Block_k(what enters the decoder's last block). Embedding and head are the decoder's own.
What p(t_(i+k+1)) is trained towards ("target"): the label, or "model", the decoder's own p(t_(i+k+1) | t_1 .. t_(i+k)).
Legend: B batch, T tokens, D model, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
SCALES = (0.25, 1.0)  # of hidden states and embedding at the start; see passes/add_mtp.py


class MtpModule(nn.Module):
    """One depth of the sequential kind."""

    def __init__(self, block: nn.Module, norm: nn.Module, width: int):
        super().__init__()
        self.norm_hidden, self.norm_embedding = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.block, self.norm = copy.deepcopy(block), copy.deepcopy(norm)
        with torch.no_grad():
            self.proj.weight.copy_(torch.cat([scale * torch.eye(width) for scale in SCALES], 1))

    def forward(self, h_BTD, embedding_BTD, *context):
        joined = torch.cat([self.norm_hidden(h_BTD), self.norm_embedding(embedding_BTD)], -1)
        return self.block(self.proj(joined), *context)


class MtpHead(nn.Module):
    """One head of the parallel kind."""

    def __init__(self, block: nn.Module, norm: nn.Module):
        super().__init__()
        self.block, self.norm = copy.deepcopy(block), copy.deepcopy(norm)


class MtpDecoder(nn.Module):
    """A decoder (taken over, not copied) with `depth` modules; kind "sequential" or "parallel".

    Without labels: {"logits": [B, T, V], "mtp_logits": [that of depth 1, ...], "joined": bool [B, T]}, what `mtp_loss` takes. With labels [B, T], shifted by one as for the
    decoder, the loss: next token + weight / depth * sum of the depths', each divided by the number of next-token labels.
    """

    def __init__(
        self,
        decoder: nn.Module,
        depth: int = 1,
        weight: float = 0.3,
        kind: str = "sequential",
        end_of_text: int | None = None,
        target: str = "labels",
    ):
        super().__init__()
        if depth < 1 or kind not in ("sequential", "parallel"):
            raise ValueError(f"depth {depth}, kind {kind!r}: depth must be 1 or more, kind 'sequential' or 'parallel'")
        if target not in ("labels", "model"):
            raise ValueError(f"target {target!r}: it must be 'labels' or 'model'")
        self.target = target
        self.decoder, self.weight, self.kind, self.end_of_text = decoder, weight, kind, end_of_text
        last, norm, width = decoder.layers[-1], decoder.norm, decoder.config.hidden_size
        self.mtp = nn.ModuleList(
            MtpModule(last, norm, width) if kind == "sequential" else MtpHead(last, norm) for _ in range(depth)
        )

    def forward(self, input_ids, labels=None, position_ids=None, attention_mask=None):
        decoder, context = self.decoder, self.decoder.context(input_ids, position_ids, attention_mask)
        trunk_BTD = h_BTD = decoder.embed_tokens(input_ids)
        for block in decoder.layers:
            trunk_BTD, h_BTD = h_BTD, block(h_BTD, *context)
        logits_BTV, further = decoder.lm_head(decoder.norm(h_BTD)), []
        for k, module in enumerate(self.mtp, 1):
            if self.kind == "sequential":
                h_BTD = module(h_BTD, decoder.embed_tokens(input_ids.roll(-k, 1)), *context)
            else:
                h_BTD = module.block(trunk_BTD, *context)
            further.append(decoder.lm_head(module.norm(h_BTD)))
        joined_BT = same_document(input_ids, self.end_of_text, position_ids, context[2])
        if labels is None:
            return {"logits": logits_BTV, "mtp_logits": further, "joined": joined_BT}
        return mtp_loss(logits_BTV, further, labels, self.weight, joined_BT, target=self.target) / (labels != -100).sum()


def mtp_loss(
    logits_BTV,
    mtp_logits,
    labels_BT,
    weight: float = 0.3,
    joined_BT=None,
    ignore_index: int = -100,
    target: str = "labels",
):
    """Sum over the labels of the next-token loss + weight / D * the depths' losses, in nats, float32 or better.

    target "model": at depth k and place i, cross-entropy with softmax(logits) at i + k, through which no gradient flows.
    """
    total = summed_cross_entropy(logits_BTV, labels_BT, ignore_index)
    shifted = shifted_labels(labels_BT, len(mtp_logits), joined_BT, ignore_index)
    for k, (further_BTV, shifted_BT) in enumerate(zip(mtp_logits, shifted, strict=True), 1):
        if target == "model":
            loss = cross_entropy_with(further_BTV, logits_BTV.detach().roll(-k, 1), shifted_BT != ignore_index)
        else:
            loss = summed_cross_entropy(further_BTV, shifted_BT, ignore_index)
        total = total + weight / len(mtp_logits) * loss
    return total


def cross_entropy_with(logits_BTV, teacher_BTV, counts_BT):
    """sum over the places that count of -softmax(teacher) log softmax(logits), in float32 or better."""
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    probabilities_NV = teacher_BTV.to(dtype).softmax(-1).flatten(0, -2)
    loss_N = F.cross_entropy(logits_BTV.to(dtype).flatten(0, -2), probabilities_NV, reduction="none")
    return torch.where(counts_BT.flatten(), loss_N, 0).sum()


def summed_cross_entropy(logits_BTV, labels_BT, ignore_index: int = -100):
    """sum of -log softmax(logits)[label] over the labels that count, in float32 or better."""
    logits = logits_BTV.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels_BT.flatten(), ignore_index=ignore_index, reduction="sum")


def shifted_labels(labels_BT, depth: int, joined_BT=None, ignore_index: int = -100) -> list[torch.Tensor]:
    """Labels [B, T] for depth 1 .. `depth`: at i the label of i + k, ignored unless i .. i + k all count and are joined.

    joined: bool [B, T] or [1, T], whether token i + 1 belongs to the document of token i; None: always.
    """
    ok_BT = labels_BT != ignore_index
    if joined_BT is not None:
        ok_BT = ok_BT & joined_BT
    found = []
    for _ in range(depth):
        labels_BT = torch.where(ok_BT, F.pad(labels_BT[:, 1:], (0, 1), value=ignore_index), ignore_index)
        found.append(labels_BT)
    return found


def same_document(input_ids, end_of_text: int | None = None, position_ids=None, mask_B1TT=None):
    """Bool [B, T]: whether token i + 1 belongs to the document of token i, by each sign that is given.

    end_of_text: the id between documents; position_ids [B, T] or [1, T] that restart; mask [B, 1, T, T], True: may attend.
    """
    joined_BT = torch.ones_like(input_ids, dtype=torch.bool)
    if end_of_text is not None:
        joined_BT = joined_BT & (F.pad(input_ids[:, 1:], (0, 1), value=end_of_text) != end_of_text)
    if position_ids is not None:
        joined_BT = joined_BT & (F.pad(position_ids[:, 1:], (0, 1)) == position_ids + 1)
    if mask_B1TT is not None:
        joined_BT = joined_BT & F.pad(mask_B1TT[:, 0].diagonal(-1, -2, -1), (0, 1))
    return joined_BT

"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), plainly: a router, and a loop over gated feed-forward layers.

    y_n = sum over the K experts e that token n goes to of  w[n, e] expert_e(x_n)  (+ shared(x_n))

    softmax            s = softmax(W x);  the K largest;  w = s, or s / sum of the chosen s         Switch, Mixtral
    softmax-of-top-k   the K largest of W x;  w = softmax over these                                GPT-OSS
    sigmoid            s = sigmoid(W x);  the K largest of s + bias;  w as for softmax              DeepSeek-V3, equations 13 to 16
    expert choice      s = softmax(W x);  each expert takes its C best tokens;  w = s               Zhou et al. 2022, arXiv:2202.09368

Which experts a token goes to is [N, K] indices, where index E stands for none (a token that was dropped), and [N, K] weights: what comes after, the loop, is
the same for all of these. Nothing branches on values, so that a graph of it can be captured; an expert without tokens computes on zero rows.

Shapes: B batch, T tokens, N = B T, D model, E experts, K experts a token, G groups of experts, C tokens an expert takes at most, F width of an expert.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from ftc.models.feed_forward import FeedForward
from torch import nn

GATES = ("softmax", "sigmoid", "softmax-of-top-k")


@dataclass(frozen=True)
class MoeConfig:
    """The experts of one layer and how tokens find them. Values are checked by `check`, which every layer calls with its own name."""

    num_experts: int
    top_k: int  # experts a token; with expert_choice on average
    intermediate_size: int  # F
    gate: str = "softmax"
    norm_topk_prob: bool = True  # weights of a token sum to 1 before the scaling; a softmax over the chosen does so by itself
    routed_scaling_factor: float = 1.0
    shared_intermediate_size: int = 0  # a feed-forward layer that every token goes through beside its experts; 0: none
    selection_bias: bool = False  # a buffer that shifts the choice and not the weights (DeepSeek-V3, arXiv:2412.19437, equation 16)
    groups: int = 1  # of neighbouring experts, a node each (DeepSeek-V3, section 2.1.2): experts come from the best topk_groups only,
    topk_groups: int = 1  # by the sum of a group's two best scores
    virtual_groups: int = 1  # a token takes top_k / virtual_groups in each group (upcycling: He et al. 2024, arXiv:2410.07524)
    capacity_factor: float | None = None  # an expert takes ceil(factor N K / E) tokens at most, the first ones; None: all
    expert_choice: bool = False
    weight_on_input: bool = False  # expert(w x) for w expert(x), as in Llama 4

    @property
    def active_intermediate_size(self) -> int:
        """Width of all that one token goes through, K F and the shared one: of a dense layer that computes as much."""
        return self.top_k * self.intermediate_size + self.shared_intermediate_size

    def check(self, name: str) -> None:
        """ValueError that names the layer, `name`, for values that cannot be or do not go together."""

        def refuse(field: str, rule: str):
            raise ValueError(f"{name}: {field} is {getattr(self, field)!r}; {rule}")

        for field in ("num_experts", "top_k", "intermediate_size", "groups", "topk_groups", "virtual_groups"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                refuse(field, "it must be a positive whole number")
        if isinstance(self.shared_intermediate_size, bool) or not isinstance(self.shared_intermediate_size, int) or self.shared_intermediate_size < 0:
            refuse("shared_intermediate_size", "it must be a whole number, 0 for no shared expert")
        if self.gate not in GATES:
            refuse("gate", f"valid: {', '.join(GATES)}")
        if self.top_k > self.num_experts:
            refuse("top_k", f"a token has at most num_experts = {self.num_experts}")
        for field in ("groups", "virtual_groups"):
            if self.num_experts % getattr(self, field):
                refuse(field, f"num_experts {self.num_experts} must be a multiple of it")
        if self.groups > 1 and self.virtual_groups > 1:
            refuse("virtual_groups", f"it cannot be limited to {self.topk_groups} of groups = {self.groups} too; make one of them 1")
        if self.topk_groups > self.groups:
            refuse("topk_groups", f"there are only groups = {self.groups}")
        reachable = self.num_experts // self.groups * self.topk_groups
        if self.top_k > reachable:
            refuse("top_k", f"{self.topk_groups} of {self.groups} groups hold {reachable} experts")
        if self.top_k % self.virtual_groups:
            refuse("top_k", f"each of virtual_groups = {self.virtual_groups} gives the same number, so it must be a multiple")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            refuse("capacity_factor", "it must be above 0, or None for no limit")
        if self.expert_choice:
            self._check_expert_choice(refuse)

    def _check_expert_choice(self, refuse) -> None:
        if self.gate == "softmax-of-top-k":
            refuse("gate", "with expert_choice no token chooses a top k; valid: softmax, sigmoid")
        for field, off in (("norm_topk_prob", False), ("selection_bias", False), ("groups", 1), ("virtual_groups", 1)):
            if getattr(self, field) != off:
                refuse(field, f"with expert_choice it must be {off}")
        if Fraction(str(self.capacity_factor or 1)) * self.top_k > self.num_experts:
            refuse("capacity_factor", f"times top_k {self.top_k} it is above num_experts {self.num_experts}: more tokens an expert than there are")

    def capacity(self, num_tokens: int, name: str) -> int:
        """C for N tokens. ValueError that names the layer where an expert's share, before it is rounded up, is below one token.

        The factor is taken as the decimal that it is written as: 1.1 * 10 tokens are 11, where floats give 11.000000000000002 and so 12.
        """
        factor = Fraction(str(1 if self.capacity_factor is None else self.capacity_factor))
        share, of = num_tokens * self.top_k * factor.numerator, self.num_experts * factor.denominator
        if share < of:
            raise ValueError(
                f"{name}: capacity_factor {factor} gives each of {self.num_experts} experts less than one of {num_tokens} tokens "
                f"(top_k {self.top_k}); give more tokens at a time, a larger factor, or None for no limit"
            )
        return -(-share // of)


class Router(nn.Module):
    """Which experts each token goes to, and with what weight. Computes in float32 or better, whatever the weight's dtype.

    `e_score_correction_bias` is the selection bias, no parameter: the training loop moves it against the load, by a fixed step and not by a gradient.
    """

    def __init__(self, hidden_size: int, config: MoeConfig, name: str = "moe"):
        super().__init__()
        self.config, self.name = config, name
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        if config.selection_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_ND):
        """Indices [N, K], int64, E for none; weights [N, K] in float32 or better, 0 for none. With expert choice K is E."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype))
        if self.config.expert_choice:
            return self.chosen_by_experts(logits_NE)
        indices_NK, weights_NK = self.chosen_by_tokens(logits_NE)
        if self.config.capacity_factor is None:
            return indices_NK, weights_NK
        return within_capacity(indices_NK, weights_NK, self.config.num_experts, self.config.capacity(x_ND.shape[0], self.name))

    def scores(self, logits_NE):
        """[N, E], what tokens choose by, but for the selection bias."""
        if self.config.gate == "sigmoid":
            return logits_NE.sigmoid()
        return logits_NE.softmax(-1) if self.config.gate == "softmax" else logits_NE

    def chosen_by_tokens(self, logits_NE):
        config, scores_NE = self.config, self.scores(logits_NE)
        choice_NE = scores_NE + self.e_score_correction_bias.to(scores_NE.dtype) if config.selection_bias else scores_NE
        if config.groups > 1:
            choice_NE = within_best_groups(choice_NE, config.groups, config.topk_groups)
        indices_NK = top_k_in_each_group(choice_NE, config.top_k, config.virtual_groups)
        weights_NK = scores_NE.gather(1, indices_NK)
        if config.gate == "softmax-of-top-k":
            weights_NK = weights_NK.softmax(-1)
        elif config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        return indices_NK, weights_NK * config.routed_scaling_factor

    def chosen_by_experts(self, logits_NE):
        """Zhou et al. 2022, equation 1. Every expert has the same load, and a token any number of experts, none included. Not causal:
        whether an expert takes a token depends on all tokens of the batch, later ones too, so such a model cannot be asked token by token."""
        scores_NE, config = self.scores(logits_NE), self.config
        best_CE = scores_NE.topk(config.capacity(logits_NE.shape[0], self.name), dim=0).indices
        taken_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(0, best_CE, True)
        expert_E = torch.arange(config.num_experts, device=scores_NE.device)
        return torch.where(taken_NE, expert_E, config.num_experts), torch.where(taken_NE, scores_NE, 0) * config.routed_scaling_factor


def within_best_groups(choice_NE, groups: int, topk_groups: int):
    """The scores, -inf outside each token's best `topk_groups` groups of neighbouring experts, by the sum of a group's two best."""
    choice_NGE = choice_NE.unflatten(-1, (groups, -1))
    best_NG = choice_NGE.topk(min(2, choice_NGE.shape[-1]), dim=-1).values.sum(-1)
    kept_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter(1, best_NG.topk(topk_groups, dim=-1).indices, True)
    return choice_NGE.masked_fill(~kept_NG[..., None], -math.inf).flatten(-2)


def top_k_in_each_group(choice_NE, top_k: int, groups: int):
    """Indices [N, K] of the best K / G experts in each of G groups of neighbours, group by group, the best first."""
    if groups == 1:
        return choice_NE.topk(top_k, dim=-1).indices
    choice_NGE = choice_NE.unflatten(-1, (groups, -1))
    first_G1 = torch.arange(groups, device=choice_NE.device)[:, None] * choice_NGE.shape[-1]
    return (choice_NGE.topk(top_k // groups, dim=-1).indices + first_G1).flatten(-2)


def within_capacity(indices_NK, weights_NK, num_experts: int, capacity: int):
    """Indices and weights, E and 0 where an expert already has `capacity` slots of earlier tokens (Switch: Fedus et al. 2021, section 2.2;
    GShard: Lepikhin et al. 2020, algorithm 1). Causal in the order of the batch, but for the capacity itself."""
    slots_SE = indices_NK.flatten()[:, None] == torch.arange(num_experts, device=indices_NK.device)  # S = N K, token by token
    place_NK = (slots_SE.cumsum(0) * slots_SE).sum(-1).view_as(indices_NK)  # 1 for an expert's first
    kept_NK = place_NK <= capacity
    return torch.where(kept_NK, indices_NK, num_experts), torch.where(kept_NK, weights_NK, 0)


class MixtureOfExperts(nn.Module):
    """Router, experts and, where the config has one, a shared expert: [B, T, D] to [B, T, D], in the dtype of x.

    `name` is the layer's in errors. ValueError for a config that cannot be, and at a forward pass of too few tokens for the capacity.
    """

    def __init__(self, hidden_size: int, config: MoeConfig, name: str = "moe"):
        super().__init__()
        config.check(name)
        self.config, self.name = config, name
        self.gate = Router(hidden_size, config, name)
        self.experts = nn.ModuleList(FeedForward(hidden_size, config.intermediate_size) for _ in range(config.num_experts))
        self.shared_experts = FeedForward(hidden_size, config.shared_intermediate_size) if config.shared_intermediate_size else None

    def forward(self, x_BTD):
        x_ND = x_BTD.flatten(0, -2)
        out_BTD = self.routed(x_ND, *self.gate(x_ND)).view_as(x_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(x_BTD)

    def routed(self, x_ND, indices_NK, weights_NK):
        """Each expert on its tokens, weighed and summed in the weights' dtype, [N, D] in that of x; zeros for a token without expert."""
        out_ND = torch.zeros_like(x_ND, dtype=weights_NK.dtype)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices_NK == number)
            weight = weights_NK[token, slot, None]
            if self.config.weight_on_input:
                rows = expert((x_ND[token] * weight).to(x_ND.dtype)).to(out_ND.dtype)
            else:
                rows = expert(x_ND[token]) * weight
            out_ND = out_ND.index_add(0, token, rows)
        return out_ND.to(x_ND.dtype)


def check_routers(model: nn.Module, *args, **kwargs) -> None:
    """Run `model` once without gradients. ValueError that names the first layer whose router gives a weight that is not finite.

    For a training loop to call when its loss is not finite: the layer itself cannot look, since a graph of it must not branch on values.
    """

    def look(router: Router, _, output):
        bad_N = ~output[1].isfinite().all(-1)
        if bad_N.any():
            parameter = "finite" if router.weight.isfinite().all() else "not finite either"
            raise ValueError(
                f"{router.name}: the router gives weights that are not finite for {int(bad_N.sum())} of {len(bad_N)} tokens; its parameters are {parameter}"
            )

    hooks = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, Router)]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()

"""Which tokens of packed documents may see each other, from positions that start at 0 with each document."""

import torch
from torch import Tensor


def document_mask(position_ids_BT: Tensor) -> Tensor:
    """Bool [B, 1, T, T]: a query may attend to keys of its own document that do not come after it."""
    document_BT = (position_ids_BT == 0).cumsum(-1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(same_BTT.shape[-2:], dtype=torch.bool, device=same_BTT.device).tril()
    return (same_BTT & causal_TT)[:, None]

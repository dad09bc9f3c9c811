"""Kernels behind the ftc:: operators, each tested against its operator's definition; nothing here is imported before it is used."""

import importlib.util
from functools import cache

from torch import Tensor

# More queries a sequence than this go to the operators' other paths: a tile's rows are heads x queries, and past some 64 rows prefill's
# expanded form does less work.
MOST_QUERIES = 8


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def decodes(query: Tensor) -> bool:
    """Whether query [B, H, T, K] is a decode step for the Triton kernels: few tokens, on CUDA, with Triton there."""
    return query.is_cuda and query.shape[2] <= MOST_QUERIES and has_triton()

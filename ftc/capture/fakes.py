"""Fake kernels that torch has too narrow: where the real CPU kernel takes more than the fake one admits."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WiderFakes(TorchDispatchMode):
    """Below the tracer and above the fake mode: grouped products in dtypes other than bfloat16.

    The real CPU kernel of `aten._grouped_mm` takes float32 (seen on torch 2.13); its fake one asserts bfloat16. Sizes and
    strides do not depend on the dtype, so they are taken from the bfloat16 call.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            dtype = kwargs.get("out_dtype") or args[0].dtype
            narrow = [a.to(torch.bfloat16) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            rest = {k: v for k, v in kwargs.items() if k != "out_dtype"}
            return func(*narrow, **rest).to(dtype)
        return func(*args, **kwargs)

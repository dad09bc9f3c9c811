"""The one torch.library namespace "ftc", and the decorator that puts a plain PyTorch function into it."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("ftc", "FRAGMENT")


def composite(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the definition of `ftc::schema`, CompositeImplicitAutograd."""

    def register(function: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
        return function

    return register

"""Capturing for a program of which this process holds some stages: what others hold is known by its shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WholeShell:
    """The whole shell as capture wants to see it, where a stage holds a part of it in memory: what other stages hold is known by its shape."""

    def __init__(self, body):
        self.body, self.program = body, body.program
        self.ftc_name, self.divided, self.compute_dtype = self.program.ftc_name, self.program.divided, self.program.compute_dtype
        self.training = self.program.training

    def __getattr__(self, name: str):
        return getattr(self.program, name)  # modes, dtypes and sizes are the program's

    def fetch(self, name: str) -> Tensor:
        return self.body.fetch(name)

    def named_attributes(self) -> Iterator[tuple[str, Tensor]]:
        device = self._prepare()
        for name, tensor in self.program.named_attributes():
            held = self.body.fetch(name) if self.body.holds(name) else tensor
            yield name, held if isinstance(held, nn.Parameter) or held.device == device else held.to(device)

    def _prepare(self) -> torch.device:
        """The device of this stage; regions of other stages are captured for it too, as nothing of them is here."""
        standing = [t.device for t in (*self.body.parameters(), *self.body.buffers()) if t.device.type != "meta"]
        device = self.stands_on = standing[0] if standing else torch.device("cpu")
        for region in self.program.regions:
            if all(parameter.is_meta for parameter in region.parameters()):
                region.stands_on = device
                for module in region.modules():
                    module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None and not b.is_meta})
        return device

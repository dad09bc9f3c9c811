"""The pass that docs/passes.md shows to third parties does what the page says."""

import re
from pathlib import Path

import torch
from torch import nn

import ftc
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = self.linear(x)
        return x + (y + y) * 0.5


def test_the_pass_of_the_page_matches_and_is_proved():
    page = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
    code = re.search(r"    from dataclasses import dataclass\n.*?return outcome\n", page, re.S)[0]
    namespace = {"__name__": "page"}
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), namespace)
    program = ftc.capture(nn.Sequential(Block(), Block()), (torch.randn(2, 5, 6),))
    entry = apply_request(program, Request(namespace["DropDoubling"](), "all"))
    assert entry["matches"] == 2 and entry["max_gradient_error"] <= 1e-12
    assert "mul" not in program.regions[0].graph_code()

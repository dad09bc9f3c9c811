"""How much of a transfer inside regions a pair of DualPipeV hides under the compute of the other microbatch, on one device.

    python benchmarks/dualpipe_overlap.py [--width 8192] [--tokens 4096] [--layers 8] [--microbatches 16] [--units 1]

One rank runs DualPipeV over two stages, so that all but the first microbatches run in pairs. Each region's middle makes a journey of its own
(`ftc::synthetic_exchange`: copies to the host and back on a GPU, milliseconds in a thread on a CPU). Three steps are timed in turn, the least of `--rounds`: without the
journeys, with them and pairs one after the other, and with them and pairs interleaved. hidden = share of the journeys' time that interleaving takes away.
On a CPU the caller waits for the journey itself, so that there is nothing to hide it under: the number is of use on a GPU alone.

Half of the journeys is the most that taking regions in turn can hide here: the kernels of both microbatches share the processors, so both come to
their next journey at about the same time, and one of the two is on the link while neither computes. H200, torch 2.11, 16 microbatches: 24% of the time.
"""

import argparse
import os
import tempfile
import time

import torch
import torch.distributed as dist
from measure import finish
from torch import nn

import ftc
import ftc.pipeline.synthetic_exchange  # noqa: F401  (registers the operator)
from ftc.pipeline import cut
from ftc.pipeline.runtime import PipelineStage, schedule_from


class Block(nn.Module):
    """x + W_2 silu(exchange(W_1 x))."""

    def __init__(self, width: int, units: int):
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(width), nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.units = units

    def forward(self, x_BTD):
        middle = torch.ops.ftc.synthetic_exchange(self.norm(x_BTD), self.units) if self.units else self.norm(x_BTD)
        return x_BTD + self.second(nn.functional.silu(self.first(middle)))


class Model(nn.Module):
    def __init__(self, width: int, layers: int, units: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Block(width, units) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, input_ids):
        x_BTD = self.embed(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


def schedule_of(options: argparse.Namespace, units: int, interleave: bool, device: torch.device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = Model(options.width, options.layers, units).to(dtype).train()
    ids = torch.zeros(2, 16, dtype=torch.int64, device=device)
    program = ftc.capture(model, {"input_ids": ids})
    parts = cut(program, (options.layers // 2,))
    stages = [PipelineStage(part, index, 2, device) for index, part in enumerate(parts)]

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return schedule_from("DualPipeV", stages, options.microbatches, loss, interleave=interleave)


def seconds(schedule, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    schedule.step(input_ids=ids, target=ids, return_outputs=False)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("width", 8192), ("tokens", 4096), ("layers", 8), ("microbatches", 16), ("units", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    parser.add_argument("--json-out")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        ids = torch.randint(256, (2 * options.microbatches, options.tokens // 2), device=device)
        ways = {"no journeys": (0, True), "one after the other": (options.units, False), "interleaved": (options.units, True)}
        schedules = {name: schedule_of(options, units, interleave, device) for name, (units, interleave) in ways.items()}
        for schedule in schedules.values():
            seconds(schedule, ids)
        gradients = {name: [p.grad.clone() for stage in s._stages for p in stage.submod.parameters()] for name, s in schedules.items()}
        same = all(torch.equal(a, b) for a, b in zip(gradients["one after the other"], gradients["interleaved"], strict=True))
        taken = {name: min(seconds(schedule, ids) for _ in range(options.rounds)) for name, schedule in schedules.items()}
        dist.destroy_process_group()
    hidden = (taken["one after the other"] - taken["interleaved"]) / (taken["one after the other"] - taken["no journeys"])
    rows = [(name, f"{found * 1e3:.1f} ms", "", None) for name, found in taken.items()]
    rows.append(("journeys hidden", f"{hidden:.0%}", "", None))
    rows.append(("same gradients", str(same), "True", same))
    sizes = {name: value for name, value in vars(options).items() if name not in ("check", "json_out")}
    finish("dualpipe_overlap", rows, {**sizes, "seconds": taken, "hidden": hidden, "same_gradients": same}, options.check, options.json_out)


if __name__ == "__main__":
    main()

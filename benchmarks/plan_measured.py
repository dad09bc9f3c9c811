"""The planner's simulated step time against a measured one: torch's pipeline runtime on gloo ranks, stages that sleep for what they cost.

    python benchmarks/plan_measured.py                  # 2 and 4 ranks, five schedules, even and uneven stages: about four minutes
    python benchmarks/plan_measured.py --ranks 2 --scale 0.5

A stage sleeps in its forward, its gradient of inputs and its gradient of weights; sends, receives and their order are the runtime's own. The hop latency given
to the simulation is that of a small message between two ranks, measured in the same run. Asked: within 5%.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import finish
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

sys.path.append(str(Path(__file__).resolve().parent.parent))
from ftc.plan.actions import Placement
from ftc.plan.costs import Costs
from ftc.plan.known import known
from ftc.plan.simulate import simulate

NAMES = ("1F1B", "Interleaved1F1B", "ZB1P", "ZBVZeroBubble", "DualPipeV")
ASKED = 0.05
MICROBATCHES = 8
# Seconds of F, I and W of a whole rank's share; the uneven model has one stage at 1.6x, and a dearer last one.
FORWARD, INPUT, WEIGHT = 0.024, 0.028, 0.018


class Sleeping(PipelineStage):
    """A stage whose three actions take given seconds, with a parameter so that there is something to differentiate."""

    def __init__(self, costs: Costs, index: int, count: int, placement: Placement):
        super().__init__(Scale(), index, count, torch.device("cpu"))
        self.costs = costs
        self.stage_index_to_group_rank = dict(enumerate(placement.ranks))

    def forward_one_chunk(self, *args, **kwargs):
        time.sleep(self.costs.forward[self.stage_index])
        return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, mb_index, loss=None, full_backward=True, last_backward=False):
        time.sleep(self.costs.backward_input[self.stage_index] + (self.costs.backward_weight[self.stage_index] if full_backward else 0.0))
        return super().backward_one_chunk(mb_index, loss=loss, full_backward=full_backward, last_backward=last_backward)

    def backward_weight_one_chunk(self, mb_index, last_backward=False):
        time.sleep(self.costs.backward_weight[self.stage_index])
        return super().backward_weight_one_chunk(mb_index, last_backward=last_backward)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(4, 4)

    def forward(self, x):
        return self.weight(x)


def stage_costs(count: int, ranks: int, uneven: bool, scale: float, latency: float = 0.0) -> Costs:
    factors = [1.0] * count
    if uneven:
        factors[count // 2] = 1.6
        factors[-1] = 1.25
    share = scale * ranks / count
    columns = (tuple(seconds * share * f for f in factors) for seconds in (FORWARD, INPUT, WEIGHT))
    return Costs(*columns, hop_latency=latency)


def step_seconds(rank: int, ranks: int, name: str, uneven: bool, scale: float) -> float:
    """Seconds of one step of the slowest rank."""
    schedule, placement = known(name, ranks, MICROBATCHES)
    costs = stage_costs(placement.num_stages, ranks, uneven, scale)
    stages = [Sleeping(costs, index, placement.num_stages, placement) for index in placement.stages_of(rank)]
    runtime = _PipelineScheduleRuntime(stages, MICROBATCHES, loss_fn=lambda out, target: (out - target).square().sum())
    runtime.pipeline_order = schedule
    runtime._prepare_schedule_with_comms({r: list(actions) for r, actions in schedule.items()})
    x, target = torch.randn(MICROBATCHES, 4), torch.zeros(MICROBATCHES, 4)
    first, last = 0 in placement.stages_of(rank), placement.num_stages - 1 in placement.stages_of(rank)
    taken = 0.0
    for _ in range(2):  # the first finds out shapes
        dist.barrier()
        started = time.perf_counter()
        runtime.step(*([x] if first else []), **({"target": target} if last else {}))
        taken = time.perf_counter() - started
    slowest = torch.tensor(taken)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def hop_latency(rank: int) -> float:
    """Seconds of a small message from rank 0 to rank 1, half of there and back, median."""
    message, samples = torch.zeros(4), []
    for _ in range(50):
        started = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        elif rank == 1:
            dist.recv(message, 0)
            dist.send(message, 0)
        samples.append((time.perf_counter() - started) / 2)
    dist.barrier()
    return statistics.median(samples)


def one_rank(rank: int, ranks: int, port: int, rounds: int, scale: float, path: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    latency = hop_latency(rank)
    found = {}
    cases = [(name, uneven) for name in NAMES for uneven in (False, True)]
    for _ in range(rounds):
        for name, uneven in cases:
            found.setdefault((name, uneven), []).append(step_seconds(rank, ranks, name, uneven, scale))
            if rank == 0:
                print(f"{ranks} ranks, {name}{', uneven' if uneven else ''}: {found[name, uneven][-1]:.4f} s", file=sys.stderr, flush=True)
    if rank == 0:
        torch.save({"latency": latency, "cases": {f"{name}|{uneven}": times for (name, uneven), times in found.items()}}, path)
    dist.destroy_process_group()


def measure_ranks(ranks: int, rounds: int, scale: float) -> tuple[list, dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found.pt")
        mp.spawn(one_rank, (ranks, port, rounds, scale, path), nprocs=ranks)
        found = torch.load(path, weights_only=True)
    rows, results = [], []
    for key, times in found["cases"].items():
        name, uneven = key.split("|")[0], key.endswith("True")
        schedule, placement = known(name, ranks, MICROBATCHES)
        costs = stage_costs(placement.num_stages, ranks, uneven, scale, found["latency"])
        predicted = simulate(schedule, costs, placement, "torch").step_seconds
        apart = statistics.median(times) / predicted - 1
        said = f"{apart:+.1%} ({min(times) / predicted - 1:+.1%} to {max(times) / predicted - 1:+.1%}); {predicted:.3f} s predicted"
        rows.append((f"{ranks} ranks, {name}, {'uneven' if uneven else 'even'} stages", said, f"within {ASKED:.0%}", abs(apart) <= ASKED))
        results.append({"ranks": ranks, "schedule": name, "uneven": uneven, "predicted_s": predicted, "measured_s": times, "apart": apart})
    return rows, {"latency_s": found["latency"], "cases": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=2.0, help="times the seconds that stages sleep")
    parser.add_argument("--json-out")
    args = parser.parse_args()
    rows, found = [], {}
    for ranks in args.ranks:
        more, found[str(ranks)] = measure_ranks(ranks, args.rounds, args.scale)
        rows += more
    finish("plan_measured", rows, {"asked": ASKED, "microbatches": MICROBATCHES, "ranks": found}, json_out=args.json_out)


if __name__ == "__main__":
    main()

"""The losses under FSDP2 on two gloo ranks give the gradients of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
RANKS = 2
CASES = ["mtp", "next-token", "chunk-cross-entropy", "kl"]


def build(case: str):
    """The model and objective of a case; the same on every rank."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    import ftc
    from ftc.train.losses import parse_loss
    from ftc.train.objective import Objective

    torch.manual_seed(0)
    model = Decoder(preset("tiny", vocab_size=64))
    teacher = Decoder(preset("tiny", vocab_size=64)) if case == "kl" else None
    example = {"input_ids": batch()[0], "labels": batch()[1]}
    program = ftc.rewrite(model, ["add-mtp"] if case == "mtp" else ["raise-norm"], example=example, check=False)
    return Trained(program, Objective(parse_loss(case), teacher)), parse_loss(case)


class Trained(torch.nn.Module):
    """As the adapter's model: what the loss takes comes out of forward, so that FSDP's hooks surround it."""

    def __init__(self, body, objective):
        super().__init__()
        self.body, self.objective = body, objective

    def forward(self, tokens, labels):
        return self.objective.outputs(self.body, tokens, labels)


def batch():
    ids = torch.randint(64, (4, 13), generator=torch.Generator().manual_seed(7))
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100  # ranks hold different numbers of labels
    return ids[:, :-1].contiguous(), labels


def gradients(trained, tokens, labels, total) -> dict[str, torch.Tensor]:
    loss = trained.objective(trained(tokens, labels), labels) / total
    loss.backward()
    found = {}
    for name, parameter in trained.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def worker() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (RANKS,)), dist.get_rank()
    tokens, labels = batch()
    total = (labels != -100).sum()
    for case in CASES:
        alone, _ = build(case)
        expected = gradients(alone, tokens, labels, total)
        sharded, _ = build(case)
        for region in sharded.body.regions:
            fully_shard(region, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)  # the loss is divided by the labels of all ranks already
        part = slice(rank * 2, rank * 2 + 2)
        found = gradients(sharded, tokens[part], labels[part], total)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name, c=case: f"{c} {n}: {m}")
    dist.destroy_process_group()
    print(f"rank {rank}: {len(CASES)} cases agree")


def test_two_ranks_give_the_gradients_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve())]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(RANKS)
    ]
    for rank, process in enumerate(ranks):
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output[-3000:]
        assert f"rank {rank}: {len(CASES)} cases agree" in output


if __name__ == "__main__":
    from ftc.train.processes import end_process

    worker()
    end_process(0)

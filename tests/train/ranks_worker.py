"""One rank of the runs that test_parallel compares: started once, it trains one configuration after another.

    python ranks_worker.py RANK WORK_FOLDER

WORK_FOLDER/jobs.json holds [{"name", "ranks", "arguments", "port"}]; the first rank writes NAME.pt with the losses of two
steps and every gradient, whole, of the second.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def whole_gradients(model) -> dict[str, torch.Tensor]:
    """Every gradient, whole, by the names that the parameters have on one process."""
    from ftc.parallel.weights import whole_tensors
    from ftc.train.division import without_division

    held = {name: p.grad for name, p in model.body.named_parameters()}
    whole = {name: g.detach().clone() for name, g in whole_tensors(model.body, held)}
    return without_division(model.body, whole, model.lenses_kept)


def train_two_steps(job, rank: int, work: Path) -> None:
    from ftc.train.loop import running
    from ftc.train.trainer import load_config

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    os.environ |= {"LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    config = load_config([*job["arguments"], f"--job.dump_folder={work / job['name']}"])
    with running(config) as trainer:
        gradients, losses = {}, []
        trainer.optimizers.optimizers[0].register_step_pre_hook(
            lambda *_: gradients.update(whole_gradients(trainer.model_parts[0]))
        )
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.metrics_processor.log = lambda step, loss, *args, **kwargs: losses.append(loss)
        for trainer.step in (1, 2):
            trainer.train_step(batches)
        if rank == 0:
            torch.save({"losses": losses, "gradients": gradients}, work / f"{job['name']}.pt")
        dist.barrier()


def main() -> None:
    rank, work = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for job in json.loads((work / "jobs.json").read_text()):
        if rank < job["ranks"]:
            train_two_steps(job, rank, work)


if __name__ == "__main__":
    main()

"""One rank of the runs that test_parallel compares: started once, it trains one configuration after another.

    python ranks_worker.py RANK WORK_FOLDER

WORK_FOLDER/jobs.json holds [{"name", "ranks", "arguments", "steps", "after", "weights", "poison"}]; the first rank writes NAME.pt with
the losses of the steps, the windows of each, and every gradient, whole, of the last. A job with "after" goes on from the
checkpoint that the job of that name left; with "weights" the weights are written as well, as they would be saved. The weight that
"poison" names becomes infinite before the first step, and what the run says of it is written.
"""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def whole_gradients(trainer) -> dict[str, torch.Tensor]:
    """Every gradient, whole, by the names that the parameters have on one process."""
    from ftc.parallel.weights import whole_tensors
    from ftc.train.division import without_division

    if trainer.pipeline is not None:
        return gradients_of_stages(trainer)
    model = trainer.model_parts[0]
    held = {name: p.grad for name, p in model.body.named_parameters()}
    whole = {name: g.detach().clone() for name, g in whole_tensors(model.body, held)}
    return without_division(model.body, whole, model.lenses_kept)


def gradients_of_stages(trainer) -> dict[str, torch.Tensor]:
    """The same where stages of a pipeline hold the parameters. What several hold has the same gradient on each."""
    from ftc.parallel.weights import whole_tensors
    from ftc.train.division import without_division

    model, found = trainer.pipeline.cut.model, {}
    held = {name: p.grad for part in trainer.model_parts for name, p in part.body.named_parameters() if p.grad is not None}
    own = {name: g.detach().clone() for name, g in whole_tensors(model.body, held)}
    for theirs in trainer.pipeline.told(own):
        for name, gradient in theirs.items():
            assert name not in found or torch.equal(found[name], gradient), name
            found[name] = gradient
    return without_division(model.body, found, model.lenses_kept)


def windows_of_all(batches, ranks: int) -> list:
    """The windows of a step on all ranks, in no order: inputs, labels and positions of each."""
    rows = []
    for inputs, labels in batches:
        columns = [labels, *(inputs[name] for name in sorted(inputs))]
        rows += [[column[row].tolist() for column in columns] for row in range(len(labels))]
    gathered = [None] * ranks
    dist.all_gather_object(gathered, rows)
    return sorted(row for part in gathered for row in part)


def port_of(job, rank: int, work: Path) -> str:
    """A port that is free now: chosen by the first rank as the job begins, not before, as others come to use it meanwhile."""
    place = work / f"{job['name']}.port"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (work / "chosen").write_text(str(probe.getsockname()[1]))
        (work / "chosen").rename(place)
    while not place.is_file():
        time.sleep(0.01)
    return place.read_text()


@torch.no_grad()
def poisoned(trainer, name: str) -> str:
    """What a step says after a weight was made infinite; whole, and on the rank that has it."""
    from ftc.errors import FtcFailure

    for part in trainer.model_parts:
        for found, parameter in part.body.named_parameters():
            if found == name:
                parameter.fill_(float("inf"))
    try:
        with torch.enable_grad():
            trainer.step = 1
            trainer.train_step(trainer.batch_generator(trainer.dataloader))
    except FtcFailure as error:
        return str(error)
    return "nothing"


def train_steps(job, rank: int, work: Path) -> None:
    from ftc.train.loop import running
    from ftc.train.trainer import load_config

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    os.environ |= {"LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port_of(job, rank, work)}
    if job["after"] and rank == 0:
        shutil.copytree(work / job["after"], work / job["name"])
    config = load_config([*job["arguments"], f"--job.dump_folder={work / job['name']}"])
    with running(config) as trainer:
        gradients, losses, windows, given = {}, [], [], []
        trainer.optimizers.optimizers[0].register_step_pre_hook(
            lambda *_: gradients.update(whole_gradients(trainer))
        )
        if config.checkpoint.enable:
            trainer.checkpointer.load()
        first = trainer.step + 1
        if job["poison"]:
            torch.save({"said": poisoned(trainer, job["poison"])}, work / f"{job['name']}.pt") if rank == 0 else poisoned(trainer, job["poison"])
            return

        def batches():
            for batch in trainer.batch_generator(trainer.dataloader):
                given.append(batch)
                yield batch

        iterator = batches()
        trainer.metrics_processor.log = lambda step, loss, *args, **kwargs: losses.append(loss)
        for trainer.step in range(first, first + job["steps"]):
            given.clear()
            trainer.train_step(iterator)
            windows.append(windows_of_all(given, job["ranks"]))
            if config.checkpoint.enable:
                trainer.checkpointer.save(trainer.step)
        found = {"losses": losses, "gradients": gradients, "windows": windows, "tokens": trainer.num_tokens}
        found["sources"] = trainer.tokens_by_source()
        if job["weights"]:
            program = trainer.whole_program()
            found["weights"] = None if program is None else dict(program.state_dict())
        if rank == 0:
            torch.save(found, work / f"{job['name']}.pt")
        dist.barrier()


def main() -> None:
    rank, work = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for job in json.loads((work / "jobs.json").read_text()):
        if rank < job["ranks"]:
            train_steps(job, rank, work)


if __name__ == "__main__":
    from ftc.train.processes import end_process

    main()
    end_process(0)

"""`add-mtp` on the quickstart's text: what it does to the next-token loss, and how often its drafts are accepted.

    .venv/bin/python benchmarks/mtp.py [--steps 600] [--depths 0,1,2,3,4] [--seeds 0,1,2] [--runs runs/mtp_benchmark.jsonl]

Each run trains the quickstart's decoder (ftc/train/configs/quickstart.toml) from the bigram start, depth 0 being the model without modules.
"At equal time" is a run of its own whose schedule is shortened to the CPU time of depth 0. Time is CPU seconds of the training steps
on one thread, so that work beside it disturbs little. A finished run is a line of --runs and is not repeated.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import finish
from torch import Tensor, nn

import ftc
from ftc.acceptance import acceptance, costs, speed_up
from ftc.data.prepare import Prepared, prepare
from ftc.data.source_table import Source
from ftc.train.config import read_toml
from ftc.train.losses import mtp, next_token

ASKED_ACCEPTANCE, AIM_ACCEPTANCE = 0.60, 0.80
RUN_FILE = Path(__file__).parent.parent / "ftc" / "train" / "configs" / "quickstart.toml"
ACCEPTANCE_BYTES = 300_000


def train(prepared: Prepared, depth: int, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: {"curve": [[step, CPU seconds, validation nats a token]], "acceptance", ...}."""
    torch.manual_seed(seed)
    run = read_toml(RUN_FILE)
    body = build(run, prepared)
    if depth:
        ids_BT = torch.zeros(2, 12, dtype=torch.long)
        wanted = {"depth": depth, "end_of_text": prepared.tokenizer.eos_id}
        wanted |= {name: getattr(options, name) for name in ("weight", "init", "target")}
        body = ftc.rewrite(body, [("add-mtp", wanted)], example={"input_ids": ids_BT, "labels": ids_BT})
    optimizer, scheduler = optimisation(body, run, steps)
    batches, clock, curve = iter(loader(prepared, run, seed)), 0.0, []
    for step in range(1, steps + 1):
        tokens_BT, labels_BT = next(batches)
        started = time.process_time()
        body.train()
        outputs = body.with_extras(input_ids=tokens_BT, labels=labels_BT)[1] if depth else body(input_ids=tokens_BT)
        loss = (mtp if depth else next_token)(outputs, labels_BT) / labels_BT.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(body.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        clock += time.process_time() - started
        if step % options.eval_every == 0 or step == steps:
            curve.append([step, clock, validation_nats(body, prepared)])
            print(f"depth {depth}, seed {seed}: step {step}/{steps}, {clock:.0f} s, {curve[-1][2]:.4f} nats", flush=True)
    tokens = run["training"]["local_batch_size"] * run["training"]["seq_len"]
    return {"curve": curve, "cpu_s": clock, "tokens_per_step": tokens, **(drafts(body, prepared) if depth else {})}


def build(run: dict, prepared: Prepared) -> nn.Module:
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    from ftc.train.initialization import initialize_from_bigrams

    tokenizer = prepared.tokenizer
    special = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_ids": (tokenizer.eos_id,)}
    model = Decoder(preset(run["model"]["flavor"], **(special | run["ftc"]["architecture"])))
    return initialize_from_bigrams(model, prepared.train.stream(tokenizer))


def optimisation(body: nn.Module, run: dict, steps: int) -> tuple[Any, Any]:
    """The quickstart's optimizer, and its schedule (linear warm-up and decay) over `steps`."""
    from ftc.train.optimizers import MuonAdamW, parameter_groups

    section, warmup = run["ftc"], min(run["lr_scheduler"]["warmup_steps"], max(1, steps // 5))
    groups = parameter_groups(body, run["optimizer"]["lr"], section["muon_lr"], section["embedding_lr"], run["optimizer"]["weight_decay"])
    optimizer = MuonAdamW(groups)
    factor = lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def loader(prepared: Prepared, run: dict, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    from ftc.data.mixture import mixture
    from ftc.train.dataloader import PackedDataLoader

    mixed = mixture(prepared, run["training"]["seq_len"], seed=seed)
    for inputs, labels_BT in PackedDataLoader(mixed, run["training"]["local_batch_size"]):
        yield inputs["input"], labels_BT


@torch.no_grad()
def validation_nats(body: nn.Module, prepared: Prepared, num_windows: int = 64, length: int = 256) -> float:
    """Nats a token on the first windows of the held-out text."""
    body.eval()
    stream = torch.from_numpy(prepared.validation.stream(prepared.tokenizer)[: num_windows * length + 1]).long()
    nats = sum(
        float(next_token(body(input_ids=stream[:-1].view(-1, length)[i : i + 16]), stream[1:].view(-1, length)[i : i + 16]))
        for i in range(0, num_windows, 16)
    )
    return nats / (num_windows * length)


def drafts(body: nn.Module, prepared: Prepared) -> dict[str, Any]:
    """Acceptance on held-out text, costs, and whether strip-mtp gives the bits of the next-token model."""
    texts, size = [], 0
    for ids in prepared.validation.documents():
        texts.append(prepared.tokenizer.decode(ids.tolist()))
        size += len(texts[-1])
        if size > ACCEPTANCE_BYTES:
            break
    body.eval()
    measured = acceptance(body, prepared.tokenizer, {"held-out": texts})["held-out"]
    cost = costs(body)
    stripped = ftc.rewrite(body, ["strip-mtp"])
    ids_BT = torch.randint(prepared.tokenizer.vocab_size, (2, 64))
    same = torch.equal(stripped(input_ids=ids_BT), body(input_ids=ids_BT))
    return {"acceptance": measured, "costs": cost, "speed_up": speed_up(measured, cost), "strip_same_bits": same}


def steps_to(curve: list, nats: float) -> float | None:
    """The step at which a curve first reaches `nats`, interpolated; None when it does not."""
    for (before, _, high), (after, _, low) in zip(curve, curve[1:], strict=False):
        if low <= nats < high:
            return before + (after - before) * (high - nats) / (high - low)
    return float(curve[0][0]) if curve[0][2] <= nats else None


def stored(path: Path) -> dict[str, dict]:
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--depths", default="0,1,2,3,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--init", default="copy")
    parser.add_argument("--target", choices=("labels", "model"), default="model", help="what the modules learn")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--no-equal-time", action="store_true", help="leave out the runs shortened to the time of depth 0")
    parser.add_argument("--runs", type=Path, default=Path("runs/mtp_benchmark.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/mtp_benchmark_data"), help="tokenizer and tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    depths, seeds = ([int(n) for n in text.split(",")] for text in (args.depths, args.seeds))
    prepared = prepare(args.work, [Source("stdlib")], vocab_size=read_toml(RUN_FILE)["ftc"]["vocab_size"])
    args.runs.parent.mkdir(parents=True, exist_ok=True)

    def run(depth: int, seed: int, steps: int, base: int) -> dict:
        key = f"depth {depth}, seed {seed}, {steps} steps, weight {args.weight if depth else 0}, {args.init if depth else ''} {args.target if depth else ''}"
        done = stored(args.runs)
        if key not in done:
            row = {"key": key, "depth": depth, "seed": seed, "steps": steps, "base": base, **train(prepared, depth, seed, steps, args)}
            with args.runs.open("a") as file:
                file.write(json.dumps(row) + "\n")
            return row
        return done[key]

    whole = {(d, s): run(d, s, args.steps, args.steps) for s in seeds for d in sorted({0, *depths})}
    short = {}
    if not args.no_equal_time:
        for (depth, seed), row in whole.items():
            if depth:
                fitting = max(2, round(args.steps * whole[0, seed]["cpu_s"] / row["cpu_s"]))
                short[depth, seed] = run(depth, seed, fitting, args.steps)
    report(whole, short, sorted({0, *depths}), seeds, args)


def report(whole: dict, short: dict, depths: list[int], seeds: list[int], args: argparse.Namespace) -> None:
    """The table, and the line of JSON."""
    base = {seed: whole[0, seed] for seed in seeds}
    final = {key: row["curve"][-1][2] for key, row in whole.items()}
    rows = [("next-token loss, without modules", _shown([final[0, s] for s in seeds]), "", None)]
    result: dict[str, Any] = {"steps": args.steps, "seeds": seeds, "weight": args.weight, "init": args.init, "target": args.target, "depths": {}}
    for depth in depths[1:]:
        mine = [whole[depth, seed] for seed in seeds]
        change = [final[depth, s] - final[0, s] for s in seeds]
        reached = [steps_to(whole[depth, s]["curve"], final[0, s]) for s in seeds]
        tokens = [None if r is None else r / args.steps for r in reached]
        took = [row["cpu_s"] / base[s]["cpu_s"] for row, s in zip(mine, seeds, strict=True)]
        accepted = [row["acceptance"]["acceptance"] for row in mine]
        rows += [
            (f"depth {depth}: loss at equal steps, against without", _shown(change, "+.4f"), "", None),
            (f"depth {depth}: tokens to its loss (1: all of them)", ", ".join("not reached" if t is None else f"{t:.2f}x" for t in tokens), "", None),
            (f"depth {depth}: time of a step", _shown(took, ".2f") + "x", "", None),
        ]
        timed = [short[depth, s]["curve"][-1][2] - final[0, s] for s in seeds if (depth, s) in short]
        if timed:
            rows.append((f"depth {depth}: loss at equal time, against without", _shown(timed, "+.4f"), "", None))
        for k in range(depth):
            share = [a[k] for a in accepted]
            asked = f"{ASKED_ACCEPTANCE:.0%} (aim {AIM_ACCEPTANCE:.0%})" if depth == 1 else ""
            met = mean(share) >= ASKED_ACCEPTANCE if depth == 1 else None
            rows.append((f"depth {depth}: acceptance {k + 1} ahead, held-out", _shown(share, ".1%"), asked, met))
        rows.append((f"depth {depth}: (1 + a) / (v + d), by drafts", "; ".join(", ".join(f"{g:.2f}x" for g in row["speed_up"]) for row in mine), "", None))
        same = all(row["strip_same_bits"] for row in mine)
        rows.append((f"depth {depth}: strip-mtp gives the same bits", "yes" if same else "no", "yes", same))
        result["depths"][depth] = {
            "loss_change": change, "tokens_to_equal_loss": tokens, "step_time": took, "loss_change_equal_time": timed,
            "acceptance": accepted, "accuracy": [row["acceptance"]["accuracy"] for row in mine],
            "chain": [row["acceptance"]["chain"] for row in mine], "costs": [row["costs"] for row in mine],
            "speed_up": [row["speed_up"] for row in mine],
        }  # fmt: skip
    result["loss"] = {seed: final[0, seed] for seed in seeds}
    finish("mtp", rows, result)


def _shown(values: list[float], form: str = ".4f") -> str:
    return format(mean(values), form) + (f" ({format(min(values), form)} to {format(max(values), form)})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

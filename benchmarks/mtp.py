"""`add-mtp` on the quickstart's text: what it does to the next-token loss, and how often its drafts are accepted.

    .venv/bin/python benchmarks/mtp.py [--only joint|draft] [--steps 600] [--draft-steps 300] [--depths 1,2,3,4] [--seeds 0,1,2]

Each run trains the quickstart's decoder (ftc/train/configs/quickstart.toml) from the bigram start, depth 0 being the model without modules.
A draft for a finished model: the modules of `add-mtp` alone are trained, with target "model", on the model of depth 0, whose own weights stay.

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
    body = build(read_toml(RUN_FILE), prepared)
    if depth:
        body = with_modules(body, prepared, depth=depth, weight=options.weight, init=options.init, target=options.target)
    curve = learn(body, prepared, f"depth {depth}, seed {seed}", seed, steps, options.eval_every, bool(depth))
    if not depth:
        import ftc.models

        ftc.models.save(body, finished_model(options, seed, steps))
    return {"curve": curve, "cpu_s": curve[-1][1], **(drafts(body, prepared) if depth else {})}


def draft(prepared: Prepared, depth: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Modules for the finished model of depth 0, trained alone: as `train`."""
    import ftc.models

    torch.manual_seed(seed)
    model = ftc.models.load(finished_model(options, seed, options.steps))
    body = with_modules(model, prepared, depth=depth, weight=1.0, init="copy", target="model")
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
    curve = learn(body, prepared, f"draft of depth {depth}, seed {seed}", seed, options.draft_steps, options.draft_steps, True)
    return {"curve": curve, "cpu_s": curve[-1][1], **drafts(body, prepared)}


def finished_model(options: argparse.Namespace, seed: int, steps: int) -> Path:
    return options.work / f"model-seed{seed}-steps{steps}"


def with_modules(model: nn.Module, prepared: Prepared, **options: Any) -> nn.Module:
    ids_BT = torch.zeros(2, 12, dtype=torch.long)
    wanted = options | {"end_of_text": prepared.tokenizer.eos_id}
    return ftc.rewrite(model, [("add-mtp", wanted)], example={"input_ids": ids_BT, "labels": ids_BT})


def learn(body: nn.Module, prepared: Prepared, name: str, seed: int, steps: int, eval_every: int, modules: bool) -> list:
    """Train in place; [[step, CPU seconds, validation nats a token], ...]."""
    run = read_toml(RUN_FILE)
    optimizer, scheduler = optimisation(body, run, steps)
    batches, clock, curve = iter(loader(prepared, run, seed)), 0.0, []
    for step in range(1, steps + 1):
        tokens_BT, labels_BT = next(batches)
        started = time.process_time()
        body.train()
        outputs = body.with_extras(input_ids=tokens_BT, labels=labels_BT)[1] if modules else body(input_ids=tokens_BT)
        loss = (mtp if modules else next_token)(outputs, labels_BT) / labels_BT.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(body.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        clock += time.process_time() - started
        if step % eval_every == 0 or step == steps:
            curve.append([step, clock, validation_nats(body, prepared)])
            print(f"{name}: step {step}/{steps}, {clock:.0f} s, {curve[-1][2]:.4f} nats", flush=True)
    return curve


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
    parser.add_argument("--only", choices=("joint", "draft"), help="modules trained with the model, or on the finished one")
    parser.add_argument("--steps", type=int, default=600, help="of the model with modules, and of that without")
    parser.add_argument("--finished-steps", type=int, default=600, help="of the model that gets a draft")
    parser.add_argument("--draft-steps", type=int, default=300, help="of its modules alone")
    parser.add_argument("--depths", default="1,2,3,4", help="of modules trained with the model")
    parser.add_argument("--draft-depths", default="1", help="of those trained alone")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--init", default="copy")
    parser.add_argument("--target", choices=("labels", "model"), default="labels", help="what modules learn with the model")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--no-equal-time", action="store_true", help="leave out the runs shortened to the time of depth 0")
    parser.add_argument("--json-out", help="write the JSON line to this file too")
    parser.add_argument("--runs", type=Path, default=Path("runs/mtp_benchmark.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/mtp_benchmark_data"), help="tokenizer and tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    depths, draft_depths, seeds = ([int(n) for n in text.split(",")] for text in (args.depths, args.draft_depths, args.seeds))
    prepared = prepare(args.work, [Source("stdlib")], vocab_size=read_toml(RUN_FILE)["ftc"]["vocab_size"])
    args.runs.parent.mkdir(parents=True, exist_ok=True)

    def run(kind: str, depth: int, seed: int, steps: int, saved: bool = False) -> dict:
        """A row of --runs, from there or from a run now; with `saved` its model must be there as well."""
        how = f", weight {args.weight}, {args.init} {args.target}" if kind == "joint" and depth else ""
        key = f"{kind}, depth {depth}, seed {seed}, {steps} steps{how}"
        done = stored(args.runs)
        if key not in done or (saved and not finished_model(args, seed, steps).is_dir()):
            row = (draft(prepared, depth, seed, args) if kind == "draft" else train(prepared, depth, seed, steps, args)) | {"key": key}
            with args.runs.open("a") as file:
                file.write(json.dumps(row) + "\n")
            return row
        return done[key]

    rows, result = [], {"seeds": seeds}
    if args.only != "draft":
        whole = {(d, s): run("joint", d, s, args.steps) for s in seeds for d in (0, *depths)}
        short = {}
        for (depth, seed), row in whole.items() if not args.no_equal_time else ():
            if depth:
                fitting = max(2, round(args.steps * whole[0, seed]["cpu_s"] / row["cpu_s"]))
                short[depth, seed] = run("joint", depth, seed, fitting)
        report(whole, short, depths, seeds, args, rows, result)
    if args.only != "joint":
        base = {s: run("joint", 0, s, args.finished_steps, saved=True) for s in seeds}
        drafted = {(d, s): run("draft", d, s, args.draft_steps) for d in draft_depths for s in seeds}
        report_drafts(drafted, base, draft_depths, seeds, args, rows, result)
    finish("mtp", rows, result, json_out=args.json_out)


def report(
    whole: dict, short: dict, depths: list[int], seeds: list[int], args: argparse.Namespace, rows: list, result: dict
) -> None:
    """What modules trained with the model do to it, and their drafts, appended to the table and the JSON."""
    base = {seed: whole[0, seed] for seed in seeds}
    final = {key: row["curve"][-1][2] for key, row in whole.items()}
    rows.append((f"next-token loss after {args.steps} steps, without modules", _shown([final[0, s] for s in seeds]), "", None))
    joint = result["joint"] = {"steps": args.steps, "weight": args.weight, "init": args.init, "target": args.target, "depths": {}}
    joint["loss"] = {seed: final[0, seed] for seed in seeds}
    for depth in depths:
        mine = [whole[depth, seed] for seed in seeds]
        change = [final[depth, s] - final[0, s] for s in seeds]
        reached = [steps_to(whole[depth, s]["curve"], final[0, s]) for s in seeds]
        tokens = [None if r is None else r / args.steps for r in reached]
        took = [row["cpu_s"] / base[s]["cpu_s"] for row, s in zip(mine, seeds, strict=True)]
        rows += [
            (f"depth {depth}: loss at equal steps, against without", _shown(change, "+.4f"), "", None),
            (f"depth {depth}: tokens to its loss (1: all of them)", ", ".join("not reached" if t is None else f"{t:.2f}x" for t in tokens), "", None),
            (f"depth {depth}: time of a step", _shown(took, ".2f") + "x", "", None),
        ]
        timed = [short[depth, s]["curve"][-1][2] - final[0, s] for s in seeds if (depth, s) in short]
        if timed:
            rows.append((f"depth {depth}: loss at equal time, against without", _shown(timed, "+.4f"), "", None))
        found = {"loss_change": change, "tokens_to_equal_loss": tokens, "step_time": took, "loss_change_equal_time": timed}
        joint["depths"][depth] = found | drafts_of(f"depth {depth}", mine, depth, rows, asked=False)


def report_drafts(
    drafted: dict, base: dict, depths: list[int], seeds: list[int], args: argparse.Namespace, rows: list, result: dict
) -> None:
    """What modules trained alone on the finished model reach, appended to the table and the JSON."""
    found = result["draft"] = {"finished_steps": args.finished_steps, "draft_steps": args.draft_steps, "depths": {}}
    found["loss"] = {seed: base[seed]["curve"][-1][2] for seed in seeds}
    for depth in depths:
        mine = [drafted[depth, seed] for seed in seeds]
        same = all(row["curve"][-1][2] == found["loss"][s] for row, s in zip(mine, seeds, strict=True))
        took = [row["cpu_s"] / base[s]["cpu_s"] for row, s in zip(mine, seeds, strict=True)]
        name = f"draft of depth {depth} on the finished model"
        rows.append((f"{name}: its training's time, over the model's", _shown(took, ".2f") + "x", "", None))
        rows.append((f"{name}: the model's loss keeps its bits", "yes" if same else "no", "yes", same))
        found["depths"][depth] = {"time": took} | drafts_of(name, mine, depth, rows, asked=depth == 1)


def drafts_of(name: str, mine: list[dict], depth: int, rows: list, asked: bool) -> dict[str, Any]:
    """Acceptance, speed-up and strip-mtp of one depth, appended to the rows; what the JSON keeps of them."""
    for k in range(depth):
        share = [row["acceptance"]["acceptance"][k] for row in mine]
        wanted, met = (f"{ASKED_ACCEPTANCE:.0%} (aim {AIM_ACCEPTANCE:.0%})", mean(share) >= ASKED_ACCEPTANCE) if asked else ("", None)
        rows.append((f"{name}: acceptance {k + 1} ahead, held-out", _shown(share, ".1%"), wanted, met))
    gains = "; ".join(", ".join(f"{g:.2f}x" for g in row["speed_up"]) for row in mine)
    same = all(row["strip_same_bits"] for row in mine)
    rows.append((f"{name}: (1 + a) / (v + d), by number of drafts", gains, "", None))
    rows.append((f"{name}: strip-mtp gives the same bits", "yes" if same else "no", "yes", same))
    measured = {key: [row["acceptance"][key] for row in mine] for key in ("acceptance", "accuracy", "chain")}
    return measured | {"costs": [row["costs"] for row in mine], "speed_up": [row["speed_up"] for row in mine]}


def _shown(values: list[float], form: str = ".4f") -> str:
    return format(mean(values), form) + (f" ({format(min(values), form)} to {format(max(values), form)})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

"""Small models on four domains: balance of experts, specialisation, mixtures against dense models of equal active parameters, and upcycling.

    .venv/bin/python benchmarks/moe_training.py [--steps 600] [--seeds 0,1,2] [--only balance|dense|special|upcycle] [--runs FILE] [--json-out FILE]

The presets tiny-moe (8 experts, 2 a token) and tiny-moe-dense: width 128, 4 layers, 656,512 active parameters a token without the embedding. Text: english,
french, maths and python of ../shared/data/text, a vocabulary of 1,024 byte pairs, 4 windows of 128 tokens of each domain in every step; the last tenth of
each domain is held out. A run with one seed sees the same text in the same order whatever is trained. Time is CPU seconds on one thread.

Runs go to the file of --runs as they end, a line each, and are not repeated; the table is made of what is there.
"""

import argparse
import json
import math
import time
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from measure import finish
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ftc
from ftc.train.balance import ExpertBalance
from ftc.train.initialization import initialize_from_bigrams

TEXT = Path(__file__).parents[1].parent / "shared" / "data" / "text"
DOMAINS = ("english", "french", "maths", "python")
VOCABULARY, LENGTH, WINDOWS, HELD_OUT_WINDOWS = 1024, 128, 4, 64
PEAK_RATE, WARM_UP = 2e-3, 40

EXAMPLE = {"input_ids": torch.arange(24).view(2, 12)}

# name: options of the pass balance. The auxiliary runs are what the loss-free one is compared with.
BALANCE = {
    "none": {},
    "switch 0.001": {"switch": 0.001},
    "switch 0.01": {"switch": 0.01},
    "switch 0.1": {"switch": 0.1},
    "loss-free 0.001": {"loss_free": 0.001},
    "loss-free 0.01": {"loss_free": 0.01},
    "sequence 0.01": {"sequence": 0.01},
}


@cache
def tokens() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(training, held-out) ids by domain."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = {name: [json.loads(line)["text"] for line in (TEXT / f"{name}.jsonl").open()] for name in DOMAINS}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(["\n".join(documents)[:400_000] for documents in texts.values()], trainer)
    whole = {name: np.array([i for t in documents for i in [0, *tokenizer.encode(t).ids]], np.int32) for name, documents in texts.items()}
    cut = {name: len(ids) * 9 // 10 for name, ids in whole.items()}
    return {name: ids[: cut[name]] for name, ids in whole.items()}, {name: ids[cut[name] :] for name, ids in whole.items()}


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [16, 128] of a step."""
    draw = np.random.default_rng([seed, step])
    starts = {name: draw.integers(0, len(ids) - LENGTH - 1, WINDOWS) for name, ids in tokens()[0].items()}
    rows = torch.from_numpy(np.stack([tokens()[0][name][s : s + LENGTH + 1] for name in DOMAINS for s in starts[name]]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def held_out(domain: str) -> Tensor:
    """[64, 129] windows of a domain's held-out text, evenly spread."""
    ids = tokens()[1][domain]
    starts = np.linspace(0, len(ids) - LENGTH - 2, HELD_OUT_WINDOWS).astype(int)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]).astype(np.int64))


class Routing(TorchDispatchMode):
    """Counts which experts are chosen, mixture by mixture in the order of a forward pass; drops those of `without` ({mixture: experts}); with
    `random` the choice is drawn, the weights stay."""

    def __init__(self, layers: int, experts: int, without: dict[int, list[int]] | None = None, random: bool = False):
        super().__init__()
        self.random = random
        self.counts, self.layers, self.number, self.without = torch.zeros(layers, experts), layers, 0, without or {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ftc.fused_moe.default:
            layer = self.number % self.layers
            self.number += 1
            experts = args[4].shape[0]
            if self.random:
                args = (args[0], torch.rand(args[1].shape[0], experts).topk(args[1].shape[1]).indices, *args[2:])
            self.counts[layer] += torch.bincount(args[1].flatten(), minlength=experts)[:experts]
            for expert in self.without.get(layer, ()):  # its share goes to the others that the token has chosen
                gone = args[1] == expert
                weights = args[2].masked_fill(gone, 0.0)
                weights = weights * (args[2].sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-9))
                args = (args[0], args[1].masked_fill(gone, experts), weights, *args[3:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def evaluate(model: nn.Module, without: dict[int, list[int]] | None = None, random: bool = False, experts: int = 8, layers: int = 4) -> dict[str, Any]:
    """{"loss": {domain: nats a token}, "counts": {domain: [layers][experts]}} on the held-out windows."""
    loss, counts = {}, {}
    for domain in DOMAINS:
        rows = held_out(domain)
        with Routing(layers, experts, without, random) as routing:
            logits = logits_of(model(input_ids=rows[:, :-1]))
        loss[domain] = float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        counts[domain] = routing.counts.tolist()
    return {"loss": loss, "counts": counts}


def specialisation(model: nn.Module, random: bool = False) -> dict[str, Any]:
    """{"factor": {domain: most-used expert's share of tokens over chance, mean over layers}, "harm": {domain: {domain: nats}}}: what each domain loses
    without the expert of every layer that the first domain uses most beyond the others."""
    whole = evaluate(model, random=random)
    share = {d: torch.tensor(c) / torch.tensor(c).sum(1, keepdim=True) for d, c in whole["counts"].items()}
    factor = {d: float((s.max(1).values * s.shape[1]).mean()) for d, s in share.items()}
    harm = {}
    for domain in DOMAINS:
        beyond = share[domain] - sum(share[d] for d in DOMAINS if d != domain) / (len(DOMAINS) - 1)
        without = {layer: [int(expert)] for layer, expert in enumerate(beyond.argmax(1))}
        loss = evaluate(model, without, random)["loss"]
        harm[domain] = {d: loss[d] - whole["loss"][d] for d in DOMAINS}
    return {"factor": factor, "harm": harm}


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def decoder(name: str, seed: int, **sizes) -> nn.Module:
    """A fresh model that begins as a bigram table with heads that look back (ftc.train.initialization): without, half of a run is one plateau."""
    torch.manual_seed(seed)
    model = Decoder(preset(name, vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes))
    return initialize_from_bigrams(model, np.concatenate([ids[:800_000] for ids in tokens()[0].values()]))


def mixture(seed: int, options: dict[str, Any]) -> nn.Module:
    """A fresh tiny-moe, fused, with the pass balance and its options."""
    return ftc.rewrite(decoder("tiny-moe", seed), ["fuse-moe", ("balance", options)], example=EXAMPLE)


def dense(seed: int) -> nn.Module:
    return ftc.capture(decoder("tiny-moe-dense", seed), EXAMPLE)


def learn(model: nn.Module, seed: int, steps: int, first: int = 0, warm_up: int = WARM_UP, layers: int = 4) -> dict[str, Any]:
    """Train in place on steps `first` to `first + steps` of the text of a seed; what a run's line holds."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    balance, at = ExpertBalance(model), [0]
    balance.follow(optimizer, lambda: at[0])
    spent, violations = 0.0, []
    for step in range(steps):
        at[0] = step
        began = time.process_time()
        rate = PEAK_RATE * min(1.0, (step + 1) / max(1, warm_up)) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = batch(first + step, seed)
        loss = F.cross_entropy(logits_of(model(input_ids=inputs)).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.process_time() - began
        report = balance.report()
        if report:
            violations.append(report["max_violation"])
    found = {"steps": steps, "cpu_s": spent, **evaluate(model, layers=layers)}
    if violations:
        found |= {"batch_max_violation": mean(violations[-50:]), "special": specialisation(model), "special_random": specialisation(model, random=True)}
    return found


def max_violation(counts: dict[str, list]) -> float:
    """MaxVio over all held-out text: the largest load over the mean load, minus 1, mean over the layers (Wang et al. 2024, section 4)."""
    total = sum(torch.tensor(c) for c in counts.values())
    return float((total.max(1).values / total.mean(1) - 1).mean())


def dead(counts: dict[str, list]) -> int:
    return int((sum(torch.tensor(c) for c in counts.values()) == 0).sum())


class Runs:
    """Finished runs, a JSON line each."""

    def __init__(self, path: Path):
        self.path = path
        self.known = {tuple(r["key"]): r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}

    def get(self, key: tuple, make) -> dict[str, Any]:
        if key not in self.known:
            self.known[key] = {"key": list(key), **make()}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print(key, {k: v for k, v in self.known[key].items() if k in ("cpu_s", "loss")}, flush=True)
        return self.known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", choices=("balance", "dense", "special", "upcycle"))
    parser.add_argument("--balance", default=",".join(BALANCE), help="which of the ways to balance")
    parser.add_argument("--runs", type=Path, default=Path("moe_training_runs.jsonl"))
    parser.add_argument("--json-out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, seeds = Runs(options.runs), [int(seed) for seed in options.seeds.split(",")]
    parts = {"balance": balance_part, "dense": dense_part, "special": special_part, "upcycle": upcycle_part}
    rows = {name: part(runs, seeds, options) for name, part in parts.items() if options.only in (None, name)}
    table = [(f"{name}: {what}", found, asked, met) for name, part in rows.items() for what, asked, found, met in part]
    losses = {", ".join(map(str, key)): run["loss"] for key, run in runs.known.items()}
    finish("moe_training", table, {"steps": options.steps, "seeds": seeds, "losses": losses}, json_out=options.json_out)



def balanced(runs: Runs, name: str, seed: int, steps: int) -> dict[str, Any]:
    return runs.get(("moe", name, seed, steps), lambda: learn(mixture(seed, BALANCE[name]), seed, steps))


def balance_part(runs: Runs, seeds: list[int], options) -> list[tuple]:
    wanted = options.balance.split(",")
    found = {name: [balanced(runs, name, seed, options.steps) for seed in seeds] for name in wanted}
    loss = {name: [mean(run["loss"].values()) for run in per_seed] for name, per_seed in found.items()}
    rows = []
    for name, per_seed in found.items():
        said = f"loss {mean(loss[name]):.4f}, MaxVio {mean(max_violation(r['counts']) for r in per_seed):.3f}, dead {sum(dead(r['counts']) for r in per_seed)}"
        rows.append((name, "", said, None))
    best = min((name for name in wanted if name.startswith(("switch", "sequence"))), key=lambda name: mean(loss[name]), default=None)
    for name in wanted:
        if name.startswith("loss-free") and best is not None:
            difference = mean(a - b for a, b in zip(loss[name], loss[best], strict=True))
            violation, gone = mean(max_violation(r["counts"]) for r in found[name]), sum(dead(r["counts"]) for r in found[name])
            met = violation <= 0.1 and gone == 0 and difference <= 0.005
            rows.append((f"{name} against {best}", "0.1, 0, 0.005 nats", f"MaxVio {violation:.3f}, dead {gone}, {difference:+.4f} nats", met))
    return rows


def dense_part(runs: Runs, seeds: list[int], options) -> list[tuple]:
    best = "loss-free 0.001"
    moe = [balanced(runs, best, seed, options.steps) for seed in seeds]
    plain = [runs.get(("dense", seed, options.steps), lambda seed=seed: learn(dense(seed), seed, options.steps)) for seed in seeds]
    factor = mean(r["cpu_s"] for r in moe) / mean(r["cpu_s"] for r in plain)
    longer = round(options.steps * factor)
    timed = [runs.get(("dense", seed, longer), lambda seed=seed: learn(dense(seed), seed, longer)) for seed in seeds]
    rows = []
    for domain in (*DOMAINS, "mean"):

        def of(run, domain=domain):
            return mean(run["loss"].values()) if domain == "mean" else run["loss"][domain]

        difference = [of(a) - of(b) for a, b in zip(moe, plain, strict=True)]
        at_time = [of(a) - of(b) for a, b in zip(moe, timed, strict=True)]
        rows.append((f"{domain}: mixture - dense at equal tokens", "below 0", f"{mean(difference):+.4f} ({min(difference):+.4f} to {max(difference):+.4f})", max(difference) < 0))
        rows.append((f"{domain}: mixture - dense at equal time ({factor:.2f}x the steps)", "reported", f"{mean(at_time):+.4f} ({min(at_time):+.4f} to {max(at_time):+.4f})", None))
    return rows


def special_part(runs: Runs, seeds: list[int], options) -> list[tuple]:
    rows = []
    for name in options.balance.split(","):
        found = [balanced(runs, name, seed, options.steps) for seed in seeds]
        if name not in ("loss-free 0.001", "switch 0.01", "sequence 0.01"):
            continue
        judged = name == "loss-free 0.001"
        for domain in DOMAINS:
            best = mean(over_chance(run["counts"][domain]).max().item() for run in found)
            layers = mean(over_chance(run["counts"][domain]).mean().item() for run in found)
            chance = mean(run["special_random"]["factor"][domain] for run in found)
            said = f"{best:.2f}x; mean of the layers {layers:.2f}x (random router {chance:.2f}x, oracle 4x)"
            rows.append((f"{name}: most-used expert over chance, {domain}", "2x (aim 4x)", said, best >= 2 if judged else None))
        for word, asked in (("special", "3x"), ("special_random", "reported")):
            ratios = [mean(own_over_others(run[word]["harm"], domain) for domain in DOMAINS) for run in found]
            own = mean(run[word]["harm"][d][d] for run in found for d in DOMAINS)
            others = mean(run[word]["harm"][d][o] for run in found for d in DOMAINS for o in DOMAINS if o != d)
            kind = "" if word == "special" else ", random router"
            rows.append((f"{name}{kind}: harm to the own domain over that to others", asked, f"{own / others:.2f}x ({own:.4f} against {others:.4f} nats; by seed {', '.join(f'{r:.2f}' for r in ratios)})", own >= 3 * others if judged and word == "special" else None))
    return rows


def over_chance(counts: list[list[float]]) -> Tensor:
    """[layers]: the share of tokens that go to the layer's most-used expert, over k / E."""
    table = torch.tensor(counts)
    return table.max(1).values / table.sum(1) * table.shape[1]


def own_over_others(harm: dict[str, dict[str, float]], domain: str) -> float:
    return harm[domain][domain] / max(mean(harm[domain][other] for other in DOMAINS if other != domain), 1e-6)


def upcycle_part(runs: Runs, seeds: list[int], options) -> list[tuple]:
    """A dense model goes on for two thirds of --steps; a mixture made of it for a third, each with a schedule of its own that begins anew.

    "converged": width 64, 2 layers, 2,500 steps, where going on gains little, which is what upcycling is for. "early": tiny-moe-dense after --steps."""
    rest, rows = options.steps * 2 // 3, []
    ways = {"top 2 of 8": {"experts": 8, "top_k": 2}, "top 4 of 8 halves": {"experts": 8, "top_k": 4, "granularity": 2}, "top 2 of 8, drop 0.25": {"experts": 8, "top_k": 2, "drop": 0.25}}
    for kind, judged in (("converged", "top 2 of 8"), ("early", None)):
        steps, layers = (2500, 2) if kind == "converged" else (options.steps, 4)

        def go_on(seed: int, length: int, way: dict | None, kind=kind, steps=steps, layers=layers) -> dict[str, Any]:
            model = base(runs, kind, seed, steps)
            rows = held_out("english")[:4, :-1]
            program = ftc.capture(model, EXAMPLE) if way is None else ftc.rewrite(model, [("upcycle", way), "fuse-moe"], example=EXAMPLE)
            with torch.no_grad():
                error = float((logits_of(program(input_ids=rows)) - logits_of(model(input_ids=rows))).abs().max())
            return {"step0_logits": error, **learn(program, seed, length, steps, warm_up=20, layers=layers)}

        continued = [runs.get((kind, "continued", seed, rest), lambda seed=seed: go_on(seed, rest, None)) for seed in seeds]
        for name, way in ways.items() if kind == "converged" else list(ways.items())[:1]:
            upcycled = [runs.get((kind, name, seed, rest // 2), lambda seed=seed, way=way: go_on(seed, rest // 2, way)) for seed in seeds]
            difference = [mean(a["loss"].values()) - mean(b["loss"].values()) for a, b in zip(upcycled, continued, strict=True)]
            time = mean(a["cpu_s"] for a in upcycled) / mean(b["cpu_s"] for b in continued)
            exact = "drop" not in way
            error = max(a["step0_logits"] for a in upcycled)
            rows.append((f"{kind}, {name}: logits before the first step", "1e-5" if exact else "reported", f"{error:.1e}", error <= 1e-5 if exact else None))
            said = f"{mean(difference):+.4f} ({min(difference):+.4f} to {max(difference):+.4f}) nats, {time:.2f}x the time"
            rows.append((f"{kind}, {name}: {rest // 2} steps - dense continued {rest} steps", "at most 0", said, mean(difference) <= 0 if name == judged else None))
    return rows


def base(runs: Runs, kind: str, seed: int, steps: int) -> nn.Module:
    """The dense model that goes on, trained once and kept beside the runs."""
    path = runs.path.with_suffix(f".{kind}-{seed}-{steps}.pt")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 64} if kind == "converged" else {}
    model = decoder("tiny-moe-dense", seed, **small)
    if not path.exists():
        program = ftc.capture(model, EXAMPLE)
        learn(program, seed, steps, layers=len(model.layers))
        torch.save(program.original_state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


if __name__ == "__main__":
    main()

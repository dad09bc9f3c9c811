"""What the data loader takes of a training step of the quickstart: packed with document masks, tokenized on the fly, mixed.

    .venv/bin/python benchmarks/data_loading.py [--steps 40] [--rounds 5] [--threads 2]

Three loaders feed the same model and optimizer in turns: batches made beforehand (the baseline, in which loading costs nothing),
windows of text that is tokenized up front, and a mixture streamed from jsonl files and tokenized while the model trains. A
share is the time that the training loop waits for a batch over that of its step. The whole step, with the thread that
tokenizes running beside it, is compared with the baseline's too: `slower` also counts the work that no one waits for.
OpenMP's threads sleep while they wait, as in every run of `ftc train`; spinning, they keep the tokenizing thread off its core.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `ftc train` starts its processes; read as torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from measure import finish  # noqa: E402

SHARE = 0.02


def corpora(folder: Path) -> list[Any]:
    """The quickstart's text as two streamed sources of jsonl, and as it is."""
    from ftc.data.corpus import documents
    from ftc.data.source_table import Source

    texts = [document.text for document in documents("stdlib")]
    for name, part in (("a", texts[::2]), ("b", texts[1::2])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    streamed = [Source(str(folder / f"{name}.jsonl"), name=name, weight=w, streaming=True) for name, w in (("a", 2.0), ("b", 1.0))]
    return [Source("stdlib"), *streamed]


def loaders(folder: Path, batch: int, seq_len: int) -> dict[str, Any]:
    """Iterators over batches by name."""
    from ftc.train import device

    device.install()
    from ftc.data.mixture import mixture
    from ftc.data.prepare import Prepared, prepare
    from ftc.train.dataloader import PackedDataLoader

    whole, *streamed = corpora(folder)
    prepared = prepare(folder / "run", [whole, *streamed], vocab_size=1024)
    parts = {"held": prepared.sources[:1], "streamed": prepared.sources[1:]}
    made = {}
    for name, sources in parts.items():
        run = Prepared(prepared.tokenizer, prepared.tokenizer_folder, sources)
        mixed = mixture(run, seq_len, packing="documents", document_mask=True)
        made[name] = iter(PackedDataLoader(mixed, batch))
    ready = [next(made["held"]) for _ in range(8)]
    made["ready"] = (ready[index % len(ready)] for index in range(10**9))
    return made


def quickstart_step(threads: int) -> Any:
    """One training step of the quickstart's model on a batch: forward, backward, optimizer."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    from ftc.train.config import read_toml
    from ftc.train.documents_apart import packed_inputs
    from ftc.train.optimizers import MuonAdamW, parameter_groups

    torch.set_num_threads(threads)
    section = read_toml(Path(__file__).parent.parent / "ftc/train/configs/quickstart.toml")
    model = Decoder(preset("quickstart", vocab_size=section["ftc"]["vocab_size"], **section["ftc"]["architecture"]))
    optimizer = MuonAdamW(parameter_groups(model, 2e-3, 0.03, 1e-3, 0.1))

    def step(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> None:
        inputs, labels_BT = batch
        packed = packed_inputs(inputs["position_ids"], ("position_ids", "attention_mask"))
        logits_BTV = model(input_ids=inputs["input"], **packed)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, section["training"]


def run(step: Any, batches: Iterator[Any], count: int) -> tuple[list[float], list[float], float]:
    """Seconds of each step and of the wait for its batch, and CPU seconds of the process in all."""
    steps, waits, cpu = [], [], time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        step(batch)
        steps.append(time.perf_counter() - start)
        waits.append(loaded - start)
    return steps, waits, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of each loader in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    parser.add_argument("--json-out")
    args = parser.parse_args()
    names = ("ready", "held", "streamed")
    step, training = quickstart_step(args.threads)
    rounds: dict[str, list[Any]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        made = loaders(Path(folder), training["local_batch_size"], training["seq_len"])
        for name in names:
            run(step, made[name], 4)
        for index in range(args.rounds):
            for name in names if index % 2 == 0 else names[::-1]:
                rounds[name].append(run(step, made[name], args.steps))
    median = {name: [statistics.median(steps) for steps, _, _ in rounds[name]] for name in names}
    result: dict[str, Any] = {"steps": args.steps, "rounds": args.rounds, "step_s": {n: statistics.median(median[n]) for n in names}}
    rows = [("step, batches made beforehand", f"{result['step_s']['ready'] * 1e3:.1f} ms", "", None)]
    for name in ("held", "streamed"):
        shares = [wait / whole for steps, waits, _ in rounds[name] for whole, wait in zip(steps, waits, strict=True)]
        mean = [sum(waits) / sum(steps) for steps, waits, _ in rounds[name]]
        slower = [own / base - 1 for own, base in zip(median[name], median["ready"], strict=True)]
        cpu = [own[2] / base[2] - 1 for own, base in zip(rounds[name], rounds["ready"], strict=True)]
        found = {"wait_share": statistics.median(mean), "wait_share_largest": max(shares), "slower": statistics.median(slower)}
        found |= {"slower_min": min(slower), "slower_max": max(slower), "more_cpu": statistics.median(cpu)}
        result[name] = found
        rows += [
            (f"{name}: waiting, of a step", f"{found['wait_share']:.2%}", f"{SHARE:.0%}", found["wait_share"] <= SHARE),
            (f"{name}: waiting, of the worst step", f"{max(shares):.2%}", f"{SHARE:.0%}", max(shares) <= SHARE),
            (
                f"{name}: step against batches made beforehand",
                f"{found['slower']:+.2%} ({min(slower):+.2%} to {max(slower):+.2%})",
                f"{SHARE:+.0%}",
                found["slower"] <= SHARE,
            ),
            (f"{name}: CPU time against the same", f"{found['more_cpu']:+.2%}", "", None),
        ]
    finish("data_loading", rows, result, args.check, args.json_out)


if __name__ == "__main__":
    main()

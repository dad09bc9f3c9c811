"""What a step keeps between forward and backward with products in float8, against bfloat16: bytes counted by storage, nothing timed.

    .venv/bin/python benchmarks/float8_memory.py [--width 512] [--layers 4] [--tokens 256] [--json-out FILE]

A decoder with 8 query and 4 key-value heads, MLP 2.75 times the width, two sequences, eager on the CPU. The CPU's RMSNorm keeps two float32 copies of its input;
"lean" is the bfloat16 step without them, as fused norms on a GPU keep it.
"""

import argparse

import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from measure import finish

import ftc
from ftc.float8.kept_bytes import kept_bytes

ASKED = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json-out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = options.width
    sizes = {"intermediate_size": width * 11 // 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": width // 8, "num_hidden_layers": options.layers}
    model = Decoder(preset("tiny", hidden_size=width, **sizes)).bfloat16()
    ids = torch.randint(512, (2, options.tokens))

    def count(program) -> tuple[int, int]:
        """Bytes kept, and those without float32 copies of the norms' inputs (an input of a norm in bfloat16 instead)."""
        total, rows = kept_bytes(lambda: program(input_ids=ids), program.parameters())
        copies = [size for size, shape, dtype in rows if dtype == torch.float32 and len(shape) == 3 and shape[-1] == width]
        return total, total - sum(copies) + sum(copies) // 4  # two copies of 4 bytes become one of 2

    table, record = [], {}
    for before in (["raise"], ["fuse-qkv", "fuse-gate-up"]):
        plain, lean = count(ftc.rewrite(model, before, example={"input_ids": ids[:, :12]}, check=False))
        record[f"bfloat16, {before[-1]}"] = {"bytes": plain, "lean": lean}
        for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp", "fine"):
            for save in ("exact", "float8"):
                passes = [*before, ("float8", {"recipe": recipe, "save": save})]
                found, found_lean = count(ftc.rewrite(model, passes, example={"input_ids": ids[:, :12]}, check=False))
                record[f"{recipe}, {save}, {before[-1]}"] = {"bytes": found, "lean": found_lean}
                said = f"{found / plain:.3f}x of bfloat16 ({found / 2**20:.1f} of {plain / 2**20:.1f} MiB), {found_lean / lean:.3f}x of a lean step"
                table.append((f"{recipe}, save = {save}, after {before[-1]}", said, f"{ASKED}x", found <= ASKED * plain))
    finish("float8_memory", table, {"width": width, "layers": options.layers, "tokens": options.tokens, "bytes": record}, json_out=options.json_out)


if __name__ == "__main__":
    main()

"""Memory predicted without taking it: shapes on the meta device, and the program's own calls on fake tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftc.cache.paged import cached_by
from ftc.capture.program import Program, capture
from ftc.errors import FtcError
from ftc.memory.layers import FORMS, LayerCache, layers_of
from ftc.memory.simulate import simulate
from ftc.rewrite.pipeline import apply_request, rewrite
from ftc.rewrite.registry import parse_passes
from ftc.train.ledger import num_bytes

# What insert-kv-cache asks for, without raise-mlp: that one recognises by computing with whole weights, and no cache hangs on it.
RAISE = ("raise-norm", "raise-rope", "raise-attention", "raise-mla")
CONTEXT = 4096  # tokens, where neither the user nor the model says
ACTIVATIONS = ("model", "fp8", "int8")  # forms whose program can be made without looking at text


@dataclass(frozen=True)
class Plan:
    """What is asked: `batch` sequences of `context` tokens in blocks of `block_size`, prompts given `chunk` tokens a call; rank and rope go together."""

    context: int | None = None
    batch: int = 1
    block_size: int = 16
    chunk: int = 512
    rank: int | None = None
    rope: int | None = None

    def __post_init__(self):
        for name in ("context", "batch", "block_size", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FtcError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if (self.rank is None) != (self.rope is None):
            raise FtcError("--rank and --rope go together: the elements of the latent and of the key part with RoPE")

    @property
    def num_blocks(self) -> int:
        """Of all sequences; each takes whole ones."""
        return self.batch * -(-self.context // self.block_size)

    @property
    def slots(self) -> int:
        """Tokens that the blocks hold."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class Memory:
    """Bytes of a model with its cache. `activations` by form: the most that a prefill chunk and a decode step take beside weights and cache."""

    model: str
    plan: Plan
    dtype: torch.dtype
    stored: str  # the form in which the program's own cache is, "model" where it has none yet
    weight_bytes: int
    weight_bytes_latent: int | None
    layers: tuple[LayerCache, ...]
    activations: dict[str, dict[str, int]]
    positions: int | None

    def bytes_per_token(self, form: str) -> int | None:
        """Bytes of a token in all layers; layers without that form count as they are, None where no layer has it."""
        found = [layer.bytes_per_token(form, self.plan.rank, self.plan.rope) for layer in self.layers]
        if all(size is None for size in found):
            return None
        return sum(layer.bytes_per_token("model") if size is None else size for layer, size in zip(self.layers, found, strict=True))

    def cache_bytes(self, form: str) -> int | None:
        """Bytes of the blocks of all sequences."""
        size = self.bytes_per_token(form)
        return None if size is None else size * self.plan.slots

    @property
    def forms(self) -> list[str]:
        """The forms that the model can have, itself first among equals."""
        return [form for form in FORMS if self.bytes_per_token(form) is not None]

    @property
    def kinds(self) -> str:
        """What its attentions are, such as "6 x GQA"."""
        kinds = [layer.kind for layer in self.layers]
        return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))

    @property
    def windows(self) -> dict[str, int] | None:
        """Bytes that layers with a window keep, which is every block, and that they still read at the end of the context; None without such layers."""
        layers = [layer for layer in self.layers if layer.window is not None]
        if not layers:
            return None
        size = self.plan.block_size
        kept = needed = 0
        for layer in layers:
            row = layer.bytes_per_token(self.stored)
            blocks = min(-(-self.plan.context // size), math.ceil((layer.window - 1) / size) + 1)
            kept, needed = kept + row * self.plan.slots, needed + row * self.plan.batch * blocks * size
        return {"kept": kept, "needed": needed}

    @property
    def notes(self) -> list[str]:
        """Why the latent form leaves layers out, where one was asked for."""
        if self.plan.rank is None:
            return []
        reasons = [layer.site for layer in self.layers if isinstance(layer.site, str)]
        return [f"{reasons.count(why)} of {len(self.layers)} layers would not become latent: {why}" for why in dict.fromkeys(reasons)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        forms = {
            form: {"bytes_per_token": self.bytes_per_token(form), "cache_bytes": self.cache_bytes(form), "below_mha": self.below_mha(form)}
            | {"activation_bytes": self.activations.get(form)}
            for form in self.forms
        }
        layers = [
            {"region": x.region, "attention": x.kind, "heads": x.heads, "groups": x.groups, "key": x.key, "value": x.value, "latent": x.latent}
            | {"rope": x.rope, "window": x.window, "bytes_per_token": {f: x.bytes_per_token(f, self.plan.rank, self.plan.rope) for f in self.forms}}
            for x in self.layers
        ]
        plan = self.plan
        return {
            "model": self.model, "attention": self.kinds, "dtype": str(self.dtype).removeprefix("torch."), "context": plan.context, "batch": plan.batch,
            "block_size": plan.block_size, "chunk": plan.chunk, "rank": plan.rank, "rope": plan.rope, "stored": self.stored,
            "weight_bytes": self.weight_bytes, "weight_bytes_latent": self.weight_bytes_latent, "forms": forms, "windows": self.windows,
            "layers": layers, "notes": self.notes,
        }  # fmt: skip

    def below_mha(self, form: str) -> float:
        """How many times smaller than a cache of every head's own keys and values."""
        return self.bytes_per_token("mha") / self.bytes_per_token(form)


def predict(model: nn.Module, plan: Plan, name: str = "", activations: bool = True) -> Memory:
    """The memory of a module or Program, which may be on the meta device: nothing is allocated but on fake tensors.

    Raises FtcError for a model that no cache can continue, a context past its positions, and a rank or rope that it cannot have.
    """
    program, before = with_cache(model, plan)
    entry = cached_by(program)
    positions = _positions(program, entry)
    plan = _with_context(plan, positions, int(entry["options"].get("block_size", 16)))
    layers = layers_of(program, before)
    if not layers:
        raise FtcError("the model has no attention, so it keeps nothing of a text in a cache")
    stored = entry["options"].get("dtype", "model")
    if plan.rank is not None:
        for layer in layers:
            if not isinstance(layer.site, str):
                layer.site.check(layer.region, plan.rank, plan.rope)
    weights = num_bytes(weights_of(program))
    runs = {stored: simulate(program, plan)} if activations else {}
    if activations and before is not None:
        for form in ACTIVATIONS:
            if form not in runs and all(layer.bytes_per_token(form) is not None for layer in layers):
                runs[form] = simulate(cached_as(before, plan, form), plan)
    return Memory(name, plan, layers[0].dtype, stored, weights, _latent_weights(weights, layers, plan), tuple(layers), runs, positions)


def with_cache(model: nn.Module, plan: Plan, form: str = "model") -> tuple[Program, Program | None]:
    """The cached program, unproved, and the raised one that it is made from (None where `model` is cached already)."""
    if cached_by(model) is not None:
        return model.eval(), None
    model.eval()
    # On the CPU whatever the weights' device: what has no memory is traced for the CPU.
    program = model.fork() if isinstance(model, Program) else capture(model, {"input_ids": torch.ones(2, 12, dtype=torch.int64)})
    known = {entry["pass"] for entry in program._applied}
    before = rewrite(program, [(name, {"expect": "any"}) for name in RAISE if name not in known], inplace=True, check=False).eval()
    return cached_as(before, plan, form), before


def cached_as(before: Program, plan: Plan, form: str) -> Program:
    """A raised program with a cache in a form of insert-kv-cache."""
    (insert,) = parse_passes([("insert-kv-cache", {"block_size": plan.block_size, "dtype": form})])
    object.__setattr__(insert.pass_, "requires", RAISE)
    program = before.fork()
    apply_request(program, insert, check=False)
    # One token is absorbed and chunks are expanded, as absorb-mla finds it on most machines; it would measure here.
    return rewrite(program, [("absorb-mla", {"up_to": 1, "expect": "any"})], inplace=True, check=False).eval()


def weights_of(program: Program) -> list[torch.Tensor]:
    """Parameters and buffers; one that several names share is one storage."""
    return [*program.parameters(), *program.buffers()]


def _positions(program: Program, entry: dict) -> int | None:
    stated = getattr(getattr(program, "config", None), "max_position_embeddings", None), entry["options"].get("max_tokens")
    return min((n for n in stated if isinstance(n, int)), default=None)


def _with_context(plan: Plan, positions: int | None, block_size: int) -> Plan:
    context = plan.context or positions or CONTEXT
    if positions is not None and context > positions:
        raise FtcError(f"--context {context} is more than the model's {positions} positions; give at most {positions}, or stretch it with rope-scale first")
    return Plan(context, plan.batch, block_size, min(plan.chunk, context), plan.rank, plan.rope)


def _latent_weights(weights: int, layers: list[LayerCache], plan: Plan) -> int | None:
    sites = [layer for layer in layers if not isinstance(layer.site, str)]
    if plan.rank is None or not sites:
        return None
    return weights + sum(layer.dtype.itemsize * layer.site.parameters_added(plan.rank, plan.rope) for layer in sites)

"""rope-scale gives the model that transformers builds with that rope_scaling, and every way of not being able to says so."""

import copy
import json
import math

import pytest
import torch
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.rope import RopeConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.registry import classes, make
from ftc.rewrite.rope_model import longest_text
from ftc.rewrite.rope_tables import find_sites, theta_of

TRAINED, VOCABULARY = 16, 40
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TRAINED
)
OPTIONS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 6.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.3, 4.0]},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
EXAMPLE = {"input_ids": torch.arange(24).view(2, 12) % VOCABULARY}


CLASSES = {"Gemma3Text": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def huggingface(family: str, dtype: torch.dtype, kind: str | None = None, options: dict | None = None, **sizes):
    """A tiny model of a family whose weights depend on the seed alone, with rope_scaling or without."""
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | {"head_dim": 8} | sizes
    if kind is not None:
        sizes["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **options}
        if kind in ("yarn", "longrope", "llama3"):
            sizes["rope_parameters"]["original_max_position_embeddings"] = TRAINED
        if kind != "dynamic":  # whose trained length is max_position_embeddings
            sizes["max_position_embeddings"] = int(TRAINED * options["factor"])
    sizes.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    torch.manual_seed(0)
    names = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(transformers, names[0])(**sizes, pad_token_id=0, initializer_range=0.3)
    return getattr(transformers, names[1])(config).eval().to(dtype)


def ours(dtype: torch.dtype, rope: RopeConfig | None = None, **sizes) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(**(SIZES | {"head_dim": 8, "initializer_range": 0.3} | sizes), rope=rope or RopeConfig())
    return Decoder(config).eval().to(dtype)


def ids(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def scale(model, kind: str, check: bool = True, **options):
    return ftc.rewrite(model, [("rope-scale", {"type": kind, **options})], example=EXAMPLE, check=check)


@pytest.mark.parametrize(("family", "kind"), [*(("Llama", kind) for kind in OPTIONS), ("Qwen3", "yarn"), ("Qwen3", "longrope")])
def test_scaled_equals_transformers_own_scaling(family, kind):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if kind == "dynamic":
            bound = 1e-5  # transformers rounds the stretched theta to float32
        plain = huggingface(family, dtype)
        program = scale(plain, kind, check=dtype == torch.float32, **OPTIONS[kind])
        for length in (2, TRAINED, TRAINED + 1, 4 * TRAINED):  # dynamic keeps state in transformers: a fresh oracle each time
            oracle = huggingface(family, dtype, kind, OPTIONS[kind])
            wanted = logits(oracle(input_ids=ids(length)))
            assert error(logits(program(input_ids=ids(length))), wanted) <= bound
        assert error(logits(plain(input_ids=ids(length))), wanted) > 1e-2, "the scaling would not be seen"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Cohere", {}),  # interleaved pairs
        ("StableLm", {}),  # a quarter of each head is turned
        ("Phi3", {"original_max_position_embeddings": TRAINED}),  # a trained length of its own, which wins
        ("DeepseekV3", dict(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                            first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)),
    ],
)  # fmt: skip
def test_other_layouts_equal_transformers_too(family, changes):
    kind = "longrope" if family == "Phi3" else "yarn"
    dtype, bound = (torch.float32, 1e-5) if family == "DeepseekV3" else (torch.float64, 1e-12)  # its experts want float32
    plain, oracle = (huggingface(family, dtype, *scaling, **changes) for scaling in ((), (kind, OPTIONS[kind])))
    program = scale(plain, kind, check=False, **OPTIONS[kind])
    wanted = logits(oracle(input_ids=ids(50)))
    assert error(logits(program(input_ids=ids(50))), wanted) <= bound < 1e-4 < error(logits(plain(input_ids=ids(50))), wanted)
    again = type(oracle)(program.config).to(dtype).eval()  # what the program's configuration says is what it does
    again.load_state_dict(oracle.state_dict())
    assert error(logits(again(input_ids=ids(50))), wanted) <= bound


def test_layers_of_two_thetas_are_scaled_apart():
    layers = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    near, far = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e6}
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": TRAINED, **OPTIONS["yarn"]}
    plain = huggingface("Gemma3Text", torch.float32, rope_parameters={"sliding_attention": near, "full_attention": far}, **layers)
    oracle = huggingface("Gemma3Text", torch.float32, rope_parameters={"sliding_attention": near, "full_attention": yarn}, **layers)
    with pytest.raises(FtcError, match="several, 10000, 1e"):
        scale(plain, "yarn", **OPTIONS["yarn"])
    program = scale(plain, "yarn", rope_theta=1e6, **OPTIONS["yarn"])
    wanted = logits(oracle(input_ids=ids(50)))
    assert error(logits(program(input_ids=ids(50))), wanted) <= 1e-5 < 1e-4 < error(logits(plain(input_ids=ids(50))), wanted)
    assert program.config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert program.config.rope_parameters["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(("kind", "interleaved"), [*((kind, False) for kind in OPTIONS), ("dynamic", True)])
def test_scaled_equals_our_own_decoder(kind, interleaved):
    rope = RopeConfig(rope_type=kind, original_max_position_embeddings=TRAINED, **OPTIONS[kind])
    longest = TRAINED if kind == "dynamic" else 4 * TRAINED
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        program = scale(ours(dtype, rope_interleaved=interleaved), kind, **OPTIONS[kind])
        oracle = ours(dtype, rope, rope_interleaved=interleaved, max_position_embeddings=longest)
        for length in (TRAINED, 3 * TRAINED):
            assert error(program(input_ids=ids(length)), oracle(input_ids=ids(length))) <= bound
        assert program.config.rope == oracle.config.rope
        assert program.config.max_position_embeddings == longest
        assert longest_text(program) == 4 * TRAINED


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_gradients_and_given_positions_equal_our_own_decoder(kind):
    rope = RopeConfig(rope_type=kind, original_max_position_embeddings=TRAINED, **OPTIONS[kind])
    oracle = ours(torch.float64, rope, max_position_embeddings=TRAINED if kind == "dynamic" else 4 * TRAINED)
    program = scale(ours(torch.float64), kind, **OPTIONS[kind])
    positions = torch.arange(20).flip(0)[None] * 3  # a structure that the example did not have
    grads = []
    for model in (program, oracle):
        out = model(input_ids=ids(20), position_ids=positions)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(error(grads[0][name], grad) < 1e-11 for name, grad in grads[1].items())


def frequencies(kind: str, o: dict, width: int, theta: float, trained: int, length: int) -> tuple[list[float], float]:
    """The definitions of the six types once more, in Python numbers."""
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    factor = o.get("factor", 1.0)
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    if kind == "dynamic":
        stretch = factor * max(length, trained) / trained - (factor - 1)
        return [f * stretch ** (-2 * i / (width - 2)) for i, f in enumerate(plain)], 1.0
    if kind == "longrope":
        divisors = o["long_factor"] if length > trained else o["short_factor"]
        return [f / d for f, d in zip(plain, divisors, strict=True)], math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    if kind == "llama3":
        low, high, found = o["low_freq_factor"], o["high_freq_factor"], []
        for f in plain:
            turns = trained * f / (2 * math.pi)
            kept = min(max((turns - low) / (high - low), 0), 1)
            found.append((1 - kept) * f / factor + kept * f)
        return found, 1.0
    if kind == "yarn":
        ends = [width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (o.get("beta_fast", 32), o.get("beta_slow", 1))]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
        ramp = [min(max((i - low) / (high - low if high != low else 0.001), 0), 1) for i in range(width // 2)]
        return [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)], 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain, 1.0


class Rotary(nn.Module):
    """cos and sin in one of the spellings that people use, and a head that reads them."""

    def __init__(self, spelling: str, width: int, theta: float):
        super().__init__()
        self.spelling, self.width = spelling, width
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, width, 2).float() / width), persistent=False)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BT, position_ids):
        if self.spelling == "outer":
            angles = torch.outer(torch.arange(x_BT.shape[1]).float(), self.inv_freq)[None].repeat(x_BT.shape[0], 1, 1)
        elif self.spelling == "einsum":
            angles = torch.einsum("bt,f->btf", position_ids.float(), self.inv_freq)
        elif self.spelling == "matmul":
            wide = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
            angles = (wide @ position_ids[:, None, :].float()).transpose(1, 2)
        else:
            angles = self.inv_freq[None, None] * position_ids[:, :, None]
        if self.spelling == "polar":
            table = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(-2)
            return x_BT[..., None] * table * self.weight
        if self.spelling == "einsum":
            cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
        else:
            angles = torch.cat((angles, angles), -1)
            cos, sin = angles.cos() * 1.0, angles.sin() * 1.0
        return (x_BT[..., None] * cos + (2 * x_BT[..., None]) * sin.flip(-1)) * self.weight


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    spelling=st.sampled_from(["outer", "einsum", "matmul", "mul", "polar"]),
    kind=st.sampled_from(list(OPTIONS)),
    width=st.sampled_from([4, 8, 32]),
    theta=st.sampled_from([500.0, 10000.0, 1e6]),
    factor=st.floats(1.0, 16.0),
    trained=st.integers(16, 300),
    times=st.floats(0.1, 4.0),
)
def test_any_spelling_gets_the_tables_of_the_definition(spelling, kind, width, theta, factor, trained, times):
    torch.manual_seed(width)
    divisors = {name: (1 + 3 * torch.rand(width // 2)).tolist() for name in ("short_factor", "long_factor")} if kind == "longrope" else {}
    given_options = OPTIONS[kind] | divisors | {"factor": factor}
    model = Rotary(spelling, width, theta)
    example = {"x_BT": torch.randn(2, 9), "position_ids": torch.arange(9).expand(2, 9)}
    options = {"type": kind, "original_max_position_embeddings": trained, **given_options}
    program = ftc.rewrite(model, [("rope-scale", options)], example=example)
    length = max(2, round(trained * times))
    positions = torch.arange(length).expand(2, length)
    x = torch.randn(2, length)
    f, attention = frequencies(kind, given_options, width, theta, trained, length)
    oracle = Rotary(spelling, width, theta)
    oracle.inv_freq = torch.tensor(f, dtype=torch.float64)
    wanted = oracle.double()(x.double(), positions) * attention
    assert error(program(x, positions).double(), wanted) < 1e-6 * max(length, 10)  # angles in float32


def test_a_region_that_makes_its_own_tables_is_scaled_in_every_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = Rotary("mul", 8, 10000.0)
            self.linear = nn.Linear(8, 1)

        def forward(self, x_BT, position_ids):
            return x_BT + self.linear(self.rotary(x_BT, position_ids))[..., 0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x_BT, position_ids):
            for block in self.blocks:
                x_BT = block(x_BT, position_ids)
            return x_BT

    torch.manual_seed(0)
    model = Model()
    example = {"x_BT": torch.randn(2, 9), "position_ids": torch.arange(9).expand(2, 9)}
    program = ftc.rewrite(model, [("rope-scale", {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 16})], example=example)
    assert program.report.as_dict()["passes"]["rope-scale"]["matches"] == 3
    for block in model.blocks:
        block.rotary.inv_freq /= 2
    assert error(program(**example), model(**example)) < 1e-6


# ---- saved, verified, applied again


@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_a_saved_program_runs_verifies_and_is_already_scaled(kind, tmp_path):
    program = scale(huggingface("Llama", torch.float32), kind, **OPTIONS[kind])
    program.save(tmp_path / "out")
    loaded = ftc.load(tmp_path / "out")
    assert torch.equal(logits(loaded(input_ids=ids(40))), logits(program(input_ids=ids(40))))
    assert longest_text(loaded) == longest_text(program) == 4 * TRAINED
    verification = ftc.verify(tmp_path / "out")
    assert verification.ok, str(verification)
    for again in (program, loaded):
        twice = ftc.rewrite(again, [("rope-scale", {"type": kind, **OPTIONS[kind]})])
        assert twice._applied[-1]["already"] == 1 and twice._applied[-1]["matches"] == 0
        with pytest.raises(FtcError, match="scaled already"):
            ftc.rewrite(again, [("rope-scale", {"type": kind, **OPTIONS[kind], "factor": 3.0})])
        with pytest.raises(FtcError, match="scaled already"):
            ftc.rewrite(again, [("rope-scale", {"type": "linear", "factor": 3.0})])


@pytest.mark.parametrize("tamper", ["constant", "attention", "elsewhere"])
def test_verify_finds_what_was_tampered_with(tamper, monkeypatch):
    """Sabotaged passes: wrong frequencies, no attention factor, a change elsewhere. Each must fail its proof."""
    cls = classes()["rope-scale"]
    apply = cls.apply

    def sabotaged(self, graph):
        outcome = apply(self, graph)
        for node in list(graph.nodes):
            if tamper == "constant" and "constant" in node.meta:
                node.meta["constant"] = node.meta["constant"] * (1 + 1e-6)
            if tamper == "attention" and node.target is torch.ops.aten.mul.Tensor and node.args[1] not in (1, 1.0) and isinstance(node.args[1], float):
                node.args = (node.args[0], node.args[1] * (1 + 1e-9))
            if tamper == "elsewhere" and node.target is torch.ops.aten.rms_norm.default:
                node.args = (*node.args[:3], 2e-5)
        return outcome

    monkeypatch.setattr(cls, "apply", sabotaged)
    model = ours(torch.float32)
    before = model(input_ids=ids(20))
    program = ftc.capture(model, EXAMPLE)
    with pytest.raises(FtcFailure):
        ftc.rewrite(program, [("rope-scale", {"type": "yarn", **OPTIONS["yarn"]})], inplace=True)
    assert torch.equal(program(input_ids=ids(20)), before) and program.config == model.config


def test_a_changed_record_does_not_verify(tmp_path):
    scale(ours(torch.float32), "yarn", **OPTIONS["yarn"]).save(tmp_path / "out")
    path = tmp_path / "out" / "certificates.json"
    record = json.loads(path.read_text())
    record["applied"][0]["options"]["factor"] = 5.0
    path.write_text(json.dumps(record))
    rows = [row for row in ftc.verify(tmp_path / "out").rows if not row["ok"]]
    assert any(row["kind"] == "certificate" for row in rows)


# ---- what it declines


def test_default_on_an_unscaled_model_is_already_there_and_changes_no_bit():
    model = ours(torch.float32)
    program = scale(model, "default")
    assert program._applied[-1]["already"] == 1 and not program._applied[-1]["matches"]
    assert torch.equal(program(input_ids=ids(20)), model(input_ids=ids(20)))
    linear = scale(model, "linear", factor=1.0)
    assert torch.equal(linear(input_ids=ids(20)), model(input_ids=ids(20)))


def test_models_scaled_already_are_named():
    program = ftc.capture(huggingface("Llama", torch.float32, "yarn", OPTIONS["yarn"]), EXAMPLE)
    for kind in ("llama3", "yarn"):
        with pytest.raises(FtcError, match="scaled already"):
            ftc.rewrite(program, [("rope-scale", {"type": kind, **OPTIONS[kind]})])
    options = {"type": "linear", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    for kind in ("dynamic", "llama3"):  # no configuration says so, only the graph
        rope = RopeConfig(rope_type=kind, original_max_position_embeddings=TRAINED, **OPTIONS[kind])
        with pytest.raises(FtcError, match="scaled already"):
            ftc.rewrite(Wrapper(ours(torch.float32, rope)), [("rope-scale", options)], example=EXAMPLE)


class Wrapper(nn.Module):
    """A model without a configuration."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids)


def test_models_without_rope_or_with_stored_tables_are_declined():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(FtcError, match="found no site"):
        scale(gpt2, "linear", factor=2.0)

    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cosines", torch.outer(torch.arange(32).float(), torch.tensor([1.0, 0.1])).cos())
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x_BT):
            return x_BT[..., None] * self.cosines[: x_BT.shape[1]] * self.weight

    with pytest.raises(FtcError, match="cosines holds cosines of 32 positions"):
        ftc.rewrite(Stored(), [("rope-scale", {"type": "linear", "factor": 2.0})], example={"x_BT": torch.randn(2, 9)})

    class Sinusoidal(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.register_buffer("inv_freq", 1.0 / 1e4 ** (torch.arange(4).float() / 4))

        def forward(self, input_ids):
            angles = torch.arange(input_ids.shape[1])[:, None].float() * self.inv_freq
            return self.embed(input_ids) + torch.cat((angles.sin(), angles.cos()), -1)

    with pytest.raises(FtcError, match="no rotation"):
        ftc.rewrite(Sinusoidal(), [("rope-scale", {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 16})], example=EXAMPLE)


def test_divided_positions_are_a_scaling_already():
    class Divided(Rotary):
        def forward(self, x_BT, position_ids):
            return super().forward(x_BT, position_ids / 4)

    example = {"x_BT": torch.randn(2, 9), "position_ids": torch.arange(9).expand(2, 9)}
    with pytest.raises(FtcError, match="scaled already"):
        ftc.rewrite(Divided("mul", 8, 1e4), [("rope-scale", {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 16})], example=example)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"type": "lineer", "factor": 2.0}, "type"),
        ({"type": "linear"}, "needs factor"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"type": "linear", "factor": math.nan}, "factor is nan"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3.0}, "linear takes no beta_fast"),
        ({"type": "longrope", "factor": 2.0}, "needs short_factor"),
        ({"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}, "long_factor has 3 entries; the model has 4 frequencies"),
        ({"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.0, 0.0, 1.0]}, "must be a positive number"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "must be below"),
        ({"type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_theta is 500; the model's frequencies are of 10000"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "must be positive"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(FtcError, match=says.replace("(", r"\(")):
        ftc.rewrite(ours(torch.float32), [("rope-scale", options)], example=EXAMPLE)


def test_two_sets_of_frequencies_ask_which_and_the_other_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = Rotary("mul", 8, 1e4), Rotary("mul", 8, 1e6)

        def forward(self, x_BT, position_ids):
            return self.near(x_BT, position_ids) + self.far(x_BT, position_ids)

    model, example = Two(), {"x_BT": torch.randn(2, 9), "position_ids": torch.arange(9).expand(2, 9)}
    options = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 16}
    with pytest.raises(FtcError, match="several, 10000, 1e"):
        ftc.rewrite(model, [("rope-scale", options)], example=example)
    program = ftc.rewrite(model, [("rope-scale", options | {"rope_theta": 1e6})], example=example)
    wanted = copy.deepcopy(model)
    wanted.far.inv_freq /= 2
    assert error(program(**example), wanted(**example)) < 1e-6


def test_options_with_lists_can_be_written_on_the_command_line():
    from ftc.rewrite.registry import parse_passes

    (request,) = parse_passes("rope-scale{type=longrope,factor=2,short_factor=[1, 1.5],long_factor=[2,3]}")
    assert request.pass_.short_factor == (1, 1.5) and request.pass_.long_factor == (2, 3)
    assert make("rope-scale", request.options()).pass_ == request.pass_


def test_frequencies_of_a_theta_are_recognised_and_scaled_ones_are_not():
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2).float() / 64)
    assert theta_of(plain) == 5e5 and theta_of(plain.bfloat16()) == pytest.approx(5e5, rel=0.05)
    assert theta_of(plain / 2) is None and theta_of(torch.cat((plain[:16], plain[16:] / 2))) is None
    graph = ftc.capture(ours(torch.float32), EXAMPLE).code.all_variants()[0].captured.graph
    assert len(find_sites(graph)[0]) == 1

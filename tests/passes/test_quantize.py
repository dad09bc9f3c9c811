"""quantize: every product is rewritten and proved, calibrated and chosen within a budget, saved and loaded; what cannot be is declined with the reason."""

import json

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
import ftc.quantize.proof as proof
from ftc.errors import FtcError, FtcFailure
from ftc.evaluate import logits_of
from ftc.quantize.formats import Format
from ftc.quantize.lens import Quantize
from ftc.rewrite.calibration import kl_divergence
from ftc.rewrite.lens import lens_from_dict
from ftc.rewrite.pipeline import copy_graph
from ftc.rewrite.verify import verify

VOCABULARY, WIDTH, INNER = 23, 16, 20  # 20 is no multiple of a group of 8


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.gate, self.down = nn.Linear(WIDTH, INNER, bias), nn.Linear(WIDTH, INNER, bias), nn.Linear(INNER, WIDTH, bias)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Net(nn.Module):
    """Blocks that mix nothing between tokens, and a running mean before the head that does."""

    def __init__(self, blocks=3, bias=True, tied=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(bias) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x.cumsum(1) / (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(1))
EXAMPLE = {"input_ids": IDS}


def net_of(seed=0, **options):
    torch.manual_seed(seed)
    net = Net(**options)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return net.eval()


def quantized(net, calibration=None, check=True, **options):
    return ftc.rewrite(net, [("quantize", options)], example=EXAMPLE, calibration=calibration, check=check).eval()


@pytest.fixture(scope="module")
def net():
    return net_of()


FORMATS = [
    {"dtype": "fp8"}, {"dtype": "fp8", "granularity": "tensor"}, {"dtype": "fp8", "granularity": "block"}, {"dtype": "int8"}, {"dtype": "int4", "group": 8},
    {"dtype": "int4", "group": 8, "zero": False}, {"dtype": "int8", "granularity": "group", "group": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", FORMATS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_product_is_rewritten_and_computes_with_dequantised_weights(net, options):
    program = quantized(net, **options)
    entry = program._applied[-1]
    assert entry["matches"] == 9 and not entry["inverse"] and len(program.codes) == 2
    assert entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12 and entry["certificates"]
    dense = net_of()
    format = Format.of(**options)
    with torch.no_grad():
        for block in dense.blocks:
            for linear in (block.up, block.gate, block.down):
                linear.weight.copy_(format.decode(format.nearest(linear.weight), linear.weight.shape[1], torch.float32))
        assert torch.allclose(program(**EXAMPLE), dense(**EXAMPLE), rtol=1e-5, atol=1e-5)
    assert {name for name, _ in program.named_buffers()} >= {"blocks.0.up.weight_data", "blocks.0.up.weight_scale"}
    assert not any(name.startswith("blocks.0.up.weight") for name, _ in program.named_parameters())


def test_the_report_counts_bytes_of_the_quantised_weights(net):
    report = quantized(net, dtype="int8", check=False).report.as_dict()
    weights = 3 * 3 * WIDTH * INNER
    assert report["parameters_before"] == report["parameters_after"] == sum(p.numel() for p in net.parameters())
    assert report["parameter_bytes_before"] - report["parameter_bytes_after"] == 3 * weights - 4 * 3 * (2 * INNER + WIDTH)


def test_another_graph_than_the_formats_make_is_refused(net):
    program = ftc.capture(net, EXAMPLE)
    code = program.codes[0]
    before = next(iter(code.all_variants())).captured.graph
    from ftc.rewrite.registry import make

    pass_ = make("quantize", {"dtype": "int8"}).pass_
    after = copy_graph(before)
    pass_.apply(after)
    from ftc.capture.captured import tidy

    tidy(after, keep_random=False)
    assert all(t["output_error"] <= t["bound"] for t in proof.prove(before, after))
    wrong = copy_graph(after)
    nodes = [n for n in wrong.nodes if n.target is torch.ops.ftc.quantized_linear.default]
    nodes[0].args, nodes[1].args = ((*nodes[0].args[:4], nodes[i].args[4], *nodes[0].args[5:]) if i else (*nodes[1].args[:4], nodes[0].args[4], *nodes[1].args[5:]) for i in (1, 0))
    with pytest.raises(FtcFailure, match="not what its formats make"):
        proof.prove(before, wrong)
    unscaled = copy_graph(after)
    product = next(n for n in unscaled.nodes if n.target is torch.ops.ftc.quantized_linear.default)
    with unscaled.inserting_after(product):
        doubled = unscaled.call_function(torch.ops.aten.mul.Scalar, (product, 1.0001))
    doubled.meta["val"] = product.meta["val"]
    product.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    with pytest.raises(FtcFailure, match="not what its formats make"):
        proof.prove(before, unscaled)


def test_calibrated_rounding_loses_less_than_nearest_and_twins_share_their_graph(net):
    text = {"input_ids": torch.randint(0, VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(5))}
    nearest = quantized(net, check=False, dtype="int4", group=8)
    calibrated = quantized(net, TEXT, dtype="int4", group=8)
    assert kl_divergence(net, calibrated, [text]) < 0.6 * kl_divergence(net, nearest, [text])
    assert len(calibrated.codes) == 2 and calibrated._applied[-1]["metric"]["tokens"] == 6 * 16
    data = [calibrated.get_buffer(f"blocks.{i}.up.weight_data") for i in range(3)]
    assert not torch.equal(data[0], data[1])


def test_activations_are_rounded_with_scales_of_the_text(net):
    wide = net_of(seed=1)
    for block in wide.blocks:  # sizes that FP8 products take
        block.up, block.gate, block.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
    static = quantized(wide, TEXT, dtype="fp8", activations="static")
    scale = static.get_buffer("blocks.0.up.input_scale")
    with torch.no_grad():
        x = wide.embed(TEXT)
        x = x.cumsum(1) / (1 + torch.arange(16.0))[:, None]
        largest = wide.blocks[0].norm(x[[i for i in range(24) if i % 4 != 3]]).abs().max()
    assert scale.shape == (1,) and torch.allclose(scale * 448, largest, rtol=1e-5)
    dynamic = quantized(wide, dtype="fp8", activations="dynamic")
    losses = [kl_divergence(wide, p, [{"input_ids": TEXT}]) for p in (static, dynamic)]
    assert all(0 < loss < 0.05 for loss in losses)
    assert all(p._applied[-1]["matches"] == 9 for p in (static, dynamic))


def test_a_product_that_fp8_cannot_take_stays_and_is_told(net):
    with pytest.raises(FtcError, match="16 divides"):
        quantized(net, dtype="fp8", activations="dynamic")
    mixed = net_of(seed=2)
    for block in mixed.blocks:
        block.norm = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    program = quantized(mixed, dtype="fp8", activations="dynamic")
    assert program._applied[-1]["matches"] == 3
    assert "stays as it is" in str(program.report) and "16 divides" in str(program.report)


def test_within_a_budget_the_cheapest_formats_are_chosen(net):
    found = {}
    for bound in (3e-3, 1e-4):
        program = quantized(net, TEXT, check=False, max_kl=bound, formats=["int4-g8", "int8"])
        entry = program._applied[-1]
        assert entry["metric"]["value"] <= bound
        found[bound] = sum(plan["bytes"][1] for plan in entry["plans"].values())
        units = [unit for plan in entry["plans"].values() for unit in plan["sensitivity"]["units"]]
        assert len(units) == 9 and all(unit["formats"]["int4-g8"]["kl"] > unit["formats"]["int8-row"]["kl"] for unit in units)
    assert found[3e-3] < found[1e-4] <= sum(4 * WIDTH * INNER for _ in range(9))


def test_a_budget_that_nothing_fits_into_says_what_loses_least(net):
    with pytest.raises(FtcFailure, match=r"within max_kl = 1e-12: what loses least is blocks\.\d\.\w+ in int8-row"):
        quantized(net, TEXT, check=False, max_kl=1e-12, formats=["int4-g8", "int8"])


def test_a_bound_on_one_format_is_an_error_past_it_and_leaves_the_model(net):
    program = ftc.capture(net, EXAMPLE)
    before = program(**EXAMPLE)
    with pytest.raises(FtcFailure, match="max_kl"):
        ftc.rewrite(program, [("quantize", {"dtype": "int4", "group": 8, "max_kl": 1e-6})], calibration=TEXT, inplace=True, check=False)
    assert torch.equal(program(**EXAMPLE), before) and all(region.around is None for region in program.regions)


def test_head_and_embedding_are_quantised_where_asked_and_untied(net):
    plain, asked = quantized(net, check=False, dtype="int8"), quantized(net, dtype="int8", head=True, embedding=True)
    assert asked._applied[-1]["matches"] == plain._applied[-1]["matches"] + 2 == 11
    assert {"head.weight_data", "embed.weight_data"} <= {name for name, _ in asked.named_buffers()} and "head.weight" in dict(plain.named_parameters())
    assert kl_divergence(net, asked, [{"input_ids": TEXT}]) < 0.01
    with pytest.raises(FtcError, match="untie"):
        quantized(net_of(tied=True), dtype="int8", head=True, embedding=True)


def test_weights_that_are_to_stay_stay(net):
    program = quantized(net, TEXT, check=False, dtype="int4", group=8, keep=["down.*"])
    assert program._applied[-1]["matches"] == 6 and "blocks.1.down.weight" in dict(program.named_parameters())


@pytest.mark.slow
def test_a_saved_program_is_loaded_verified_and_the_same(net, tmp_path):
    program = quantized(net, TEXT, max_kl=3e-3, formats=["int4-g8", "fp8"])
    with torch.no_grad():
        program(input_ids=TEXT[:, :5])
        program.save(tmp_path / "q")
        loaded = ftc.load(tmp_path / "q").eval()
        assert torch.equal(loaded(**EXAMPLE), program(**EXAMPLE))
    checked = verify(tmp_path / "q")
    assert checked.ok, str(checked)
    certificates = tmp_path / "q" / "certificates.json"
    told = json.loads(certificates.read_text())["applied"][-1]
    assert told["plans"]["blocks.0"]["budget"]["measured"] <= 3e-3 and told["plans"]["blocks.0"]["formats"]


def test_the_command_shows_what_was_measured_and_says_what_is_wrong(net, tmp_path, capsys):
    from ftc.cli import run

    program = quantized(net, TEXT, check=False, max_kl=3e-3, formats=["int4-g8", "int8"], by="layer")
    with torch.no_grad():
        program(**EXAMPLE)
    program.save(tmp_path / "q")
    page = tmp_path / "s.html"
    assert run(["sensitivity", str(tmp_path / "q"), "--out", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["units"]) == 3 and page.read_text().count("<circle") == 6 and "Budget" in page.read_text()
    for wrong, said in ((["--formats", "int5"], "int8"), (["--by", "layers"], "layer"), (["--out", "s.svg"], ".html")):
        assert run(["sensitivity", str(tmp_path / "q"), *wrong]) == 2 and said in capsys.readouterr().err
    assert run(["torchao", str(tmp_path / "q"), "--out", str(tmp_path / "t")]) == 2 and "transformers model" in capsys.readouterr().err


def test_a_tampered_scale_is_found(net, tmp_path):
    program = quantized(net, dtype="int8")
    program.save(tmp_path / "q")
    path = next((tmp_path / "q").glob("weights*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert not verify(tmp_path / "q").ok


def test_the_lens_goes_back_to_dequantised_weights(net):
    lens = Quantize("up.weight", "int4-g8", (INNER, WIDTH), "float32")
    assert lens_from_dict(json.loads(json.dumps(lens.as_dict()))) == lens and lens.targets == ("up.weight_data", "up.weight_scale", "up.weight_zero")
    weight = net.blocks[0].up.weight.detach()
    there = lens.forward({"up.weight": weight, "other": weight})
    back = lens.backward(there)
    assert set(back) == {"up.weight", "other"} and 0 < float((back["up.weight"] - weight).abs().max()) < 0.25
    assert torch.equal(lens.backward(there)["up.weight"], lens.stored_as.decode(lens.stored_as.nearest(weight), WIDTH, torch.float32))
    with pytest.raises(FtcError, match="no inverse"):
        quantized(net, check=False, dtype="int8").original_state_dict()


@pytest.mark.slow
def test_experts_are_quantised_stacked():
    torch.manual_seed(0)
    model = Decoder(preset("tiny-moe", num_hidden_layers=2, hidden_size=32, head_dim=8)).eval()
    ids = torch.randint(0, model.config.vocab_size, (8, 24))
    base = ftc.rewrite(model, ["raise-moe"], example={"input_ids": ids[:2, :12]}, check=False)
    for options, text in (({"dtype": "int8"}, None), ({"dtype": "int4"}, ids)):
        program = ftc.rewrite(base, [("quantize", options)], calibration=text).eval()
        experts = [n for n, b in program.named_buffers() if n.endswith("_data") and b.dim() == 3]
        assert len(experts) >= 2 and program._applied[-1]["max_output_error"] <= 1e-12
        assert 0 < kl_divergence(model, program, [{"input_ids": ids[:4]}]) < (1e-3 if options["dtype"] == "int8" else 0.05)


def test_text_that_is_missing_or_too_short_is_an_error(net):
    with pytest.raises(FtcError, match="--calibration"):
        quantized(net, max_kl=0.1)
    with pytest.raises(FtcError, match=r"16 tokens, of which .* need 20"):
        quantized(net, TEXT[:1], dtype="int4", group=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp4"}, "fp8"), ({}, "max_kl"), ({"dtype": "int4", "granularity": "row"}, "group"), ({"dtype": "int8", "activations": "dynamic"}, "fp8"),
        ({"max_kl": 0.1, "formats": ["int5"]}, "int8"), ({"dtype": "int8", "rounding": "nearst"}, "nearest"), ({"dtype": "int8", "max_kl": -1.0}, "max_kl"),
        ({"dtype": "int4", "group": 1}, "group"), ({"max_kl": 0.1, "by": "head"}, "product"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_errors(options, said, net):
    with pytest.raises(FtcError, match=said):
        quantized(net, TEXT, **options)


def test_what_is_not_finite_in_the_text_is_named(net):
    broken = net_of(seed=3)
    with torch.no_grad():
        broken.blocks[1].norm.weight.fill_(float("inf"))
    with pytest.raises(FtcError, match=r"blocks\.1\.(up|gate)\.weight"):
        quantized(broken, TEXT, check=False, dtype="fp8")


@pytest.mark.slow
def test_a_quantised_program_continues_texts_from_a_cache():
    from ftc.cache import with_cache
    from ftc.cache.generation import continue_text

    torch.manual_seed(0)
    model = Decoder(preset("tiny")).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    for options in ({"dtype": "fp8"}, {"dtype": "int4"}):
        program = ftc.rewrite(model, [("quantize", options)], example={"input_ids": ids}, check=False).eval()
        with torch.no_grad():
            whole = [int(logits_of(program(input_ids=ids))[0, -1].argmax())]
        assert list(continue_text(with_cache(program), ids[0].tolist(), 1, None)) == whole


@pytest.mark.slow
def test_a_trained_model_loses_little(shared_data):
    from ftc.models import load

    from ftc.heal.sampling import sample

    model = load(shared_data / "stories260k").eval()
    text, apart = (sample(model, 1, 24, 160, seed=seed) for seed in (100, 101))
    lost = {}
    for name, options, given in (("int4 nearest", {"dtype": "int4"}, None), ("int4", {"dtype": "int4"}, text), ("int8", {"dtype": "int8"}, text), ("fp8", {"dtype": "fp8"}, text)):
        program = ftc.rewrite(model, [("quantize", options)], example={"input_ids": text[:2, :12]}, calibration=given, check=False).eval()
        lost[name] = kl_divergence(model, program, [{"input_ids": apart}])
    assert lost["int8"] <= 0.001 and lost["fp8"] <= 0.010 and lost["int4"] <= 0.5 * lost["int4 nearest"], lost

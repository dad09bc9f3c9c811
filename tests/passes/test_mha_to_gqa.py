"""mha-to-gqa: heads that differ by a change of basis merge without loss, what is lost is measured, and what the algebra does not allow is declined."""

import dataclasses

import ftc.passes.mha_to_gqa as module
import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.models.rope import apply_rope
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.calibration import kl_divergence
from ftc.rewrite.head_plan import HeadPlan, best_sets
from ftc.rewrite.lens import lens_from_dict
from ftc.rewrite.lens_heads import HeadMap

# B batch, T tokens, D model, H heads, G key-value heads, K head, R rotated elements, M value.
WIDTH, SIZE, VOCABULARY = 16, 8, 11


class Attention(nn.Module):
    def __init__(self, heads, groups, value, rotary, bias, interleaved, normed=False, causal=True):
        super().__init__()
        self.heads, self.groups, self.value, self.rotary, self.interleaved, self.causal = heads, groups, value, rotary, interleaved, causal
        self.q = nn.Linear(WIDTH, heads * SIZE, bias=bias)
        self.k = nn.Linear(WIDTH, groups * SIZE, bias=bias)
        self.v = nn.Linear(WIDTH, groups * value, bias=bias)
        self.o = nn.Linear(heads * value, WIDTH, bias=bias)
        self.norm = nn.RMSNorm(SIZE) if normed else nn.Identity()

    def forward(self, x, cos, sin):
        q, k, v = (
            part(x).unflatten(-1, (count, -1)).transpose(1, 2) for part, count in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        q, k = (self.turned(self.norm(part), cos, sin) for part in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.heads != self.groups, scale=0.3)
        return x + self.o(out.transpose(1, 2).flatten(-2))

    def turned(self, x, cos, sin):
        if not self.rotary:
            return x
        turned = apply_rope(x[..., : self.rotary], cos, sin, self.interleaved)
        return turned if self.rotary == SIZE else torch.cat([turned, x[..., self.rotary :]], -1)


class Net(nn.Module):
    """Blocks between an embedding and a head, with rotary tables of its own."""

    def __init__(self, heads=4, groups=4, value=6, rotary=8, bias=False, interleaved=False, blocks=1, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Attention(heads, groups, value, rotary, bias, interleaved, **options) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.half, self.interleaved = max(rotary // 2, 1), interleaved

    def forward(self, input_ids):
        x = self.embed(input_ids)
        frequencies = 100.0 ** (-torch.arange(self.half, dtype=x.dtype) / self.half)
        angles = (torch.arange(input_ids.shape[1], dtype=x.dtype)[:, None] * frequencies)[None]
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(x)


IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS}
TEXT = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(1))
SHAPES = dict(
    shape=st.sampled_from([(4, 4, 2), (4, 4, 1), (6, 6, 2), (8, 4, 2)]),  # H, G, and G after
    rotary=st.sampled_from([0, 4, 8]),
    value=st.sampled_from([4, 6]),
    bias=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 100),
)


def net_of(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    net = Net(**options).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def rotation(width, generator):
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def phases(rotary, interleaved, generator, scale):
    """[K, K]: a complex number for each pair that RoPE turns, a rotation for the rest."""
    turn = torch.eye(SIZE, dtype=torch.float64)
    half = rotary // 2
    for f in range(half):
        a, b = (2 * f, 2 * f + 1) if interleaved else (f, f + half)
        angle, size = torch.rand(2, generator=generator, dtype=torch.float64) * torch.tensor([6.28, scale]) + torch.tensor([0.0, 1 - scale / 2])
        turn[a, a] = turn[b, b] = size * angle.cos()
        turn[a, b], turn[b, a] = -size * angle.sin(), size * angle.sin()
    turn[rotary:, rotary:] = rotation(SIZE - rotary, generator) if rotary < SIZE else turn[rotary:, rotary:]
    return turn


@torch.no_grad()
def in_other_bases(net, groups, seed):
    """A net with `groups` key-value heads that computes what `net`, with fewer, does: each of its heads a shared one in a basis of its own, heads shuffled."""
    first, generator = net.blocks[0], torch.Generator().manual_seed(seed)
    options = dict(value=first.value, rotary=first.rotary, bias=first.q.bias is not None, interleaved=first.interleaved)
    wide = Net(first.heads, groups, **options).double()
    wide.embed.load_state_dict(net.embed.state_dict())
    wide.head.load_state_dict(net.head.state_dict())
    for old, new in zip(net.blocks, wide.blocks, strict=True):
        order = torch.randperm(groups, generator=generator).tolist()
        each, readers = groups // old.groups, old.heads // groups
        keys = [phases(old.rotary, old.interleaved, generator, 0.5) for _ in order]
        values = [rotation(old.value, generator) for _ in order]
        query_order = [g * readers + i for g in order for i in range(readers)]
        for word in ("weight", "bias"):
            parts = {n: getattr(getattr(old, n), word) for n in "qkv"}
            if parts["q"] is None:
                continue
            q, k, v = (parts[n].unflatten(0, (count, -1)) for n, count in zip("qkv", (old.heads, old.groups, old.groups), strict=True))
            getattr(new.q, word).copy_(torch.cat([torch.linalg.inv(keys[h // readers]).mT @ q[h] for h in query_order]))
            getattr(new.k, word).copy_(torch.cat([keys[g] @ k[g // each] for g in order]))
            getattr(new.v, word).copy_(torch.cat([values[g] @ v[g // each] for g in order]))
        columns = old.o.weight.unflatten(1, (old.heads, -1))
        new.o.weight.copy_(torch.cat([columns[:, h] @ values[h // readers].mT for h in query_order], 1))
        if old.o.bias is not None:
            new.o.bias.copy_(old.o.bias)
    return wide


def captured(net):
    """A program of the net, raised: what several conversions start from."""
    return ftc.rewrite(net.eval(), ["raise"], example=EXAMPLE, check=False)


def convert(program, groups, check=False, **options):
    return ftc.rewrite(program, [("mha-to-gqa", {"groups": groups, **options})], calibration=TEXT, check=check)


@pytest.fixture(scope="module")
def raised():
    """A small net, raised once for the tests of proofs."""
    return captured(net_of())


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])  # a failing example takes seconds: not shrunk
@given(**SHAPES)
def test_heads_that_differ_by_a_basis_are_found_and_merged_without_loss(shape, rotary, value, bias, interleaved, seed):
    heads, wide, groups = shape
    shared = net_of(seed=seed, heads=heads, groups=groups, rotary=rotary, value=value, bias=bias, interleaved=interleaved)
    net = in_other_bases(shared, wide, seed)
    expected = shared(IDS)
    torch.testing.assert_close(net(IDS), expected, rtol=1e-9, atol=1e-9)
    start = captured(net)
    program = convert(start, groups, check=True)
    torch.testing.assert_close(program(IDS), expected, rtol=1e-6, atol=1e-6)
    entry = program._applied[-1]
    assert entry["metric"]["value"] < 1e-10
    assert entry["max_output_error"] <= 1e-12 and entry["max_gradient_error"] <= 1e-12  # of the construction
    assert program.get_parameter("blocks.0.k.weight").shape == (groups * SIZE, WIDTH)
    mean = convert(start, groups, align=False, choose="neighbours")
    assert mean._applied[-1]["metric"]["value"] > 1e-4  # the mean of the same heads loses: the test could fail


@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(**SHAPES, single=st.booleans())
def test_what_is_lost_is_measured_and_the_way_back_computes_what_the_merged_model_does(shape, rotary, value, bias, interleaved, seed, single):
    heads, wide, groups = shape
    net = net_of(torch.float32 if single else torch.float64, seed, heads=heads, groups=wide, rotary=rotary, value=value, bias=bias, interleaved=interleaved)
    program = convert(captured(net), groups)
    entry = program._applied[-1]
    assert entry["contract"] == "lossy" and entry["metric"]["tokens"] == 6 * 16 and entry["matches"] == 1
    assert entry["metric"]["value"] == pytest.approx(kl_divergence(net, program, [{"input_ids": TEXT[3::4]}]), rel=1e-4, abs=1e-12)
    assert sorted(h for members in entry["plans"]["blocks.0"]["merged"] for h in members) == list(range(wide))
    back = Net(heads, wide, value, rotary, bias, interleaved).to(net.embed.weight.dtype)
    back.load_state_dict(written_back(program))
    bound = 1e-3 if single else 1e-8
    torch.testing.assert_close(back(IDS), program(IDS), rtol=bound, atol=bound)


def written_back(program):
    """The original's form of the parameters as they are."""
    tensors = dict(program.state_dict())
    for region in program.regions:
        for lens in reversed(region.code.lenses):
            tensors = lens.with_prefix(f"{region.ftc_name}.").backward(tensors)
    return tensors


def test_alignment_loses_less_than_means_on_heads_that_share_a_part():
    shared = net_of(heads=4, groups=2)
    net = in_other_bases(shared, 4, 3)
    with torch.no_grad():
        for block in net.blocks:
            for part in (block.q, block.k, block.v):
                part.weight += 0.05 * torch.randn(part.weight.shape, generator=torch.Generator().manual_seed(5))
    start = captured(net)
    lost = {
        (align, choose): convert(start, 2, align=align, choose=choose)._applied[-1]["metric"]["value"]
        for align in (True, False)
        for choose in ("similarity", "neighbours")
    }
    assert lost[True, "similarity"] < 0.2 * min(lost[False, "similarity"], lost[False, "neighbours"])
    assert lost[True, "similarity"] <= lost[True, "neighbours"]


def test_layers_calibrated_in_parts_are_planned_as_all_at_once(monkeypatch):
    start = captured(net_of(blocks=2))
    whole = convert(start, 2)
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    assert len(module._parts(start, dict.fromkeys("abc", module.HeadSizes(4, 4, 8, 6, 8, False)))) == 3
    parts = convert(start, 2)
    assert parts._applied[-1]["plans"] == whole._applied[-1]["plans"]
    assert torch.equal(parts(IDS), whole(IDS))


def test_as_many_heads_as_there_are_is_the_target_already():
    net = net_of(blocks=2)
    program = convert(captured(net), 4)
    entry = program._applied[-1]
    assert entry["already"] == 2 and entry["matches"] == 0
    assert torch.equal(program(IDS), net(IDS))


def test_a_loss_past_the_bound_stops_and_leaves_the_program():
    net = net_of()
    program = captured(net)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    with pytest.raises(FtcFailure, match="max_kl = 1e-06"):
        ftc.rewrite(program, [("mha-to-gqa", {"groups": 1, "max_kl": 1e-6})], inplace=True, calibration=TEXT, check=False)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    torch.testing.assert_close(program(IDS), net(IDS))


@pytest.mark.parametrize(
    ("net", "options", "calibration", "message"),
    [
        (dict(), dict(groups=3), TEXT, "groups = 3 does not divide the 4 key-value heads of blocks.0; 1, 2, 4 do"),
        (dict(), dict(groups=8), TEXT, "does not divide"),
        (dict(), dict(groups=0), TEXT, "groups = 0 must be at least 1"),
        (dict(), dict(groups=2, max_kl=0.0), TEXT, "max_kl = 0.0 must be more than 0"),
        (dict(), dict(groups=2), None, "give it some"),
        (dict(), dict(groups=2), [], "empty"),
        (dict(), dict(groups=1), TEXT[:4, :9], "tokens of calibration text are too few"),
        (dict(normed=True), dict(groups=2), TEXT, "normed head by head"),
        (dict(causal=False), dict(groups=2), TEXT, "not causal"),
    ],
)
def test_bad_input_is_a_clear_error(net, options, calibration, message):
    with pytest.raises(FtcError, match=message):
        ftc.rewrite(net_of(**net), [("mha-to-gqa", options)], example=EXAMPLE, calibration=calibration, check=False)


def test_latent_attention_is_declined():
    net = net_of()
    with pytest.raises(FtcError, match="latent already"):
        ftc.rewrite(net, ["gqa-to-mla", ("mha-to-gqa", {"groups": 2})], example=EXAMPLE, calibration=TEXT, check=False)


def test_the_configuration_follows_and_a_saved_program_verifies(tmp_path):
    torch.manual_seed(0)
    model = Decoder(preset("tiny", num_key_value_heads=4, num_hidden_layers=1))
    ids = torch.randint(0, 512, (16, 24))
    program = ftc.rewrite(model, [("mha-to-gqa", {"groups": 2})], example={"input_ids": ids[:2]}, calibration=ids)
    assert program.config.num_key_value_heads == 2
    program.save(tmp_path / "merged")
    from ftc.rewrite.verify import verify

    assert verify(tmp_path / "merged").ok
    loaded = ftc.load(tmp_path / "merged")
    assert torch.equal(loaded(input_ids=ids[:2]), program(input_ids=ids[:2]))


def test_other_inputs_and_later_passes_take_the_merged_heads():
    torch.manual_seed(0)
    model = Decoder(preset("tiny", num_key_value_heads=4, num_hidden_layers=1)).double().eval()
    ids = torch.randint(0, 512, (16, 24))
    program = ftc.rewrite(model, [("mha-to-gqa", {"groups": 2})], example={"input_ids": ids[:2]}, calibration=ids, check=False)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:] = False
    padded = program(input_ids=ids[:2, :10], attention_mask=mask)  # a variant that was captured after the pass
    torch.testing.assert_close(padded[0, :6], program(input_ids=ids[:1, :6])[0], rtol=1e-10, atol=1e-10)
    assert len(program.regions[0].code.all_variants()) > 1
    latent = ftc.rewrite(program, ["gqa-to-mla"])
    torch.testing.assert_close(latent(input_ids=ids[:2]), program(input_ids=ids[:2]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("field", ["key_back", "value_back", "order"])
def test_a_sabotaged_construction_fails_its_proof(field, raised, monkeypatch):
    real = HeadPlan.reading

    def wrong(plan, back):
        if field == "order":
            return real(dataclasses.replace(plan, order=plan.order[::-1]), back)
        maps = real(plan, back)
        return maps.mT.contiguous() if back is getattr(plan, field) else maps

    if field == "order":
        monkeypatch.setattr(HeadPlan, "query_order", property(lambda plan: tuple(range(plan.sizes.heads))))
    else:
        monkeypatch.setattr(HeadPlan, "reading", wrong)
    with pytest.raises(FtcFailure, match="does not keep its contract|not what the construction"):
        ftc.rewrite(raised, [("mha-to-gqa", {"groups": 2})], calibration=TEXT)


def test_a_graph_that_is_not_the_construction_fails_its_proof(raised, monkeypatch):
    real = module._convert_site

    def scaled(graph, site, plan):
        attention, lenses = real(graph, site, plan)
        if plan.loss == plan.loss:  # planned from text, not a trial
            attention.kwargs = {**attention.kwargs, "scale": 0.4}
        return attention, lenses

    monkeypatch.setattr(module, "_convert_site", scaled)
    with pytest.raises(FtcFailure, match="not what the construction makes"):
        ftc.rewrite(raised, [("mha-to-gqa", {"groups": 2})], calibration=TEXT)


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]), seed=st.integers(0, 1000))
def test_sets_are_a_partition_no_worse_than_neighbours_and_find_planted_sets(shape, seed):
    count, each = shape
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randperm(count, generator=generator).view(-1, each)
    far = torch.rand(count, count, generator=generator) + 10
    for members in planted:
        far[members[:, None], members] -= 10

    def loss(members):
        return float(far[list(members)][:, list(members)].sum())

    sets = best_sets(count, each, loss)
    assert sorted(i for s in sets for i in s) == list(range(count)) and {len(s) for s in sets} == {each}
    assert {frozenset(s) for s in sets} == {frozenset(s.tolist()) for s in planted}


@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(1, 3), each=st.integers(1, 3), rows=st.integers(1, 4), dim=st.integers(0, 1), seed=st.integers(0, 100))
def test_the_lens_maps_heads_goes_back_and_survives_json(blocks, each, rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(blocks, rows, each * rows, generator=generator, dtype=torch.float64)
    order = torch.randperm(blocks * each, generator=generator).tolist()
    shape = [5, 5]
    shape[dim] = blocks * each * rows
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    lens = HeadMap("w", "w", tuple(order), matrix, dim=dim)
    heads = x.movedim(dim, 0).unflatten(0, (-1, rows))
    wanted = torch.cat([matrix[b] @ torch.cat([heads[h] for h in order[b * each : (b + 1) * each]]) for b in range(blocks)]).movedim(0, dim)
    found = lens.forward({"w": x, "other": x})
    torch.testing.assert_close(found["w"], wanted)
    assert found["other"] is x and lens.has_inverse == (each == 1)
    again = lens.forward(lens.backward(found))["w"]
    torch.testing.assert_close(again, wanted, rtol=1e-6, atol=1e-6)
    if each == 1:
        torch.testing.assert_close(lens.backward(found)["w"], x, rtol=1e-6, atol=1e-6)
    leaf = x.clone().requires_grad_()
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradient = torch.autograd.grad((lens.forward({"w": leaf})["w"] * weights).sum(), leaf)[0]
    torch.testing.assert_close(lens.pull_back({"w": weights})["w"], gradient)
    tensors = {}
    read = lens_from_dict(lens.as_dict(tensors), tensors)
    assert read == lens and torch.equal(read.forward({"w": x})["w"], found["w"])
    assert lens.forward({"w": x.to("meta")})["w"].shape == wanted.shape
    with pytest.raises(FtcError, match="expects"):
        lens.forward({"w": torch.zeros(shape[0] + 1, shape[1] + 1)})

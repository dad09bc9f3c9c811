"""add-mtp against the plain modules of ftc.models.mtp; strip-mtp and mtp-draft; what is declined, and what must not pass."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.mtp import MtpDecoder, same_document, shifted_labels
from ftc.models.presets import preset
from ftc.passes.add_mtp import AddMtp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.graph_json import graph_hash
from ftc.rewrite.pipeline import apply_request
from ftc.rewrite.registry import Request

VOCABULARY, END = 48, 5
DEPTH = 3


def decoder():
    torch.manual_seed(0)
    return Decoder(preset("tiny", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, head_dim=8))


def tokens(batch=2, length=9, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def example(**more):
    return {"input_ids": tokens(), "labels": tokens(seed=1), **more}


@pytest.fixture(scope="module")
def captured():
    program = ftc.capture(decoder(), example())
    program.run_example({"input_ids": tokens()})
    return program


@pytest.fixture(scope="module")
def grown(captured):
    return ftc.rewrite(captured, [("add-mtp", {"depth": 2})])


@pytest.fixture(scope="module", params=[("sequential", "labels"), ("parallel", "labels"), ("sequential", "model")], ids="-".join)
def pair(request):
    """A program with modules and the plain modules with the same weights, in float64."""
    model, (kind, target) = decoder(), request.param
    options = {"depth": DEPTH, "kind": kind, "end_of_text": END, "weight": 0.5, "target": target}
    program = ftc.rewrite(model, [("add-mtp", options)], example=example()).double()
    plain = MtpDecoder(copy.deepcopy(model), DEPTH, 0.5, kind, END, target).double()
    names = {n if n.startswith("mtp.") else f"decoder.{n}": p for n, p in program.named_parameters()}
    with torch.no_grad():  # weights that hide nothing: no gain of one, no projection of identities
        for name, parameter in plain.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
            names[name].copy_(parameter)
    return program, plain, names


@st.composite
def calls(draw):
    """Token ids and labels, with borders in any of the ways that a graph can see."""
    batch, length = draw(st.integers(2, 3)), draw(st.integers(2, 8))
    ids = tokens(batch, length, draw(st.integers(0, 2**20)))
    labels = tokens(batch, length, draw(st.integers(0, 2**20)))
    labels[torch.rand(batch, length, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.15] = -100
    labels[0, 0] = 3  # one label counts at least
    kind = draw(st.sampled_from(["plain", "positions", "documents"]))
    border = draw(st.integers(0, length))
    documents = (torch.arange(length) >= border).long()
    if kind == "positions":
        places = torch.where(documents.bool(), torch.arange(length) - border, torch.arange(length))
        return ids, labels, {"position_ids": places.expand(batch, -1).contiguous()}
    if kind == "documents":
        mask = documents[:, None].eq(documents) & torch.ones(length, length).tril().bool()
        return ids, labels, {"attention_mask": mask.expand(batch, 1, -1, -1).contiguous()}
    return ids, labels, {}


@settings(deadline=None, max_examples=15)
@given(call=calls())
def test_loss_logits_and_gradients_are_those_of_the_plain_modules(pair, call):
    program, plain, names = pair
    ids, labels, more = call
    loss, expected = program(input_ids=ids, labels=labels, **more), plain(ids, labels, **more)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, [dict(plain.named_parameters())[n] for n in names], allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found, out = program.with_extras(input_ids=ids, **more)[1], plain(ids, **more)
    for k, logits in enumerate(out["mtp_logits"], 1):
        torch.testing.assert_close(found[f"mtp_logits_{k}"], logits, rtol=1e-11, atol=1e-12)


def test_the_target_model_is_a_cross_entropy_with_its_own_distribution(grown):
    model = decoder()
    program = ftc.rewrite(model, [("add-mtp", {"depth": 2, "target": "model", "weight": 1.0})], example=example())
    call = example()
    total, found = program.with_extras(**call)
    logits, extras = program.with_extras(input_ids=call["input_ids"])
    for k in (1, 2):
        own, draft = logits[:, k:].log_softmax(-1), extras[f"mtp_logits_{k}"][:, :-k].log_softmax(-1)
        expected = -(own.exp() * draft).sum() / call["labels"].numel()
        torch.testing.assert_close(found[f"mtp_loss_{k}"], expected)
    # The model learns nothing from what the modules are compared with: only through the hidden states that they read.
    head = dict(program.named_parameters())["lm_head.weight"]
    (ours,) = torch.autograd.grad(found["mtp_loss_1"], head, retain_graph=True)
    (draft_only,) = torch.autograd.grad(-(logits[:, 1:].log_softmax(-1).exp().detach() * extras["mtp_logits_1"][:, :-1].log_softmax(-1)).sum() / 18, head)
    torch.testing.assert_close(ours, draft_only)
    assert total > found["next_token_loss"]


def test_the_target_model_needs_logits():
    model = decoder()
    program = ftc.rewrite(model, ["chunk-cross-entropy"], example=example())
    with pytest.raises(FtcError, match="without holding its logits"):
        ftc.rewrite(program, [("add-mtp", {"target": "model"})])
    assert ftc.rewrite(program, ["add-mtp"])._applied[-1]["pass"] == "add-mtp"


def test_one_token_has_no_further_ones(grown):
    call = {"input_ids": tokens(1, 1), "labels": tokens(1, 1, 4)}
    total, found = grown.with_extras(**call)
    assert found["mtp_loss_1"] == found["mtp_loss_2"] == 0 and total == found["next_token_loss"] > 0


@settings(deadline=None)
@given(
    documents=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    depth=st.integers(1, 4),
    seen_by=st.sampled_from(["end of text", "positions", "mask"]),
    ignored=st.sets(st.integers(0, 19), max_size=3),
)
def test_no_label_crosses_a_border(documents, depth, seen_by, ignored):
    number = torch.cat([torch.full((n,), d) for d, n in enumerate(documents)])
    length = len(number)
    if seen_by == "end of text":  # it opens each document, and so stands right after the one before
        ids = torch.cat([torch.tensor([END] + [7] * (n - 1)) for n in documents])[None]
        joined = same_document(ids, end_of_text=END)
    else:
        places = torch.cat([torch.arange(n) for n in documents])[None]
        mask = (number[:, None] == number)[None, None] & torch.ones(length, length).tril().bool()
        signs = {"position_ids": places} if seen_by == "positions" else {"mask_B1TT": mask}
        joined = same_document(torch.zeros(1, length, dtype=torch.long), **signs)
    labels = torch.arange(1, length + 1)[None]  # the label at i is token i + 1
    for place in ignored & set(range(length)):
        labels[0, place] = -100
    for k, shifted in enumerate(shifted_labels(labels, depth, joined), 1):
        for i in range(length):
            within = i + k < length and all(number[i + j] == number[i] for j in range(k + 1))
            counts = within and all(labels[0, i + j] != -100 for j in range(k + 1))
            assert shifted[0, i] == (labels[0, i + k] if counts else -100)


def test_the_next_token_model_keeps_its_bits(captured, grown):
    call, unlabelled = example(), {"input_ids": tokens(3, 7)}
    total, found = grown.with_extras(**call)
    expected = captured(**call)
    assert torch.equal(found["next_token_loss"], expected) and torch.equal(grown(**unlabelled), captured(**unlabelled))
    assert torch.equal(total, found["mtp_total_loss"]) and total > expected
    names = dict(captured.named_parameters())
    ours = torch.autograd.grad(found["next_token_loss"], [dict(grown.named_parameters())[n] for n in names])
    theirs = torch.autograd.grad(expected, list(names.values()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(record["max_output_error"] == 0 for record in grown._applied[-1]["certificates"])


def test_modules_begin_as_copies_with_parameters_of_their_own(grown):
    last, block = grown.get_submodule("layers.1"), grown.get_submodule("mtp.0.block")
    assert last.code is block.code
    for (name, theirs), (_, own) in zip(last.named_parameters(), block.named_parameters(), strict=True):
        assert torch.equal(theirs, own) and theirs.data_ptr() != own.data_ptr(), name
    assert torch.equal(grown.fetch("mtp.1.norm.weight"), grown.fetch("norm.weight"))
    again = ftc.rewrite(decoder(), [("add-mtp", {"depth": 2, "init": "random", "seed": 4})], example=example())
    twice = ftc.rewrite(decoder(), [("add-mtp", {"depth": 2, "init": "random", "seed": 4})], example=example())
    drawn = "mtp.1.block.mlp.up_proj.weight"
    assert torch.equal(again.fetch(drawn), twice.fetch(drawn)) and not torch.equal(again.fetch(drawn), grown.fetch(drawn))


def test_ordinary_calls_do_not_run_the_modules(grown):
    (variant,) = [v for v in grown.code.all_variants() if len(v.captured.inputs) == 1 and v.key[3] is True]
    assert "mtp" not in variant.source and "mtp_logits_1" in grown.with_extras(input_ids=tokens())[1]


def test_strip_gives_back_the_graphs_weights_and_bits(captured, grown, tmp_path):
    grown.save(tmp_path / "grown")
    loaded = ftc.load(tmp_path / "grown")
    for program in (ftc.rewrite(grown, ["strip-mtp"]), ftc.rewrite(loaded, ["strip-mtp"])):
        assert list(program.state_dict()) == list(captured.state_dict()) and not program._added
        assert torch.equal(program(**example()), captured(**example()))
        assert torch.equal(program(input_ids=tokens()), captured(input_ids=tokens()))
        hashes = [{graph_hash(v.captured.graph) for v in p.code.all_variants()} for p in (captured, program)]
        assert hashes[0] <= hashes[1]
        assert program.report.as_dict()["parameters_before"] == program.report.as_dict()["parameters_after"]
        assert set(program.original_state_dict()) == set(captured.state_dict())
        program.save(tmp_path / "stripped")
        assert ftc.verify(tmp_path / "stripped").ok


def test_strip_after_training_leaves_the_trained_next_token_model(captured):
    program = ftc.rewrite(decoder(), ["add-mtp"], example=example())
    optimizer = torch.optim.SGD(program.parameters(), 0.5)
    for seed in range(3):
        optimizer.zero_grad()
        program(input_ids=tokens(seed=seed), labels=tokens(seed=seed + 9)).backward()
        optimizer.step()
    model = decoder()
    model.load_state_dict(program.original_state_dict())
    stripped = ftc.rewrite(program, ["strip-mtp"])
    assert torch.equal(stripped(input_ids=tokens()), program(input_ids=tokens()))
    assert torch.equal(stripped(input_ids=tokens()), model(tokens()))


def test_draft_keeps_the_modules_and_not_the_loss(captured, grown, tmp_path):
    program = ftc.rewrite(grown, ["mtp-draft"])
    assert torch.equal(program(**example()), captured(**example()))
    expected = grown.with_extras(input_ids=tokens())[1]
    program.save(tmp_path / "draft")
    loaded = ftc.load(tmp_path / "draft")
    for one in (program, loaded):
        found = one.with_extras(input_ids=tokens())[1]
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert ftc.verify(tmp_path / "draft").ok
    assert ftc.rewrite(program, ["strip-mtp"])._added == {}


@pytest.mark.parametrize(
    "passes",
    [["fuse-qkv", "add-mtp"], ["add-mtp", "fuse-qkv"], ["chunk-cross-entropy", "add-mtp"], ["add-mtp", "chunk-cross-entropy"]],
    ids="+".join,
)
def test_it_composes_with_other_passes_in_either_order(captured, grown, passes, tmp_path):
    passes = [("add-mtp", {"depth": 2}) if name == "add-mtp" else name for name in passes]
    program = ftc.rewrite(captured, passes)
    torch.testing.assert_close(program(**example()), grown(**example()), rtol=1e-5, atol=1e-6)
    back = program.original_state_dict()
    assert all(torch.equal(back[name], value) for name, value in captured.state_dict().items())
    if passes[1] == "fuse-qkv":  # the lens of a region that was added before
        program.save(tmp_path / "program")
        assert ftc.verify(tmp_path / "program").ok
    else:  # a structure met after the rewrite
        call = example(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1))
        torch.testing.assert_close(program(**call), grown(**call), rtol=1e-5, atol=1e-6)


def test_a_second_application_finds_the_modules_there(grown):
    entry = ftc.rewrite(grown, ["add-mtp"])._applied[-1]
    assert entry["matches"] == 0 and entry["already"] == 2


def test_a_transformers_model_with_its_own_convention_of_labels():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = tokens(2, 8)
    program = ftc.rewrite(model, [("add-mtp", {"weight": 0.2})], example={"input_ids": ids, "labels": ids})
    out, found = program.with_extras(input_ids=ids, labels=ids)
    logits = program.with_extras(input_ids=ids)[1]["mtp_logits_1"]
    by_hand = F.cross_entropy(logits[:, :-2].flatten(0, 1), ids[:, 2:].flatten(), reduction="sum") / ids[:, 1:].numel()
    torch.testing.assert_close(found["mtp_loss_1"], by_hand)
    torch.testing.assert_close(out.loss, found["next_token_loss"] + 0.2 * by_hand)
    assert torch.equal(out.logits, model(input_ids=ids, use_cache=False).logits)


class Variations(nn.Module):
    """A small decoder whose loss is spelled in the way that a test asks for."""

    def __init__(self, loss="plain", blocks=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(blocks)) if blocks else None
        self.spelling = loss
        self.register_buffer("weights", torch.rand(VOCABULARY))

    def forward(self, ids, labels):
        x = self.embed(ids) if self.spelling != "embedded" else torch.tanh(ids)
        for block in self.blocks or ():
            x = x + block(x) if self.spelling != "in place of x" else block(x)
        logits = self.head(x)
        if self.spelling == "shorter":
            logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        options = {"weight": self.weights} if self.spelling == "weighted" else {}
        options |= {"reduction": "none"} if self.spelling == "one a token" else {}
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), **options)
        if self.spelling == "one a token":
            loss = loss.mean()
        if self.spelling == "twice":
            loss = loss + F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1)
        return {"squared": loss * loss, "exp": loss.exp(), "scaled": loss.double() * 0.5 + 1}.get(self.spelling, loss)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("weighted", "weighs its classes"),
        ("one a token", "not reduced"),
        ("twice", "more than one cross-entropy"),
        ("squared", "stands between the cross-entropy|used more than once"),
        ("exp", "exp.* stands between"),
        ("embedded", "looks up no embedding"),
    ],
)
def test_a_loss_that_cannot_be_repeated_is_declined_with_the_reason(spelling, reason):
    ids = tokens() if spelling != "embedded" else torch.randn(2, 9, 8)
    with pytest.raises(FtcError, match=reason):
        ftc.rewrite(Variations(spelling), ["add-mtp"], example={"ids": ids, "labels": tokens()})


def test_a_model_without_blocks_is_declined():
    with pytest.raises(FtcError, match="no repeated blocks"):
        ftc.rewrite(Variations(blocks=0), ["add-mtp"], example={"ids": tokens(), "labels": tokens()})


def test_scaled_and_shortened_losses_are_repeated_as_they_are():
    call = {"ids": tokens(), "labels": tokens(seed=3)}
    plain, scaled = (ftc.rewrite(Variations(kind), ["add-mtp"], example=call) for kind in ("plain", "scaled"))
    scaled.load_state_dict(plain.state_dict())
    found, half = plain.with_extras(**call)[1], scaled.with_extras(**call)[1]
    torch.testing.assert_close(half["mtp_loss_1"], found["mtp_loss_1"].double() * 0.5)
    assert half["mtp_total_loss"].dtype == torch.float64
    shorter = ftc.rewrite(Variations("shorter"), ["add-mtp"], example=call)
    shorter.load_state_dict(plain.state_dict())
    moved = plain.with_extras(ids=call["ids"], labels=F.pad(call["labels"][:, 1:], (0, 1), value=-100))[1]
    torch.testing.assert_close(shorter.with_extras(**call)[1]["mtp_loss_1"], moved["mtp_loss_1"])


@dataclasses.dataclass(frozen=True)
class Leaky(AddMtp):
    """Lets a trace of the modules into the model's own logits."""

    name = "leaky"

    def apply(self, graph):
        outcome = super().apply(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        if "mtp_logits_1" in output.kwargs:
            results = list(output.args[0])
            with graph.inserting_before(output):
                leak = graph.call_function(torch.ops.aten.mul.Tensor, (results[output.kwargs["mtp_logits_1"]], 1e-12))
                results[0] = graph.call_function(torch.ops.aten.add.Tensor, (results[0], leak))
            for node in (leak, results[0]):
                node.meta = dict(output.args[0][0].meta)
            output.args = (results,)
        return outcome


@dataclasses.dataclass(frozen=True)
class Unsaid(AddMtp):
    """Adds regions without declaring them."""

    name = "unsaid"

    def apply(self, graph):
        outcome = super().apply(graph)
        outcome.regions.clear()
        return outcome


@dataclasses.dataclass(frozen=True)
class InPlaceOfTheLoss(AddMtp):
    """Puts the total where the next-token loss stood."""

    name = "in-place"

    def apply(self, graph):
        outcome = super().apply(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        if "mtp_total_loss" in output.kwargs:
            results = list(output.args[0])
            results[0] = results[output.kwargs["mtp_total_loss"]]
            output.args = (results,)
        return outcome


@pytest.mark.parametrize("sabotage", [Leaky, Unsaid, InPlaceOfTheLoss])
def test_a_sabotaged_pass_is_refused_and_leaves_no_trace(captured, sabotage):
    program = captured.fork()
    with pytest.raises((FtcFailure, FtcError)):
        apply_request(program, Request(sabotage(), "some"))
    assert list(program.state_dict()) == list(captured.state_dict()) and not program._added
    assert torch.equal(program(**example()), captured(**example()))


def test_a_name_that_is_taken_is_an_error(captured):
    program = captured.fork()
    program.add_module("mtp", nn.ModuleList([nn.ModuleDict({"block": nn.Identity()})]))
    with pytest.raises(FtcError, match="of that name"):
        ftc.rewrite(program, ["add-mtp"])


@pytest.mark.parametrize("options", [{"depth": 0}, {"weight": -1.0}, {"kind": "both"}])
def test_bad_options_are_errors(options):
    with pytest.raises(FtcError, match="pass add-mtp"):
        ftc.rewrite(decoder(), [("add-mtp", options)], example=example())


def test_the_plain_modules_take_what_they_are_given():
    with pytest.raises(ValueError, match="depth 0"):
        MtpDecoder(decoder(), 0)
    assert SimpleNamespace(**MtpDecoder(decoder())(tokens())).logits.shape == (2, 9, VOCABULARY)

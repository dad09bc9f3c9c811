"""Passkey, needle and sliding windows measure what they say: exact lengths, hidden where asked, right only where the answer is."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.errors import FtcError
from ftc.evaluate import evaluate
from ftc.tasks.grid import answered, measure_grid
from ftc.tasks.needle import Haystack, needle
from ftc.tasks.passkey import passkey
from ftc.tasks.perplexity import sliding_perplexity
from ftc.tasks.picture import colour, picture, write_picture
from ftc.tasks.prompts import tokens

VOCABULARY = 259


class ByteTokenizer:
    """Bytes as tokens, 256 begins and 257 ends a text."""

    vocab_size, bos_id, eos_id = VOCABULARY, 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


TOKENIZER = ByteTokenizer()
TEXT = " ".join(f"Sentence number {n} says {n * n}." for n in range(300))
HAYSTACK = Haystack(TOKENIZER, [TEXT, "One more line\nand another\n"])


class Finder(nn.Module):
    """A model that looks the answer up: it continues the longest context, of up to 40 bytes, that stood there before. `reach`: how far back it sees."""

    def __init__(self, reach: int = 10**9, wrong: int = 0):
        super().__init__()
        self.reach, self.wrong, self.calls = reach, wrong, []

    def forward(self, input_ids):
        self.calls.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(max(1, len(ids) - 12), len(ids) + 1):
                guess = self.next_of(bytes(i % 256 for i in ids[max(0, end - self.reach) : end]))
                logits[row, end - 1, guess] = 1.0
        return logits

    def next_of(self, text: bytes) -> int:
        for size in range(40, 2, -1):
            place = text.rfind(text[-size:], 0, len(text) - 1)
            if place >= 0:
                return text[place + size] + self.wrong
        return 0


makers = {
    "passkey": lambda length, depth, seed: passkey(TOKENIZER, length, depth, seed),
    "needle": lambda length, depth, seed: needle(TOKENIZER, HAYSTACK, length, depth, seed),
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(makers)), st.integers(250, 1500), st.floats(0, 1), st.integers(0, 10**6))
def test_a_prompt_has_its_length_and_hides_its_answer_at_its_depth(task, length, depth, seed):
    prompt = makers[task](length, depth, seed)
    assert prompt == makers[task](length, depth, seed)
    assert len(prompt.ids) == length and prompt.ids[0] == 256
    text = TOKENIZER.decode(prompt.ids)
    answer = TOKENIZER.decode(prompt.ids[-prompt.num_answer :])
    assert re.fullmatch(r" \d{5}" if task == "passkey" else r" [a-z]+", answer)
    assert text.endswith(answer) and text.count(answer) == 2  # hidden once, and at the end
    hidden = " The pass key is" if task == "passkey" else " keeps the"
    first, total = text.index(hidden) + 1, length  # the start token is no character
    slack = 60 if task == "needle" else 0  # needles go between sentences
    rest = length - len(prompt.ids[: prompt.place])
    assert abs(prompt.place - first) <= (20 if task == "needle" else 0)
    places = sorted(makers[task](length, d, seed).place for d in (0.0, 1.0))
    assert abs((prompt.place - places[0]) - depth * (places[1] - places[0])) <= slack + 1 and rest > 0 and total


def test_tokenizers_that_add_a_space_themselves_get_none_more():
    class Spaced(ByteTokenizer):
        def encode(self, text):
            return super().encode(" " + text)

    assert tokens(Spaced(), " key") == list(b" key") == tokens(TOKENIZER, " key") and tokens(Spaced(), "") == []
    prompt = passkey(Spaced(), 300, 0.5, 0)
    text = TOKENIZER.decode(prompt.ids)
    assert "  " not in text[1:] and len(prompt.ids) == 300 and text.count(text[-6:]) == 2


def test_other_seeds_hide_other_keys():
    keys = {passkey(TOKENIZER, 300, 0.5, seed).ids[-6:] for seed in range(50)}
    assert len(keys) > 45
    assert len({needle(TOKENIZER, HAYSTACK, 400, 0.5, seed).ids for seed in range(20)}) == 20


@pytest.mark.parametrize("task", sorted(makers))
def test_a_model_that_looks_back_finds_all_and_one_that_cannot_finds_none(task):
    grid = measure_grid(Finder(), makers[task], task=task, lengths=[300, 420], depths=[0.0, 0.5, 1.0], seeds=[3, 4], batch=2, progress=False)
    assert grid.accuracies == [[1.0, 1.0]] * 3 and grid.accuracy == 1.0
    blind = measure_grid(Finder(wrong=1), makers[task], task=task, lengths=[300], depths=[0.0, 1.0], seeds=[3, 4], progress=False)
    assert blind.accuracy == 0.0


def test_a_model_of_short_reach_finds_what_is_near_the_end():
    grid = measure_grid(
        Finder(reach=260), makers["passkey"], task="passkey", lengths=[240, 900], depths=[0.0, 1.0], seeds=[1, 2, 3], batch=4, progress=False
    )
    assert grid.accuracies == [[1.0, 0.0], [1.0, 1.0]]


def test_every_token_of_the_answer_must_be_right_and_the_mode_is_kept():
    class Almost(Finder):
        def forward(self, input_ids):
            logits = super().forward(input_ids)
            logits[:, -3] = 0.0
            logits[:, -3, 0] = 1.0
            return logits

    prompts = [passkey(TOKENIZER, 300, 0.5, seed) for seed in (1, 2)]
    assert answered(Finder(), prompts) == [True, True] and answered(Almost(), prompts) == [False, False]
    model = Finder().train()
    measure_grid(model, makers["passkey"], task="passkey", lengths=[300], depths=[0.5], seeds=[1, 2, 3], batch=2, progress=False)
    assert model.training and model.calls == [(2, 299), (1, 299)]  # the last token is never given


def test_bad_grids_are_named():
    class Short(Finder):
        class config:  # noqa: N801
            max_position_embeddings = 256

    common = dict(task="passkey", seeds=[0], depths=[0.5], progress=False)
    with pytest.raises(FtcError, match="300 tokens are more than the 256 positions of the model; the pass rope-scale lifts that"):
        measure_grid(Short(), makers["passkey"], lengths=[200, 300], **common)
    with pytest.raises(FtcError, match="a prompt of 50 tokens is too short"):
        measure_grid(Finder(), makers["passkey"], lengths=[50], **common)
    with pytest.raises(FtcError, match="none twice"):
        measure_grid(Finder(), makers["passkey"], lengths=[300, 300], **common)
    with pytest.raises(FtcError, match="depth 1.5"):
        passkey(TOKENIZER, 300, 1.5, 0)
    with pytest.raises(FtcError, match="give more text"):
        needle(TOKENIZER, Haystack(TOKENIZER, ["short"]), 400, 0.5, 0)
    with pytest.raises(FtcError, match="stride 9"):
        sliding_perplexity(Finder(), TOKENIZER, {"s": ["text"]}, context=8, stride=9)
    with pytest.raises(FtcError, match="positions of the model"):
        sliding_perplexity(Short(), TOKENIZER, {"s": ["text"]}, context=512, stride=9)


class Counting(nn.Module):
    """Knows the next byte the better the more of the text it sees: log-probability grows with the number of tokens before."""

    def forward(self, input_ids):
        seen = torch.arange(1, input_ids.shape[1] + 1).float()
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., ord("a")] = seen.log()
        return logits


@given(st.integers(1, 60), st.integers(1, 16), st.data())
@settings(deadline=None, max_examples=30)
def test_sliding_windows_score_each_token_once_with_the_text_before_it(length, context, data):
    stride = data.draw(st.integers(1, context))
    got = sliding_perplexity(Counting(), TOKENIZER, {"s": ["a" * length]}, context=context, stride=stride, progress=False)["s"]
    nats = 0.0
    for target in range(1, length + 1):  # how many tokens the window that scores it shows before it
        window_end = context if target <= context else min(length, context + -(-(target - context) // stride) * stride)
        window_end = min(window_end, length)
        seen = target - max(0, window_end - context)
        nats += math.log(seen + VOCABULARY - 1) - math.log(seen)
    assert got["tokens"] == got["bytes"] == length
    assert got["nats_per_token"] == pytest.approx(nats / length, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / length / math.log(2), rel=1e-5)
    finest = sliding_perplexity(Counting(), TOKENIZER, {"s": ["a" * length]}, context=context, stride=1, progress=False)["s"]
    assert finest["nats"] <= got["nats"] + 1e-4
    assert evaluate(Counting(), TOKENIZER, {"s": ["a" * length]}, context=context, stride=stride, progress=False)["s"] == got


def test_pictures_show_every_cell(tmp_path):
    grid = measure_grid(
        Finder(reach=260), makers["passkey"], task="passkey", lengths=[240, 900], depths=[0.0, 1.0], seeds=[1], progress=False
    )
    svg = picture(grid, "a <model>")
    drawn = ElementTree.fromstring(svg)  # well-formed
    cells = [cell for cell in drawn.iter() if cell.tag.endswith("rect")]
    assert len({(cell.get("x"), cell.get("y")) for cell in cells}) == 4
    assert all(float(cell.get("x")) + float(cell.get("width")) <= float(drawn.get("width")) for cell in cells)
    assert svg.count("<rect") == 4 and "900 tokens, depth 0%: 0.0%" in svg and "a &lt;model&gt;" in svg
    for name in ("grid.svg", "grid.html"):
        write_picture(tmp_path / name, grid, "a <model>")
        assert svg[:-1].strip() in (tmp_path / name).read_text()
    assert len({colour(n / 10) for n in range(11)}) == 11
    with pytest.raises(FtcError, match="neither an .svg nor an .html"):
        write_picture(tmp_path / "grid.png", grid, "m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer on disk, and a text."""
    import ftc.models
    from ftc.models.decoder import Decoder, DecoderConfig

    from ftc.data.bpe import train_bpe

    place = tmp_path_factory.mktemp("model")
    train_bpe([TEXT], 300, place / "tokenizer")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    ftc.models.save(Decoder(DecoderConfig(vocab_size=300, max_position_embeddings=256, **sizes)), place / "m")
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture
def run(capsys):
    """`ftc evaluate` with arguments: (exit code, stdout, stderr)."""
    from ftc.cli import run as run_command

    def call(*arguments):
        capsys.readouterr()
        code = run_command(["evaluate", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def test_the_command_prints_a_grid_and_draws_it(folder, run):
    out = folder / "grid.svg"
    code, printed, errors = run(
        folder / "m", "--task", "passkey", "--lengths", "200,250", "--depths", "0,1", "--seeds", "2", "--out", out, "--json"
    )
    assert code == 0, errors
    found = json.loads(printed)
    assert found["lengths"] == [200, 250] and found["depths"] == [0.0, 1.0] and found["prompts_per_cell"] == 2
    assert len(found["accuracies"]) == 2 and out.read_text().startswith("<svg")
    code, printed, errors = run(folder / "m", "--task", "needle", "--data", folder / "text.txt", "--lengths", "200", "--seeds", "1")
    assert code == 0 and "200 tokens" in printed, errors
    code, printed, errors = run(
        folder / "m", "--task", "perplexity", "--text", folder / "text.txt", "--context", "128", "--stride", "32", "--json"
    )
    assert code == 0 and json.loads(printed)["stride"] == 32, errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "passkey", "--lengths", "512"], "512 tokens are more than the 256 positions"),
        (["--task", "passkey", "--lengths", "2x"], "no whole number"),
        (["--task", "passkey", "--depths", "0,2"], "from 0 to 1"),
        (["--task", "passkey", "--lengths", "200,200"], "stands there twice"),
        (["--task", "passkey", "--out", "grid.png"], "neither an .svg nor an .html"),
        (["--task", "needle"], "needs text"),
        (["--task", "pasky"], "did you mean 'passkey'"),
        (["--task", "perplexity", "--data", "stdlib", "--context", "8", "--stride", "9", "--max-bytes", "100"], "stride 9"),
    ],
)
def test_bad_input_of_the_command_is_named(folder, run, arguments, says):
    code, _, errors = run(folder / "m", *arguments)
    assert code == 2 and says in errors, errors

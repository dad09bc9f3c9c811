"""`ftc evaluate --experts` on folders of ours and of Hugging Face's kind: tables, JSON, and a page that stands alone."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch

from ftc import cli
from ftc.commands.experts import domains_of
from ftc.errors import FtcError

TEXTS = {"cats": "the cat sat on the mat and ran. ", "code": "def f(x): return x + 1\n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with experts, an earlier one, a rewritten one, and text by domain."""
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    from ftc import models
    from ftc.data.bpe import train_bpe

    path = tmp_path_factory.mktemp("experts")
    tokenizer = train_bpe(list(TEXTS.values()), 280, path / "tokenizer")
    (path / "data").mkdir()
    for name, text in TEXTS.items():
        (path / "data" / f"{name}.txt").write_text(text * 40)
    sizes = dict(vocab_size=280, hidden_size=32, head_dim=8, num_hidden_layers=2, moe={"num_experts": 4, "intermediate_size": 16})
    for seed, name in enumerate(("model", "earlier")):
        torch.manual_seed(seed)
        models.save(Decoder(preset("tiny-moe", **sizes)).eval(), path / name, tokenizer=tokenizer)
    return path


@pytest.fixture
def command(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


SMALL = ("--context", "16", "--tokens", "128", "--ablation-tokens", "64")


def test_json_holds_every_number_and_the_page_stands_alone(command, folder, tmp_path):
    out = tmp_path / "page"
    arguments = ("evaluate", folder / "model", "--experts", "--data", folder / "data", *SMALL, "--against", folder / "earlier")
    code, text, _ = command(*arguments, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and found["experts"] == 4 and found["layers"] == ["layers.0", "layers.1"] and found["tokens"] == {"cats": 128, "code": 128}
    for layer in found["layers"]:
        row = found["utilisation"]["all"][layer]
        assert sum(row["load_share"]) == pytest.approx(1, abs=1e-12) and row["chosen"] == 2 and 0.25 <= row["confidence"] <= 1
        domains = found["specialisation"][layer]["domains"]
        for name in TEXTS:
            share = found["utilisation"]["domains"][name][layer]["load_share"]
            assert domains[name]["over_chance"] == pytest.approx([4 * s for s in share], abs=1e-12)
            assert set(found["harm"]["layers"][layer][name]["harm"]) == set(TEXTS)
        assert 0 < found["saturation"][layer] < 1
    assert found["specialisation"]["layers.0"]["oracle"]["over_chance"] == 2
    written = json.loads((out / "experts.json").read_text())
    assert written == {name: value for name, value in found.items() if name != "folder"}
    page = (out / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    titles = [ElementTree.fromstring(svg).get("aria-label") for svg in pictures]  # each is well-formed
    assert len(titles) == 10 and sum("pairs over independence" in title for title in titles) == 2
    assert not re.search(r"(src|href)=|url\(|@import", page)
    cells = ElementTree.fromstring(pictures[0]).findall(".//{http://www.w3.org/2000/svg}title")
    load = found["utilisation"]["all"]["layers.0"]["load_share"]
    assert [cell.text for cell in cells[:4]] == [f"layers.0, expert {e}: {4 * load[e]:.4f}" for e in range(4)]


@pytest.mark.slow  # saving a program proves that it can be read again
def test_a_rewritten_folder_gives_the_numbers_of_the_model(command, folder, tmp_path):
    import ftc

    ids = torch.arange(24).view(2, 12)
    ftc.rewrite(ftc.models.load(folder / "model"), ["raise-moe"], example={"input_ids": ids}, check=False).save(tmp_path / "rewritten")
    data = ["--experts", "--data", f"cats={folder / 'data' / 'cats.txt'}", "--context", "16", "--tokens", "64", "--ablation-tokens", "0", "--json"]
    data += ["--tokenizer", folder / "tokenizer"]
    first, second = (json.loads(command("evaluate", model, *data)[1]) for model in (folder / "model", tmp_path / "rewritten"))
    assert first["utilisation"] == second["utilisation"] and first["specialisation"] == second["specialisation"] and first["harm"] is None


def test_tables_name_layers_domains_and_harm(command, folder):
    code, text, _ = command("evaluate", folder / "model", "--experts", "--data", folder / "data", *SMALL)
    assert code == 0 and "2 of 4 experts a token" in text
    for word in ("layers.0", "layers.1", "cats", "code", "MaxVio", "without cats's", "random router", "oracle"):
        assert word in text, word


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preset:tiny", "--experts", "--data", "DATA", "--tokenizer", "TOKENIZER"], "preset:tiny: there are no experts"),
        (["MODEL", "--experts"], "--data NAME=PATH"),
        (["MODEL", "--experts", "--data", "english=/no/such.txt"], "there is no data at /no/such.txt"),
        (["MODEL", "--experts", "--data", "DATA", "--task", "mtp"], "--task mtp"),
        (["MODEL", "--experts", "--data", "DATA", "--max-bytes", "10"], "--tokens"),
        (["MODEL", "--experts", "--data", "DATA", "--context", "1"], "--context is 1"),
        (["MODEL", "--experts", "--data", "DATA", "--out", "FILE"], "it is a folder"),
        (["MODEL", "--experts", "--data", "DATA", "--against", "/no/model"], "/no/model"),
        (["MODEL", "--data", "DATA", "--against", "MODEL"], "--against is for --experts"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(command, folder, arguments, words):
    places = {"MODEL": folder / "model", "DATA": folder / "data", "TOKENIZER": folder / "tokenizer", "FILE": folder / "data" / "cats.txt"}
    code, _, err = command("evaluate", *[places.get(a, a) for a in arguments])
    assert code == 2 and words in err and err.count("\n") == 1


def test_domains_are_named_by_hand_by_file_and_by_folder(tmp_path):
    for name in ("a.txt", "b.md", ".hidden"):
        (tmp_path / name).write_text("text")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.md")
    assert domains_of([str(tmp_path)]) == {"a": [a], "b": [b]} == domains_of([a, b])
    assert domains_of([f"x={a}", f"y={b}", f"x={b}"]) == {"x": [a, b], "y": [b]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FtcError, match="holds no files"):
        domains_of([str(tmp_path / "empty")])


def test_help_shows_an_example(command):
    code, text, _ = command("evaluate", "--help")
    assert code == 0 and "--experts --data english=novels.jsonl" in re.sub(r"\s+", " ", text)


def test_the_four_domains_of_real_text_are_measured(command, folder, shared_data):
    arguments = ("evaluate", folder / "model", "--experts", "--data", shared_data / "text", "--context", "32", "--tokens", "256", "--ablation-tokens", "0")
    code, text, _ = command(*arguments, "--json")
    found = json.loads(text)
    assert code == 0 and found["tokens"] == dict.fromkeys(("english", "french", "maths", "python"), 256)
    assert all(0 <= row["information"] <= row["oracle"]["information"] for row in found["specialisation"].values())


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (40, 40), (3, 400)])
def test_a_heat_map_draws_every_cell_once_and_names_it_where_there_are_few(rows, columns):
    from ftc.moe.picture import heat_map, ratio_colour

    values = [[float("nan") if r == c else 0.1 + (r * columns + c) % 7 for c in range(columns)] for r in range(rows)]
    names = [str(i) for i in range(max(rows, columns))]
    scale = [(0.25, "1/4"), (1.0, "1"), (4.0, "4")]
    svg = heat_map(values, names[:rows], names[:columns], paint=lambda v: ratio_colour(v, 1.0, 4.0), scale=scale, title="<a> & b", across="expert")
    root, space = ElementTree.fromstring(svg), "{http://www.w3.org/2000/svg}"
    named = root.findall(f"{space}g/{space}title")
    merged = sum(path.get("d").count("M") for path in root.iter(f"{space}path"))
    assert (len(named), merged) == ((rows * columns, 0) if rows * columns <= 1024 else (0, rows * columns))
    assert root.get("aria-label") == "<a> & b" and float(root.get("width")) <= 3000


def test_bars_grow_from_zero_to_either_side():
    from ftc.moe.picture import bars

    svg = bars({"one": {"a": 2.0, "b": -1.0}}, {"a": "--c1", "b": "--c2"}, title="t", unit="nats")
    up, down = (rect.attrib for rect in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"))
    assert float(up["width"]) == pytest.approx(2 * float(down["width"]), abs=0.2)
    assert float(down["x"]) + float(down["width"]) == pytest.approx(float(up["x"]), abs=0.2)

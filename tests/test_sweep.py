"""ftc sweep: every point measured or skipped with its reason, kept when done, and drawn."""

import json
import math
import re

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc
import ftc.sweep as module
from ftc import cli
from ftc.errors import FtcError
from ftc.rewrite.calibration import as_batches, held_out, kl_divergence
from ftc.sweep import Point, Timed, begin, cache_sizes, sweep, text_of, weights_digest
from ftc.sweep_grid import axes_of, pass_of, points_of
from ftc.sweep_picture import COLUMNS, kl_levels, rows_of, series_of, write_page

TEXT = torch.randint(0, 512, (24, 20), generator=torch.Generator().manual_seed(0))
UNTIMED = Timed(tokens=12, repeats=0)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = Decoder(preset("tiny", num_hidden_layers=1, num_key_value_heads=4)).eval()
    return ftc.rewrite(model, ["raise"], example={"input_ids": TEXT[:2, :12]}, check=False)


def run(program, out, axes, name="mha-to-gqa", fixed=None, timed=UNTIMED, **options):
    return sweep(program, name, fixed or {}, points_of(name, fixed or {}, axes), TEXT, out, about={"model": "m"}, timed=timed, **options)


# ------------------------------------------------------------------------------------------------------------------- grid


@settings(max_examples=50, deadline=None)
@given(
    axes=st.dictionaries(
        st.sampled_from(["cache", "rotation", "rank", "weigh"]),
        st.lists(st.one_of(st.integers(-99, 99), st.floats(0.01, 9).map(lambda x: round(x, 3)), st.booleans(), st.sampled_from(["real", "none"])), min_size=1, unique_by=lambda v: (type(v), v)),
        min_size=1,
    )
)
def test_axes_are_read_as_they_are_written(axes):
    written = [f"{name}={','.join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)}" for name, values in axes.items()]
    assert axes_of(written) == axes
    assert all(type(a) is type(b) for name in axes for a, b in zip(axes_of(written)[name], axes[name], strict=True))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "a sweep needs an axis"),
        (["cache"], "'cache' is no axis; write option=value,value"),
        (["cache="], "no axis"),
        (["=1"], "no axis"),
        (["cache=0.5", "cache=0.25"], "cache stands there twice"),
        (["cache=0.5,0.25,0.5"], "0.5 stands there twice"),
    ],
)
def test_a_grid_that_cannot_be_read_is_a_clear_error(grid, message):
    with pytest.raises(FtcError, match=message):
        axes_of(grid)


def test_points_are_all_combinations_and_those_that_no_pass_can_be_made_with_say_why():
    name, fixed = pass_of("gqa-to-mla{rotation=real}")
    points = points_of(name, fixed, axes_of(["cache=0.5,2,0.25", "seed=1,2"]))
    assert [p for p, _ in points] == [{"cache": c, "seed": s} for c in (0.5, 2, 0.25) for s in (1, 2)]
    assert [bool(reason) for _, reason in points] == [False, False, True, True, False, False]
    assert "cache = 2 is not a share" in points[2][1]


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("gqa-to-mla,fuse-qkv", ["cache=0.5"], "names 2 passes; a sweep runs one"),
        ("gqa-to-mla{cache=0.5}", ["cache=0.25"], "--pass settles cache = 0.5, and --grid varies it"),
        ("gqa-to-mla", ["cach=0.25"], "no option 'cach'"),
        ("gqa-to-mla", ["cache=real"], "should be of type"),
        ("gqa-to-ml", ["cache=0.5"], "there is no pass 'gqa-to-ml'"),
    ],
)
def test_what_no_point_can_be_made_of_is_an_error_at_once(text, grid, message):
    with pytest.raises(FtcError, match=message):
        name, fixed = pass_of(text)
        points_of(name, fixed, axes_of(grid))


# -------------------------------------------------------------------------------------------------------------- measuring


def test_points_hold_what_the_pass_itself_gives_and_impossible_ones_their_reason(program, tmp_path):
    before = {name: value.clone() for name, value in program.state_dict().items()}
    found = run(program, tmp_path / "s", {"groups": [1, 2, 3, 4]})
    assert [p.options for p in found] == [{}, {"groups": 1}, {"groups": 2}, {"groups": 3}, {"groups": 4}]
    original, one, two, three, four = found
    assert (original.kl, original.cache_elements, original.cache_bytes) == (0.0, 128, 512)
    assert [p.cache_elements for p in (one, two, four)] == [32, 64, 128] and [p.cache_bytes for p in (one, two, four)] == [128, 256, 512]
    assert "groups = 3 does not divide the 4 key-value heads" in three.skipped and three.kl is None
    assert four.kl < 1e-12 < two.kl < one.kl  # fewer heads, more lost
    again = ftc.rewrite(program, [("mha-to-gqa", {"groups": 2})], calibration=TEXT, check=False)
    assert two.kl == pytest.approx(kl_divergence(program, again, held_out(as_batches(TEXT))[1]), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_the_cache_counted_is_what_the_paged_cache_allocates(program, tmp_path):
    from ftc.cache import PagedCache

    mla = ftc.rewrite(program, [("gqa-to-mla", {"rank": 24, "rope": 8})], calibration=TEXT, check=False)
    for each, elements in ((program, 128), (mla, 32)):
        cached = ftc.rewrite(each, ["insert-kv-cache"], check=False)
        sizes = cache_sizes(each)
        assert sizes == [(elements, 4 * elements)]
        assert PagedCache(cached, 4).bytes_per_token == sum(count for _, count in sizes)


def test_latency_is_measured_where_the_model_can_be_cached_and_else_the_reason_is_kept(program, tmp_path, monkeypatch):
    found = run(program, tmp_path / "a", {"groups": [2]}, timed=Timed(tokens=8, repeats=2))
    assert all(p.forward_ms > 0 and p.decode_ms > 0 and p.decode_note is None for p in found)
    found = run(program, tmp_path / "b", {"groups": [2]}, timed=Timed(tokens=300, repeats=2))  # longer than the model's 256 positions
    assert all(p.forward_ms > 0 and p.decode_ms is None and "256 positions" in p.decode_note for p in found)


def test_a_rerun_continues_and_measures_nothing_twice(program, tmp_path, monkeypatch):
    calls = []
    real = module._one

    def counted(raised, request, options, *rest):
        calls.append(options["groups"])
        if options["groups"] == 4 and len(calls) == 2:
            raise KeyboardInterrupt
        return real(raised, request, options, *rest)

    monkeypatch.setattr(module, "_one", counted)
    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path / "s", {"groups": [2, 4]})
    assert sorted(p.name for p in (tmp_path / "s" / "points").iterdir()) == ["0.json", "original.json"]
    found = run(program, tmp_path / "s", {"groups": [2, 4]})
    assert calls == [2, 4, 4] and [p.options for p in found[1:]] == [{"groups": 2}, {"groups": 4}]
    assert run(program, tmp_path / "s", {"groups": [2, 4]}) == found and calls == [2, 4, 4]


def test_another_sweep_in_the_same_folder_is_an_error_that_says_what_differs(program, tmp_path):
    out = tmp_path / "s"
    begin(out, {"model": "m", "pass": "p", "points": [1], "weights": "a", "text": "t"})
    begin(out, {"model": "m", "pass": "p", "points": [1], "weights": "a", "text": "t"})
    for key, value in (("model", "n"), ("pass", "q"), ("points", [1, 2]), ("weights", "b"), ("text", "u")):
        with pytest.raises(FtcError, match=f"holds another sweep: its {key} is"):
            begin(out, {"model": "m", "pass": "p", "points": [1], "weights": "a", "text": "t"} | {key: value})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FtcError, match="did not write"):
        begin(tmp_path / "mine", {"model": "m"})
    trained = program.fork()
    before = weights_digest(trained)
    with torch.no_grad():
        name, parameter = next(iter(trained.named_parameters()))
        trained.get_parameter(name).data = parameter.detach() + 1e-3
    assert weights_digest(trained) != before == weights_digest(program)


def test_a_grid_without_a_possible_point_is_an_error(program, tmp_path):
    with pytest.raises(FtcError, match="no point of the grid is possible; the first: pass mha-to-gqa: groups = 3 does not divide"):
        run(program, tmp_path / "s", {"groups": [3, 5]})


# ---------------------------------------------------------------------------------------------------------------- picture


POINTS = [
    Point({}, kl=0.0, cache_elements=64, cache_bytes=256, forward_ms=2.0, decode_ms=1.0),
    Point({"cache": 0.5, "rotation": "real"}, kl=0.7, cache_elements=32, cache_bytes=128, forward_ms=2.5, decode_ms=1.1),
    Point({"cache": 0.5, "rotation": "complex"}, kl=0.2, cache_elements=32, cache_bytes=128, forward_ms=2.4, decode_note="<too long>"),
    Point({"cache": 0.001, "rotation": "real"}, skipped="leaves <nothing>"),
]
AXES = {"cache": [0.5, 0.001], "rotation": ["real", "complex"]}


def test_the_page_shows_every_point_and_every_reason(tmp_path):
    write_page(tmp_path / "s.html", "a <b>", "about", POINTS, AXES)
    page = (tmp_path / "s.html").read_text()
    assert "a &lt;b&gt;" in page and "leaves &lt;nothing&gt;" in page and "&lt;too long&gt;" in page
    assert page.count("<circle") == 2 + 1 + 2  # cache, decode step (one was not timed), forward
    assert "cache=0.5, rotation=complex: 0.2000 nats a token at 128" in page
    rows = rows_of(POINTS, list(AXES))
    assert [row[:2] for row in rows] == [("original", ""), ("0.5", "real"), ("0.5", "complex"), ("0.001", "real")]
    assert all(len(row) == 2 + len(COLUMNS) for row in rows) and rows[1][4] == "50.0%" and "skipped" in rows[3]
    assert {name: len(line) for name, line in series_of(POINTS[1:3], AXES).items()} == {"rotation = real": 1, "rotation = complex": 1}


def test_a_point_that_loses_nothing_stands_below_the_scale_and_does_not_stretch_it(tmp_path):
    lossless = Point({"cache": 1.0, "rotation": "real"}, kl=1e-15, cache_elements=64, cache_bytes=256, forward_ms=2.0, decode_ms=1.0)
    write_page(tmp_path / "a.html", "t", "a", POINTS, AXES)
    write_page(tmp_path / "b.html", "t", "a", [*POINTS, lossless], AXES)
    write_page(tmp_path / "c.html", "t", "a", [POINTS[0], lossless], AXES)
    plain, more, alone = ((tmp_path / f"{n}.html").read_text() for n in "abc")
    labels = [set(re.findall(r"style='fill:var\(--soft\)'>([0-9.]+)</text>", page[: page.index("</svg>")])) for page in (plain, more)]
    assert labels[1] - labels[0] >= {"0"} and {"0.2", "0.5", "1"} <= labels[0] & labels[1]
    assert "nan" not in more and alone.count("<circle") == 3


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(1e-6, 50), min_size=1, max_size=6))
def test_levels_enclose_all_values_and_ascend(values):
    levels = kl_levels(values)
    assert levels[0] <= min(values) * (1 + 1e-8) and levels[-1] >= max(values) * (1 - 1e-8)
    assert levels == sorted(set(levels)) and 2 <= len(levels) <= 10
    assert all(math.isclose(level, float(f"{level:.0e}")) for level in levels)


# ---------------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_or_json_and_writes_the_page(tmp_path, capsys):
    import ftc.models

    from ftc.data.bpe import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 3, 300, tmp_path / "tokenizer")
    ftc.models.save(Decoder(preset("tiny", num_hidden_layers=1)), tmp_path / "hf", tokenizer=tokenizer)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"the {a} sat on the {b} " * 60}) + "\n" for a in ("cat", "dog") for b in ("mat", "cat")))
    asked = ["sweep", tmp_path / "hf", "--pass", "gqa-to-mla", "--grid", "cache=0.5,0.0001", "--calibration", tmp_path / "text.jsonl"]
    asked = [str(a) for a in [*asked, "--out", tmp_path / "out", "--tokens", 8, "--repeats", 1]]
    assert cli.run([*asked, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [bool(p["skipped"]) for p in printed["points"]] == [False, False, True] and printed["grid"] == {"cache": [0.5, 0.0001]}
    assert printed["points"][1]["cache_elements"] == 32 and "cache of 0.0001" in printed["points"][2]["skipped"]
    assert cli.run(asked) == 0  # again, from what is kept
    shown = capsys.readouterr()
    assert "KL" in shown.out and "skipped cache=0.0001" in shown.err and (tmp_path / "out" / "sweep.html").is_file()
    other = [a.replace("cache=0.5,0.0001", "cache=0.5") for a in asked]
    assert cli.run(other) == 2 and "holds another sweep" in capsys.readouterr().err
    assert cli.run([a.replace("text.jsonl", "none.jsonl") for a in asked]) == 2
    own = ["self" if a.endswith("text.jsonl") else str(tmp_path / "own") if a.endswith("out") and a != "--out" else a for a in asked]
    capsys.readouterr()
    assert cli.run([*own, "--repeats", "0", "--json"]) == 0  # on text drawn from the model
    assert json.loads(capsys.readouterr().out)["points"][1]["kl"] != printed["points"][1]["kl"]


def test_options_are_written_as_the_command_line_takes_them():
    assert text_of({"align": True, "cache": 0.5, "rotation": "real"}) == "align=true, cache=0.5, rotation=real" and text_of({}) == "original"

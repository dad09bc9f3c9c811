"""The report: self-contained, escaped, and showing what the stages measured. No browser is needed."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.charts import bar_chart, loss_chart, nice_ticks, validation_chart
from ftc.report_html import render

VOID = {"meta", "br", "line", "path", "link", "img", "input"}


class Checker(HTMLParser):
    """Collects tags, links and text, and checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def row(matches, contract="exact", output=2.3e-16, gradient=4.5e-15):
    return {
        "matches": matches,
        "contract": contract,
        "max_output_error": output,
        "max_gradient_error": gradient,
        "inverse": True,
    }


def stage(name, kind, **report):
    return {"name": name, "kind": kind, "seconds": 61.5, "skipped": False, "report": report}


FUSED = {"layers.0": [{"kind": "stack", "sources": [f"self_attn.{name}_proj.weight" for name in "qkv"]}]}


def stages():
    described = {
        "regions": [{"name": f"layers.{i}", "kind": "Block", "parameters": 1000, "graph": 0} for i in range(2)],
        "graphs": [{"name": "layers.0", "variants": [{"nodes": 55}]}, {"name": "shell", "variants": [{"nodes": 27}]}],
        "note": None,
    }
    rewrite = {
        "regions": 2,
        "passes": {"raise-norm": row(5, "bitwise", 0.0, 0.0), "raise-mlp": row(0), "fuse-qkv": row(2) | {"lenses": FUSED}},
        "residue": [{"kind": "attention", "location": "model.py:12 <attend>"}],
        "parameters_before": 2000,
        "parameters_after": 1500,
        "described": described,
    }
    result = {"bits_per_byte": 1.25, "nats": 100.0, "tokens": 50, "bytes": 120}
    return [
        stage(
            "train",
            "train",
            loss={
                "train": [[i, 5 - i / 50] for i in range(1, 101)],
                "sources": {"books": [[10, 4.5], [100, 3.2]], "code": [[10, 4.0], [100, 2.9]]},
                "validation": [[100, 3.1]],
            },
            curve={
                "books": {"points": [[i, 3 - i / 60] for i in range(10, 101, 10)], "baseline": 1.79, "bytes": 12345},
                "code": {"points": [[i, 2 - i / 90] for i in range(10, 101, 10)], "baseline": None, "bytes": 777},
            },
            validation={"bits_per_byte": 1.4, "trigram_bits_per_byte": 1.75},
            configuration="[training]\nsteps = 100 # <all>",
            facts={"steps": 100, "tokens": 51200, "training seconds": 12.0},
        ),
        stage("rewrite", "rewrite", rewrite=rewrite),
        stage("verify", "verify", verification={"ok": True, "rows": [{"name": "w", "kind": "weights", "ok": True, "detail": "same"}]}),
        stage("before", "evaluate", evaluation={"sources": {"book": result}, "baseline": {"book": 1.75}}),
        stage("samples", "generate", samples=[{"prompt": "a < b", "text": " && <script>alert(1)</script>"}]),
    ]  # fmt: skip


def page(**changes):
    options = {
        "title": "A & B",
        "stages": stages(),
        "versions": {"ftc": "0.1"},
        "machine": "a machine",
        "recipe_text": "[x]",
    }
    return render(**(options | changes))


def test_the_page_is_well_formed_and_loads_nothing():
    text = page()
    checker = parsed(text)
    assert checker.links == [] and "link" not in checker.tags and "img" not in checker.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "viewport" in text


def test_the_page_shows_what_was_measured():
    words = " ".join(" ".join(parsed(page()).text).split())
    for shown in (
        "0.350 below a smoothed trigram (1.750)",
        "the same 12,345 bytes of books, 777 bytes of code",
        "books (dashed: a smoothed trigram of the same training text, 1.790)",
        "held-out: code",
        "stack q_proj, k_proj, v_proj",
        "fuse-qkv",
        "2.3e-16 of 1.0e-12",
        "4.5e-15 of 1.0e-12",
        "2 regions share 2 graphs",
        "layers.0 to layers.1",
        "model.py:12 <attend>",
        "1 of 1 checks hold",
        "1 min 01 s",
        "1.2022",
        "[x]",
        "steps = 100 # <all>",
    ):
        assert shown in words, shown


def test_a_mixture_shows_each_source_beside_its_baseline():
    mixed = stages()
    found = {"bits_per_byte": 1.3333, "perplexity": 12.0, "tokens": 1000, "bytes": 4000}
    sources = {"code": found | {"trigram_bits_per_byte": 1.9}, "<prose>": found}
    mixed[0]["report"]["validation"]["sources"] = sources
    words = " ".join(" ".join(parsed(page(stages=mixed)).text).split())
    assert "Held-out text by source" in words and "<prose>" in words and "1.3333" in words and "1.90" in words
    mixed[0]["report"]["validation"]["sources"] = {"code": sources["code"]}
    assert "Held-out text by source" not in page(stages=mixed)


def test_text_of_the_model_is_text_and_never_markup():
    text = page(title="<script>x</script>", recipe_text="</pre><b>")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "</pre><b>" not in text
    assert parsed(text).tags.count("script") == 1


def test_a_worse_model_than_the_baseline_is_said():
    worse = stages()
    worse[0]["report"]["validation"] = {"bits_per_byte": 2.0, "trigram_bits_per_byte": 1.75}
    assert "0.250 ABOVE a smoothed trigram" in page(stages=worse)


@pytest.mark.parametrize("left_out", range(5))
def test_any_stage_may_be_missing(left_out):
    some = [one for index, one in enumerate(stages()) if index != left_out]
    parsed(page(stages=some))


def test_a_stage_of_a_third_party_shows_its_facts():
    assert "apples 1,234" in " ".join(parsed(page(stages=[stage("mine", "other", facts={"apples": 1234})])).text)


numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers)
def test_ticks_are_round_ascending_and_enclose(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 13
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=40))
def test_any_curve_draws_inside_its_box(losses):
    drawn = loss_chart([[step, loss] for step, loss in enumerate(losses)], {"a": [[step, -loss] for step, loss in enumerate(losses)]})
    parsed(drawn)
    assert "nan" not in drawn and "inf" not in drawn.replace("info", "")
    for path in re.findall(r" d='M([^']*)'", drawn):
        values = [float(number) for pair in path.split("L") for number in pair.split()]
        assert all(-0.01 <= value <= 100.01 for value in values)


@given(st.lists(st.floats(0, 20), min_size=2, max_size=20), st.one_of(st.none(), st.floats(0, 20)))
def test_the_validation_curve_and_its_baseline_stay_in_the_box(values, baseline):
    points = [[step, value] for step, value in enumerate(values)]
    drawn = validation_chart({"a": points, "b": points}, {} if baseline is None else {"b": baseline})
    parsed(drawn)
    assert drawn.count("class='level'") == (baseline is not None) and drawn.count("class='point'") == 2 * len(values)
    for height in re.findall(r"(?:top:|y1=')([-\d.]+)", drawn):
        assert -0.01 <= float(height) <= 100.01


def test_a_sample_that_ended_at_once_says_so():
    text = page(stages=[stage("samples", "generate", samples=[{"prompt": "x", "text": ""}])])
    assert "the model ended the text at once" in text


def test_a_pass_that_changed_nothing_shows_no_error():
    text = " ".join(" ".join(parsed(page()).text).split())
    assert "raise-mlp exact 0 - -" in text


@given(st.dictionaries(st.text(max_size=8), st.floats(0, 100), max_size=5))
def test_bars_are_never_longer_than_the_chart(values):
    drawn = bar_chart({"model": values}, {"model": "--c1"})
    parsed(drawn)
    shares = [float(share) for share in re.findall(r"calc\(([\d.]+) ", drawn)]
    assert len(shares) == len(values) and all(0 <= share <= 1 and math.isfinite(share) for share in shares)

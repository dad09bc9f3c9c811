"""Choosing formats, walking a program region by region, and what is shown of it."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ftc
from ftc.errors import FtcFailure
from ftc.quantize.budget import cheapest, total
from ftc.quantize.formats import Format
from ftc.quantize.picture import chart, joined, write_page
from ftc.quantize.sensitivity import Sensitivity, Unit, find_units, measure
from ftc.quantize.stream import walk

FORMATS = [Format.named("int4-g32"), Format.named("int8")]


def sensitivity_of(losses):
    units = [Unit(f"layers.{i}", ("w.weight",), ((8, 32 * (1 + i % 3)),), torch.float32) for i in range(len(losses))]
    found = Sensitivity(units, FORMATS, tokens=10)
    for unit, pair in zip(units, losses, strict=True):
        for format, kl in zip(FORMATS, pair, strict=True):
            found.kl[unit, format.name] = kl
    return found


LOSSES = st.lists(st.tuples(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-3)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(losses=LOSSES, budget=st.floats(1e-6, 0.2))
def test_a_choice_stays_within_the_budget_and_near_the_fewest_bytes(losses, budget):
    found = sensitivity_of(losses)
    choice = cheapest(found, budget)
    taken = sum(u.num_bytes(f) for u, f in choice.items())
    every = (dict(zip(found.units, kinds, strict=True)) for kinds in itertools.product([*FORMATS, None], repeat=len(found.units)))
    fewest = min(sum(u.num_bytes(f) for u, f in each.items()) for each in every if total(found, each) <= budget)
    largest = max(u.num_bytes(None) for u in found.units)
    assert total(found, choice) <= budget and fewest <= taken <= fewest + largest  # at most one unit from the best: the choice is greedy at the end


@given(losses=LOSSES, budgets=st.tuples(st.floats(1e-6, 0.2), st.floats(1e-6, 0.2)))
def test_with_no_budget_everything_stays_and_with_all_of_it_everything_is_coarse(losses, budgets):
    found = sensitivity_of(losses)
    assert all(f is None for f in cheapest(found, 0.0).values())
    assert all(f is FORMATS[0] for f in cheapest(found, 1.0).values())


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(blocks))
        self.head = nn.Linear(8, 17)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x) / (1 + x.square().mean())
        return self.head(x)


IDS = torch.randint(0, 17, (12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = Net().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ftc.capture(net, {"input_ids": IDS[:2]})


def test_a_walk_meets_every_region_once_with_what_a_run_gives_it(program):
    seen, expected = [], []
    for region in program.regions:
        region.around = lambda run, args, kwargs: expected.append(args[0]) or run(*args, **kwargs)
    with torch.no_grad():
        for batch in (IDS[:2], IDS[2:5]):
            program(input_ids=batch)
    for region in program.regions:
        region.around = None

    def visit(name, streams):
        seen.append((name, [args[0] for args, _ in streams[0]]))
        return [[program._regions[name]._run(*args, **kwargs) for args, kwargs in calls] for calls in streams]

    names = [region.ftc_name for region in program.regions]
    with torch.no_grad():
        walk(program, [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:5]}], visit, names, streams=2)
    assert [name for name, _ in seen] == names
    for number, (_, values) in enumerate(seen):
        assert torch.equal(values[0], expected[number]) and torch.equal(values[1], expected[3 + number])
    assert all(region.around is None for region in program.regions)


def test_a_walk_that_fails_leaves_the_program_as_it_was(program):
    def visit(name, streams):
        raise RuntimeError("of the visit")

    with pytest.raises(RuntimeError, match="of the visit"):
        walk(program, [{"input_ids": IDS[:2]}], visit, [r.ftc_name for r in program.regions])
    with pytest.raises(IndexError), torch.no_grad():
        walk(program, [{"input_ids": IDS[:2] + 100}], visit, [r.ftc_name for r in program.regions])
    assert all(region.around is None for region in program.regions) and program(input_ids=IDS[:2]).shape == (2, 10, 17)


def test_batches_that_part_are_refused(program):
    """One stream loses its middle block."""
    names, count = [region.ftc_name for region in program.regions], iter(range(100))
    region = program._regions[names[1]]
    inner = region.forward
    region.forward = lambda *args, **kwargs: args[0] if next(count) == 0 else inner(*args, **kwargs)
    try:
        with pytest.raises(FtcFailure, match="one order"):
            walk(program, [{"input_ids": IDS[:2]}], lambda name, streams: [[args[0] for args, _ in calls] for calls in streams], names)
    finally:
        del region.forward


def test_single_losses_add_up_and_are_shown(program, tmp_path):
    units = find_units(program, "product")
    assert len(units) == 6 and len(find_units(program, "layer")) == 3
    found, trials, loss = measure(program, units, FORMATS, [{"input_ids": IDS}], [{"input_ids": IDS}])
    assert all(found.kl[u, "int4-g32"] > found.kl[u, "int8-row"] > 0 for u in units)
    from ftc.quantize.sensitivity import assignments

    every = loss.of(assignments(dict.fromkeys(units, FORMATS[1])))
    assert 0.5 < every / total(found, dict.fromkeys(units, FORMATS[1])) < 2
    assert loss.of({}) == pytest.approx(0, abs=1e-12)
    record = json.loads(json.dumps(found.as_dict()))
    plans = {r.ftc_name: {"formats": {"0.weight": "int8-row"}, "sensitivity": record | {"units": [u for u in record["units"] if u["region"] == r.ftc_name]}} for r in program.regions}
    joint, formats, budget = joined(plans)
    assert joint["units"] == record["units"] and budget is None
    write_page(tmp_path / "s.html", "A <model>", joint, formats)
    page = (tmp_path / "s.html").read_text()
    assert page.count("<circle") == 12 and "A &lt;model&gt;" in page and "blocks.2" in page and chart(joint).count("<title>") == 12

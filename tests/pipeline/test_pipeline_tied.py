"""Parameters that several stages hold: every holder gets the sum of all gradients, to the same bit, and one of them counts it."""

import re

import pytest
import tied_work as work
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ftc.pipeline import TiedParameters


def check(results: list, missing: str = "") -> None:
    """Gradients against the sums of those before; each name counted once in all."""
    total: dict[str, torch.Tensor] = {}
    holders: dict[str, int] = {}
    for before, after, *_ in results:
        for index, grads in after.items():
            for name in grads:
                holders[name] = holders.get(name, 0) + 1
                grad = before[index].get(name, torch.zeros(work.SIZES[name]))
                total[name] = total.get(name, 0) + grad.double()
    seen: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(total, 0)
    for before, after, counted, _ in results:
        for index, grads in after.items():
            for name, grad in grads.items():
                assert torch.equal(seen.setdefault(name, grad), grad)
                assert torch.allclose(grad.double(), total[name], rtol=1e-6, atol=1e-6)
                if holders[name] == 1:
                    assert torch.equal(grad, before[index][name])
                counts[name] += name in counted[index]
    assert set(counts.values()) == {1}


@given(
    names=st.lists(st.text("abcd", min_size=1, max_size=4).map(lambda s: "".join(sorted(set(s)))), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    bucket=st.sampled_from([None, 1, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_stages_of_one_process_are_summed(names, seed, bucket, dtype):
    results = [work.reduced([list(enumerate(names))], seed, bucket_bytes=bucket, dtype=dtype)]
    if dtype == torch.bfloat16:  # rounded at each addition: the bits of the holders are compared alone
        _, after, counted, _ = results[0]
        for name in work.SIZES:
            held = [grads[name] for grads in after.values() if name in grads]
            assert all(torch.equal(grad, held[0]) for grad in held)
            assert sum(name in names for names in counted.values()) == bool(held)
    else:
        check(results)


@pytest.mark.parametrize(
    ("holders", "missing"),
    [
        ([[(0, "ab")], [(1, "bc")]], ""),  # tied embedding and head
        ([[(0, "ab"), (3, "bc")], [(1, "d"), (2, "d")]], ""),  # the same on one rank of a V, and a tie between its neighbours
        ([[(0, "abc"), (3, "ad")], [(1, "bd"), (2, "ab")]], "a"),  # four holders, one without a gradient
        ([[(0, "ab"), (1, "cd")], [(1, "cd"), (0, "ab")]], ""),  # mirrored stages
        ([[(0, "a")], []], ""),  # a rank that shares nothing
    ],
)
@pytest.mark.parametrize("bucket", [None, 30])
def test_ranks_are_summed(ranks, holders, missing, bucket):
    check(ranks.run(work.reduced, holders, 3, missing, bucket, size=2), missing)


def test_four_ranks_that_hold_the_same_agree_to_the_bit(ranks):
    check(ranks.run(work.reduced, [[(0, "abc")], [(1, "ad")], [(2, "ab")], [(3, "abcd")]], 5))


def test_shards_are_summed(ranks):
    results = ranks.run(work.on_shards, 7)
    check(results[::2])
    check(results[1::2])


def test_what_is_counted_is_what_is_named(ranks):
    for _, after, counted, shapes in ranks.run(work.reduced, [[(0, "ab")], [(1, "bc")]], 3, size=2):
        (index,) = after
        assert shapes == [work.SIZES[name] for name in after[index] if name in counted[index]]
    assert shapes == [work.SIZES["c"]]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("values", r"b is one parameter of the program, but its copies differ \(stages 0 on rank 0, 1 on rank 1\)"),
        ("trained", "the holders of b differ in trained: True on stage 0 of rank 0, False on stage 1 of rank 1"),
        ("sizes", r"the holders of b differ in sizes: \(7,\) on stage 0"),
        ("dtype", "the holders of b differ in dtype: torch.float32 on stage 0"),
        ("meta", "no memory yet"),
    ],
)
def test_holders_that_differ_are_refused(ranks, how, said):
    for told in ranks.run(work.refused, how, size=2):
        assert re.search(said, told), told


def test_simulated_tensors_are_summed_without_being_compared():
    with FakeTensorMode():
        stages = [work.Holder(0, "ab"), work.Holder(1, "b")]
        for stage in stages:
            for parameter in stage.parameters():
                parameter.grad = torch.ones_like(parameter)
        tied = TiedParameters(stages)
        tied.reduce_gradients()
    assert tied.counted() == [{"a", "b"}, set()]

"""torch's schedules over stages of a program on gloo ranks against one process: loss and every gradient to 1e-5 relative in float32.

Under FSDP2 DualPipeV runs by ours: torch's takes gradients of a stage together before its last weight gradients are there (torch 2.13).
"""

import functools

import pipeline_cases as cases
import pipeline_work as work
import pytest
import torch

alone = functools.cache(lambda name, passes, layers: work.alone(name, list(passes), layers))
SPLIT, PLAIN = ["ZBVZeroBubble", "DualPipeV"], ["1F1B", "Interleaved1F1B"]


def gathered(results: list) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and each gradient once. Holders of one parameter have the same bits, and one of them counts it."""
    losses = {result[0] for result in results if result[0] is not None}
    assert len(losses) == 1
    total: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for _, found, counted, *_ in results:
        for stage, grads in found.items():
            for name, grad in grads.items():
                assert name not in total or torch.equal(total[name], grad)
                total[name] = grad
                counts[name] = counts.get(name, 0) + (name in counted[stage])
    assert len(set(counts.values())) == 1 and 0 not in counts.values()
    return losses.pop(), total


def check(results: list, name: str, passes: tuple, layers: int) -> None:
    loss, grads = gathered(results)
    expected_loss, expected = alone(name, passes, layers)
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)
    assert cases.largest_error(grads, expected) <= 1e-5


def on_ranks(ranks, size: int, name: str, passes: tuple, layers: int, schedules: list[str], **options) -> None:
    wanted = [(schedule, size if schedule == "1F1B" else 2 * size) for schedule in schedules]
    found = ranks.run(work.scheduled, name, list(passes), layers, wanted, size=size, **options)
    for results in zip(*found, strict=True):
        check(results, name, passes, layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes", "schedules"),
    [
        ("tied decoder", ("add-mtp", "chunk-cross-entropy"), PLAIN),
        ("tied Llama", (), PLAIN + SPLIT),
    ],
)
def test_schedules_on_two_ranks_are_one_process(ranks, name, passes, schedules):
    on_ranks(ranks, 2, name, passes, 4, schedules)


@pytest.mark.slow
def test_schedules_on_four_ranks_are_one_process(ranks):
    on_ranks(ranks, 4, "decoder", ("add-mtp", "chunk-cross-entropy"), 7, PLAIN + SPLIT)


def test_sizes_that_torch_finds_out_by_itself_are_those_of_the_examples(ranks):
    on_ranks(ranks, 2, "tied decoder", (), 4, ["1F1B"], static=False)


def test_a_tied_gradient_that_is_not_reduced_is_seen(ranks):
    results = [found[0] for found in ranks.run(work.scheduled, "tied decoder", [], 4, [("1F1B", 2)], reduce=False, size=2)]
    with pytest.raises(AssertionError):
        check(results, "tied decoder", (), 4)
    _, expected = alone("tied decoder", (), 4)
    parts = [found[stage]["embed_tokens.weight"] for _, found, _ in results for stage in found]
    assert cases.largest_error({"E": parts[0] + parts[1]}, {"E": expected["embed_tokens.weight"]}) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "num_stages", "torchs"), [("1F1B", 2, True), ("Interleaved1F1B", 4, True), ("DualPipeV", 4, False)])
def test_fsdp_under_a_pipeline_is_one_process(ranks, schedule, num_stages, torchs):
    passes = ("add-mtp",)
    results = ranks.run(work.sharded, "tied decoder", list(passes), 4, schedule, num_stages, torchs)
    check(results, "tied decoder", passes, 4)
    _, expected = alone("tied decoder", passes, 4)
    whole = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt().item()
    assert all(abs(norm - whole) <= 1e-5 * whole for *_, norm in results)


@pytest.mark.slow
def test_tensor_parallel_under_a_pipeline_is_one_process(ranks):
    check(ranks.run(work.divided, "tied decoder", 4, "Interleaved1F1B", 4), "tied decoder", (), 4)

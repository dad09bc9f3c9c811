"""The loader: one sequence of samples for any number of processes, and a state that any other number loads."""

import pytest
from helpers_data import Bytes, stored, stream, texts
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchtitan")
from ftc.train import device  # noqa: E402

device.install()
from ftc.data.mixture import Mixture, check_size, tokens_by_source  # noqa: E402
from ftc.data.stored_windows import DocumentWindows, StreamWindows  # noqa: E402
from ftc.data.streamed_windows import StreamedWindows  # noqa: E402
from ftc.errors import FtcError  # noqa: E402
from ftc.train.dataloader import PackedDataLoader  # noqa: E402

SIZE = 8


def mixed(streams: bool, seed: int = 0, shares=(0.75, 0.25)) -> Mixture:
    first = texts(100, 30, seed)
    windows = (
        StreamedWindows(stream(first, seed), Bytes(), SIZE, True, True)
        if streams
        else DocumentWindows(stored(first), Bytes(), SIZE, True, seed, "a"),
        StreamWindows(stored(texts(40, 30, seed + 1)), Bytes(), SIZE, True, seed, "b"),
    )
    return Mixture(("a", "b"), shares, windows, SIZE, streams)


def rows(batches):
    """What the batches of all processes of some steps hold, one tuple a window."""
    return [
        (tuple(inputs["input"][row].tolist()), tuple(labels[row].tolist()), tuple(inputs["position_ids"][row].tolist()))
        for inputs, labels in batches
        for row in range(len(labels))
    ]


def run(streams, seed, batch, ranks, steps, checkpoint=None):
    """`steps` steps of `ranks` processes, from the checkpoint that others wrote: windows by step, and a checkpoint."""
    loaders = [PackedDataLoader(mixed(streams, seed), batch, rank, ranks) for rank in range(ranks)]
    merged, by_step = {}, [[] for _ in range(steps)]
    for loader in loaders:
        if checkpoint is not None:
            wanted = loader.state_dict()
            assert set(wanted) <= set(checkpoint)  # what torch's distributed checkpoint loads is what is asked for
            loader.load_state_dict({key: checkpoint[key] for key in wanted})
        iterator = iter(loader)
        for step in range(steps):
            by_step[step] += rows([next(iterator)])
        state = loader.state_dict()
        assert all(merged.get(key, value) == value for key, value in state.items())
        merged |= state
        loader.close()
    assert set(merged) == {"samples", *(f"lane_{lane}" for lane in range(64))}
    return [sorted(step) for step in by_step], merged, [sum(counts) for counts in zip(*(each.tokens() for each in loaders), strict=True)]


@pytest.mark.parametrize("streams", [False, True])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 5),
    before=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8])),
    after=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8])),
    stop=st.integers(0, 6),
)
def test_a_checkpoint_of_any_number_of_processes_goes_on_on_any_other(streams, seed, before, after, stop):
    first, checkpoint, _ = run(streams, seed, *before, stop)
    second, _, tokens = run(streams, seed, *after, 4, checkpoint)
    total = stop * before[0] * before[1] + 4 * after[0] * after[1]
    whole, _, expected = run(streams, seed, 1, 1, total)
    flat = [window for step in whole for window in step]
    cut = 0
    for steps, each in ((first, before[0] * before[1]), (second, after[0] * after[1])):
        for step in steps:
            assert step == sorted(flat[cut : cut + each])
            cut += each
    assert tokens == expected


def test_the_state_counts_what_was_given_not_what_was_made_ahead():
    loader = PackedDataLoader(mixed(True), 2)
    iterator = iter(loader)
    whole = [rows([next(iterator)]) for _ in range(9)]
    again = PackedDataLoader(mixed(True), 2)
    iterator = iter(again)
    for _ in range(4):
        next(iterator)
    state = again.state_dict()
    again.load_state_dict({})  # nothing was stored: nothing changes
    third = PackedDataLoader(mixed(True), 2)
    third.load_state_dict(state)
    assert third.state_dict() == state
    iterator = iter(third)
    assert [rows([next(iterator)]) for _ in range(5)] == whole[4:]
    for each in (loader, again, third):
        each.close()
        each.close()


def test_labels_and_positions_travel_with_the_inputs():
    inputs, labels = next(iter(PackedDataLoader(mixed(False), 3, with_labels=True)))
    assert set(inputs) == {"input", "position_ids", "labels"} and (inputs["labels"] == labels).all()
    plain = StreamWindows(stored(texts(40, 30)), Bytes(), SIZE, False, 0, "b")
    inputs, labels = next(iter(PackedDataLoader(Mixture(("b",), (1.0,), (plain,), SIZE, False), 3)))
    assert set(inputs) == {"input"} and (inputs["input"][:, 1:] == labels[:, :-1]).all()


def test_errors_of_a_stream_reach_the_training_loop():
    broken = StreamedWindows(stream(texts(5, 9)), Bytes(), SIZE, False, False)
    loader = PackedDataLoader(Mixture(("b",), (1.0,), (broken,), SIZE, True), 3)
    with pytest.raises(FtcError, match="a stream needs at least 64"):
        next(iter(loader))


def test_what_a_run_cannot_be_given_is_known_before_it():
    mixture = mixed(False)
    tokens = [windows.num_tokens for windows in mixture.windows]
    check_size(mixture, 16, 10**6)
    with pytest.raises(FtcError, match=rf"text of 'a' has {tokens[0]} tokens, .*one step takes 7500"):
        check_size(mixture, 10_000, 1)
    mixture.windows[1].max_epochs = 2
    steps = int(2 * tokens[1] / (0.25 * 16 * SIZE))
    check_size(mixture, 16, steps)
    steps = int(2.5 * tokens[1] / (0.25 * 16 * SIZE))
    with pytest.raises(FtcError, match=r"would read the source 'b' 2\.\d+ times, and its max_epochs is 2"):
        check_size(mixture, 16, steps)


def test_the_report_of_what_was_given():
    report = tokens_by_source(mixed(False), [300, 100])
    assert report["a"]["share"] == 0.75 and report["b"]["tokens"] == 100 and report["a"]["epochs"] > 0
    assert "epochs" not in tokens_by_source(mixed(True), [300, 100])["a"]

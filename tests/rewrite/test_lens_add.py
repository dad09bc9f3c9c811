"""Add and Drop: parameters come and go, other tensors and Adam's state stay as they are."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.rewrite.lens import Compose, lens_from_dict, map_optimizer_state
from ftc.rewrite.lens_add import FILLS, Add, Drop


@st.composite
def adds(draw):
    """An Add, and tensors that it can be applied to."""
    rows, widths = draw(st.integers(1, 6)), tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype, fill = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])), draw(st.sampled_from(FILLS))
    shape = (rows, sum(widths)) if fill == "identity" else (rows, draw(st.integers(1, 6)))
    tensors = {"w": torch.randn(shape if fill == "copy" else (3, 4)).to(dtype), "other": torch.randn(2)}
    return Add("a.new", "w", fill, shape, tuple(0.5 + i for i in range(len(widths))), widths, draw(st.integers(0, 9))), tensors


@settings(deadline=None)
@given(adds())
def test_there_and_back_leaves_the_others_untouched(case):
    lens, tensors = case
    grown = lens.forward(tensors)
    assert list(grown) == [*tensors, "a.new"] and grown["a.new"].shape == lens.shape
    assert grown["a.new"].dtype == tensors["w"].dtype
    assert torch.equal(grown["a.new"], lens.forward(tensors)["a.new"])  # the same whenever it is made
    back = lens.backward(grown)
    assert back.keys() == tensors.keys() and all(back[n] is tensors[n] for n in tensors)
    assert lens_from_dict(json.loads(json.dumps(lens.as_dict()))) == lens
    prefixed = lens.with_prefix("m.")
    assert torch.equal(prefixed.forward({f"m.{n}": t for n, t in tensors.items()})["m.a.new"], grown["a.new"]) or lens.fill == "normal"
    gone = Compose((lens, Drop("a.new")))
    assert gone.forward(tensors).keys() == tensors.keys() == gone.backward(tensors).keys()


def test_identity_puts_scaled_blocks_side_by_side():
    made = Add("m", "w", "identity", (2, 5), (0.5, 2.0), (2, 3)).forward({"w": torch.zeros(1)})["m"]
    assert torch.equal(made, torch.tensor([[0.5, 0, 2, 0, 0], [0, 0.5, 0, 2, 0]]))


def test_optimizer_state_passes_and_the_new_parameter_has_none_yet():
    state = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    lens = Add("new", "w", "copy", (2,))
    assert map_optimizer_state(lens, state) == state
    trained = {**state, "new": {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    assert map_optimizer_state(lens, trained, backward=True).keys() == state.keys()
    assert map_optimizer_state(Drop("new"), trained).keys() == state.keys()


@pytest.mark.parametrize(
    ("lens", "tensors", "message"),
    [
        (Add("new", "wx", "ones", (2,)), {"w": torch.ones(2)}, "misses wx"),
        (Add("w", "w", "ones", (2,)), {"w": torch.ones(2)}, "would overwrite w"),
        (Add("new", "w", "copy", (3,)), {"w": torch.ones(2)}, "copies 'w'"),
        (Drop("x"), {"w": torch.ones(2)}, "misses x"),
    ],
)
def test_what_does_not_fit_is_an_error(lens, tensors, message):
    with pytest.raises(FtcError, match=message):
        lens.forward(tensors)
    with pytest.raises(FtcError, match="did you mean 'ones'"):
        Add("new", "w", "one", (2,))

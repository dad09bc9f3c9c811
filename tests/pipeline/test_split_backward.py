"""The backward pass in two parts gives the bits of a whole one, for every kind of region and of code around it."""

import functools
import gc

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from split_ranks import VOCABULARY, even, model
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftc
from ftc.errors import FtcError
from ftc.pipeline import cut
from ftc.pipeline.split_backward import SplitFunction, WeightGradients, _of_functions, putting_off, split_backward
from ftc.pipeline.weight_gradients_store import AtOnce

MODELS = {
    "dense": ("tiny", ()),
    "latent": ("tiny-mla", ()),
    "experts": ("tiny-moe", ()),
    "fused experts": ("tiny-moe", ("raise", "fuse-moe", "balance")),
}
FEW = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])


@functools.cache
def stages_of(kind: str) -> tuple:
    """(the program, its two stages) with three regions; captured once."""
    name, passes = MODELS[kind]
    program = model(name, 3, passes)
    return program, even(program, 2)


def forget(*stages) -> None:
    """Undo `split_backward`."""
    for stage in stages:
        stage.body.runner = None
        for region in stage.body.regions:
            region.around = None


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


def run(stages, ids, weighing, later=(None, None)) -> torch.Tensor:
    """One microbatch through two stages, and back; `later`: where each leaves its weight gradients."""
    sent = stages[0](input_ids=ids)
    received = [t.detach().requires_grad_(t.requires_grad) for t in sent]
    result = stages[1](*received, input_ids=ids)
    with putting_off(later[1]):
        (result * weighing).sum().backward()
    pairs = [(t, r.grad) for t, r in zip(sent, received, strict=True) if r.grad is not None]
    with putting_off(later[0]):
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return result.detach()


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        (f is None) == (e is None) and (f is None or torch.equal(f, e)) for f, e in zip(found.values(), expected.values(), strict=True)
    )


def drawn(seed: int, batch: int = 2, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return ids, torch.randn(batch, length, VOCABULARY, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@FEW
@given(seed=st.integers(0, 999), batch=st.integers(2, 3), length=st.integers(7, 11))
def test_two_parts_give_the_bits_of_a_whole_backward_pass(kind, seed, batch, length):
    program, stages = stages_of(kind)
    ids, weighing = drawn(seed, batch, length)
    forget(*stages)
    output, plain = run(stages, ids, weighing), gradients(program)
    for stage in stages:
        split_backward(stage.body)
    assert torch.equal(run(stages, ids, weighing), output)
    assert same(gradients(program), plain)
    later = WeightGradients(), WeightGradients()
    run(stages, ids, weighing, later)
    assert all(parameter.grad is None for parameter in program.parameters()), "input gradients alone leave .grad as it is"
    for store in later:
        store.compute()
        assert len(store) == 0
    assert same(gradients(program), plain)


def test_a_dropped_weight_gradient_is_missed():
    program, stages = stages_of("dense")
    ids, weighing = drawn(0)
    for stage in stages:
        split_backward(stage.body)
    run(stages, ids, weighing)
    whole = gradients(program)
    for dropped in range(2):
        later = WeightGradients(), WeightGradients()
        run(stages, ids, weighing, later)
        assert [len(store) for store in later] == [2, 3]  # embedding and one region; two regions and the head
        later[1].work.pop(dropped)
        for store in later:
            store.compute()
        assert not same(gradients(program), whole)


@pytest.mark.slow
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 999), data=st.data())
def test_frozen_weights_stay_without_a_gradient(seed, data):
    program, stages = stages_of("dense")
    names = [name for name, _ in program.named_parameters()]
    frozen = set(data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names) - 1, unique=True)))
    ids, weighing = drawn(seed)
    try:
        for name, parameter in program.named_parameters():
            parameter.requires_grad_(name not in frozen)
        forget(*stages)
        if not stages[0](input_ids=ids)[0].requires_grad and not stages[1](*stages[0](input_ids=ids), input_ids=ids).requires_grad:
            return
        run_any(stages, ids, weighing)
        plain = gradients(program)
        for stage in stages:
            split_backward(stage.body)
        later = WeightGradients(), WeightGradients()
        run_any(stages, ids, weighing, later)
        for store in later:
            store.compute()
        found = gradients(program)
        assert same(found, plain)
        assert all(found[name] is None for name in frozen)
    finally:
        for parameter in program.parameters():
            parameter.requires_grad_(True)


def run_any(stages, ids, weighing, later=(None, None)) -> None:
    """As `run`, where the first stage may have nothing to train."""
    sent = stages[0](input_ids=ids)
    received = [t.detach().requires_grad_(t.requires_grad) for t in sent]
    result = stages[1](*received, input_ids=ids)
    if result.requires_grad:
        with putting_off(later[1]):
            (result * weighing).sum().backward()
    pairs = [(t, r.grad) for t, r in zip(sent, received, strict=True) if r.grad is not None]
    if pairs:
        with putting_off(later[0]):
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def _recomputed(run, args, kwargs):
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "fused experts"])
def test_recomputed_regions_are_split_as_well(kind):
    program, stages = stages_of(kind)
    ids, weighing = drawn(3)
    forget(*stages)
    run(stages, ids, weighing)
    plain = gradients(program)
    for stage in stages:
        for region in stage.body.regions:
            region.around = _recomputed
        split_backward(stage.body)
    later = WeightGradients(), WeightGradients()
    run(stages, ids, weighing, later)
    assert all(parameter.grad is None for parameter in program.parameters())
    for store in later:
        store.compute()
    assert same(gradients(program), plain)


@pytest.mark.slow
def test_compiled_regions_are_split_as_well():
    program = model("tiny", 2)
    stages = even(program, 2)
    ids, weighing = drawn(4)
    run(stages, ids, weighing)
    plain = gradients(program)
    program.compile(backend="aot_eager")
    for stage in stages:
        split_backward(stage.body)
    run(stages, ids, weighing)
    assert same(gradients(program), plain)
    later = WeightGradients(), WeightGradients()
    run(stages, ids, weighing, later)
    for store in later:
        store.compute()
    assert same(gradients(program), plain)


def test_microbatches_add_up_in_any_order_of_their_second_parts():
    program, stages = stages_of("dense")
    for stage in stages:
        split_backward(stage.body)
    batches = [drawn(seed) for seed in range(3)]
    for ids, weighing in batches:
        run(stages, ids, weighing)
    whole = gradients(program)
    stores = []
    for ids, weighing in batches:
        later = WeightGradients(), WeightGradients()
        run(stages, ids, weighing, later)
        stores.append(later)
    for later in stores:
        for store in later:
            store.compute()
    assert same(gradients(program), whole)


class Block(nn.Module):
    """A block with dropout, a convolution over the tokens and a norm that gives both gradients at once."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.3)
        self.mix, self.out = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, x_BTD):
        mixed = self.mix(self.norm(x_BTD).transpose(1, 2)).transpose(1, 2)
        return x_BTD + self.dropout(self.out(torch.relu(mixed)))


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(block(16) for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids):
        x_BTD = self.embed(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


def test_random_masks_are_those_of_the_forward_pass():
    torch.manual_seed(0)
    program = ftc.capture(Model().train(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)})
    stages = cut(program, (1,))
    ids, weighing = drawn(5)
    for stage in stages:
        split_backward(stage.body)
    torch.manual_seed(7)
    run(stages, ids, weighing)
    whole = gradients(program)
    later = WeightGradients(), WeightGradients()
    torch.manual_seed(7)
    run(stages, ids, weighing, later)
    torch.manual_seed(8)  # what is drawn now must not matter
    for store in later:
        store.compute()
    assert same(gradients(program), whole)


def test_twins_share_traces_and_sizes_are_symbols():
    program = model("tiny", 3)
    stages = even(program, 2)
    for stage in stages:
        split_backward(stage.body)
    for seed, batch, length in ((0, 2, 9), (1, 3, 7), (2, 4, 12)):
        ids, weighing = drawn(seed, batch, length)
        run(stages, ids, weighing)
        gradients(program)
    assert _traces_of(program.regions) == [1]
    ids, weighing = drawn(3, 1, 9)  # a batch of one is a graph of its own
    run(stages, ids, weighing)
    assert _traces_of(program.regions) == [1, 1]


def _traces_of(regions) -> list[int]:
    """How many traces each split function of the regions has made."""
    functions = {variant.function for region in regions for variant in region.code.all_variants()}
    made = [split for function in functions for split in _of_functions.get(function, {}).values()]
    return [sum(map(len, split.traces.values())) for split in made]


def test_what_only_the_input_half_needs_is_freed_after_it():
    freed = _held_after(later := WeightGradients())
    whole = _held_after(None)
    assert freed["forward"] == whole["forward"]
    assert 0 < freed["after"] < 0.8 * freed["forward"] and whole["after"] == 0
    later.compute()


def _held_after(later) -> dict[str, int]:
    """Bytes of tensors (but weights) that live because of one region, after its forward and after its backward pass."""
    width, weight_1, weight_2 = 32, *(torch.randn(32, 32, requires_grad=True) for _ in range(2))

    def function(w_1, w_2, x):  # exp and sigmoid keep their results for input gradients alone
        return (torch.sigmoid(torch.exp((x @ w_1) / 50).sigmoid().exp()) @ w_2,)

    split = SplitFunction(function, [[True, False]], None, "a region")
    x = torch.randn(40, width, requires_grad=True)
    split([weight_1, weight_2], [x])
    before = _bytes()
    (y,) = split([weight_1, weight_2], [x])
    forward = _bytes() - before - y.nbytes
    gradient = torch.randn_like(y)
    with putting_off(later):
        y.backward(gradient)
    del y
    kept = 0 if later is None else later.num_bytes
    return {"forward": forward, "after": kept - (gradient.nbytes if kept else 0)}


def _bytes() -> int:
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and not thing.is_meta and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@FEW
@given(seed=st.integers(0, 99))
def test_results_may_be_arguments_views_and_numbers_without_gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, generator=generator, requires_grad=True)
    x = torch.randn(3, 4, generator=generator, requires_grad=True)

    def function(w, x, y):
        made = x @ w
        left, right = made.split(2, 1)
        return x, x[:, 1:], made.argmax(1), left, right, made.t(), y, w

    split = SplitFunction(function, [[True, False], [True]], None, "a region")
    y = torch.arange(3)
    expected, found = function(weight, x, y), split([weight], [x, y])
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    assert [f.requires_grad for f in found] == [e.requires_grad for e in expected]
    roots = [i for i, e in enumerate(expected) if e.requires_grad]
    sent = [torch.randn(expected[i].shape, generator=generator) for i in roots]
    torch.autograd.backward([expected[i] for i in roots], sent)
    plain, weight.grad, x.grad = (weight.grad, x.grad), None, None
    later = WeightGradients()
    with putting_off(later):
        torch.autograd.backward([found[i] for i in roots], sent)
    later.compute()
    torch.testing.assert_close((weight.grad, x.grad), plain, rtol=1e-6, atol=1e-6)


def test_an_argument_given_twice_has_one_gradient():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)

    def function(v, w, x, y):
        return (x @ v + torch.relu(y @ w),)

    split = SplitFunction(function, [[True, False]] * 2, None, "a region")
    function(weight, weight, x, x)[0].sum().backward()
    plain, weight.grad, x.grad = (weight.grad, x.grad), None, None
    later = WeightGradients()
    with putting_off(later):
        split([weight, weight], [x, x])[0].sum().backward()
    assert weight.grad is None
    later.compute()
    assert torch.equal(weight.grad, plain[0]) and torch.equal(x.grad, plain[1])


@pytest.mark.parametrize("store", [WeightGradients, AtOnce])
def test_gradients_have_memory_of_their_own(store):
    first, second = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    split = SplitFunction(lambda v, w, x: (x + v + w,), [[False, False]], None, "a region")
    x, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    kept = gradient.clone()
    for times in (1, 2, 3):
        later = store()
        with putting_off(later):
            split([first, second], [x])[0].backward(gradient)
        later.compute()
        assert all(torch.equal(t.grad, times * kept) for t in (first, second)) and torch.equal(gradient, kept)
        torch.testing.assert_close(x.grad, times * kept)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_somebody_waits_for_is_refused(hook):
    weight = torch.randn(4, 4, requires_grad=True)
    split = SplitFunction(lambda w, x: (x @ w,), [[True, False]], None, "a region")
    (y,) = split([weight], [torch.randn(3, 4)])
    getattr(weight, hook)(lambda t: None)
    with putting_off(WeightGradients()), pytest.raises(FtcError, match=hook):
        y.sum().backward()
    y = split([weight], [torch.randn(3, 4)])[0]
    y.sum().backward()  # a whole backward pass has the gradient
    assert weight.grad is not None


def test_a_region_that_writes_into_its_buffers_is_refused():
    weight, count = torch.randn(4, 4, requires_grad=True), torch.zeros(4)

    def function(w, c, x):
        c.add_(1)
        return (x @ w + c,)

    split = SplitFunction(function, [[True, False]], None, "region layers.3")
    with pytest.raises(FtcError, match=r"layers\.3 writes into its inputs or buffers.*1F1B"):
        split([weight, count], [torch.randn(3, 4)])

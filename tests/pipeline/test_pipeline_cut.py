"""Stages called in sequence are the program: the same bits forward, every gradient to 1e-12 in float64, wherever it is cut."""

import functools
import itertools

import pipeline_cases as cases
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pipeline_odd import VOCABULARY, Backwards, InPlace, Odd, Optional, Scaled
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftc
from ftc.errors import FtcError
from ftc.pipeline import cut

PASSES = {
    "none": (),
    "chunked": ("raise", "fuse-qkv", "chunk-cross-entropy"),
    "mtp": ("add-mtp",),
    "mtp chunked": (("add-mtp", {"depth": 2}), "chunk-cross-entropy"),
    "parallel mtp": (("add-mtp", {"kind": "parallel"}),),
    "balance": (("balance", {"switch": 0.1, "z": 0.01, "sequence": 0.05}),),
}


@functools.cache
def program_of(name: str, passes: str, packed: bool = False):
    return cases.program_of(name, PASSES[passes], given=cases.batch(packed=packed), dtype=torch.float64)


def every_cut(count: int) -> list[tuple[int, ...]]:
    """All bounds of so many regions."""
    return [bounds for size in range(count) for bounds in itertools.combinations(range(1, count), size)]


def assert_same(program, bounds, given, loss=cases.loss_of):
    """Results, extras and gradients of the stages against the program's."""
    program.zero_grad()
    expected, named = program.with_extras(**given)
    loss(expected).backward()
    gradients = cases.gradients(program)
    program.zero_grad()
    stages = cut(program, bounds)
    found, extras = cases.run_stages(stages, given, extras=True)
    loss(found).backward()
    for a, b in zip(torch.utils._pytree.tree_leaves((found, extras)), torch.utils._pytree.tree_leaves((expected, named)), strict=True):
        assert torch.equal(a, b)
    assert set(extras) == set(named)
    assert cases.largest_error(cases.summed_gradients(stages), gradients) <= 1e-12
    plain = torch.utils._pytree.tree_leaves(cases.run_stages(stages, given))
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.utils._pytree.tree_leaves(expected), strict=True))


@pytest.mark.parametrize(
    ("name", "passes"),
    [("decoder", "none"), ("tied decoder", "chunked"), ("tied decoder", "mtp"), ("mixture", "balance")],
)
def test_every_cut_is_the_program(name, passes):
    program = program_of(name, passes, True)
    for bounds in every_cut(len(program.regions)):
        assert_same(program, bounds, cases.batch(packed=True))


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    case=st.sampled_from([("tied decoder", "mtp chunked"), ("decoder", "parallel mtp"), ("mixture", "none")]),
    chosen=st.sets(st.integers(1, 3), max_size=3),
    sizes=st.tuples(st.integers(2, 5), st.integers(4, 24)),
    seed=st.integers(0, 2**16),
)
def test_stages_are_the_program_for_any_batch(case, chosen, sizes, seed):
    assert_same(program_of(*case), sorted(chosen), cases.batch(*sizes, seed=seed))


@pytest.mark.parametrize("name", ["tied Llama", "Gemma3Text"])
def test_models_of_hugging_face_are_cut(name):
    pytest.importorskip("transformers")
    program = program_of(name, "none")
    assert_same(program, (1, 2, 3), cases.batch())
    masked = cases.batch() | {"attention_mask": (torch.arange(16) >= torch.tensor([0, 3, 5, 0])[:, None]).long()}
    assert_same(program, (1, 3), masked)  # a structure of inputs that was not there when the program was captured


def test_values_for_later_blocks_cross_the_stages_between():
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 5))
    program = ftc.capture(Odd().double(), {"ids": ids})
    for bounds in every_cut(4):
        assert_same(program, bounds, {"ids": ids}, lambda result: result[0].square().sum() + result[1])


def test_only_the_hidden_states_of_a_decoder_cross():
    given = cases.batch(packed=True)
    for name in ("decoder", "tied decoder"):
        for stage in cut(program_of(name, "chunked", True), (1, 2, 3)):
            takes, gives = stage.examples(given)
            assert [t.shape for t in takes] == ([] if stage.is_first else [(4, 16, 32)])
            assert stage.is_last or [t.shape for t in gives] == [(4, 16, 32)]


@pytest.mark.parametrize(("name", "passes"), [("tied decoder", "mtp chunked"), ("mixture", "none")])
@pytest.mark.parametrize("frozen", ["", "embed_tokens", "layers.0"])
def test_examples_are_what_crosses(name, passes, frozen):
    program, given = program_of(name, passes), cases.batch(3, 10)
    held = [parameter for word, parameter in program.named_parameters() if frozen and word.startswith(frozen)]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        for extras in (False, True):
            crossing: tuple = ()
            for stage in cut(program, (1, 3)):
                takes, gives = stage.examples(given, extras)
                assert_described(takes, crossing)
                crossing = stage(*crossing, ftc_extras=extras, **given)
                assert_described(gives, crossing)
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def assert_described(examples, actual) -> None:
    examples, actual = torch.utils._pytree.tree_leaves(examples), torch.utils._pytree.tree_leaves(actual)
    for a, b in zip(examples, actual, strict=True):
        assert a.is_meta and (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), b.requires_grad)


def test_each_parameter_and_buffer_has_a_place_under_its_name():
    torch.manual_seed(0)
    odd = ftc.capture(Odd(), {"ids": torch.zeros(2, 5, dtype=torch.long)})
    for program in (odd, program_of("tied decoder", "mtp", True), program_of("mixture", "balance", True)):
        stages = cut(program, (1, 3))
        own = [dict(stage.body.named_parameters()) for stage in stages]
        assert set().union(*own) == set(dict(program.named_parameters()))
        for name, parameter in program.named_parameters():
            held = [(stage.index, names[name]) for stage, names in zip(stages, own, strict=True) if name in names]
            assert held[0][1] is parameter and all(torch.equal(copy, parameter) and copy is not parameter for _, copy in held[1:])
            assert stages[held[0][0]].shared.get(name, (held[0][0],)) == tuple(index for index, _ in held)
        state = {name: tensor for stage in stages for name, tensor in stage.body.state_dict().items()}
        assert set(state) <= set(program.state_dict()) and all(torch.equal(tensor, program.state_dict()[name]) for name, tensor in state.items())
        assert set(dict(program.named_buffers())) == {name for stage in stages for name, _ in stage.body.named_buffers()}
        assert [region for stage in stages for region in stage.body.regions] == program.regions


def test_balance_counts_and_pushes_as_in_the_program():
    program, given = cases.program_of("mixture", PASSES["balance"]), cases.batch()
    tallies = {name: buffer for name, buffer in program.named_buffers() if name.endswith("balance_tally")}

    def counted(run) -> tuple[dict, dict]:
        for tally in tallies.values():
            tally.zero_()
        program.zero_grad()
        cases.loss_of(run()).backward()
        return {name: tally.clone() for name, tally in tallies.items()}, cases.gradients(program)

    expected, gradients = counted(lambda: program(**given))
    for region in program.regions:  # recomputed, region by region, as a trainer would
        region.around = lambda run, args, kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    found, pushed = counted(lambda: cases.run_stages(cut(program, (1, 2)), given))
    assert tallies and all(torch.equal(found[name], expected[name]) and expected[name].sum() > 0 for name in tallies)
    assert cases.largest_error(pushed, gradients) == 0


def test_regions_are_run_by_what_is_around_them_and_compiled_once():
    program, given = cases.program_of("decoder"), cases.batch()
    expected = program(**given)
    calls = []
    for region in program.regions:
        region.around = lambda run, args, kwargs, name=region.name: (calls.append(name), run(*args, **kwargs))[1]
    stages = cut(program, (1, 3))
    for stage in stages:
        stage.body.compile(backend="aot_eager")
    assert torch.equal(cases.run_stages(stages, given), expected)
    assert calls == [region.name for region in program.regions]


def test_stages_of_a_program_without_memory_are_filled_later():
    model = cases.build("tied decoder")
    with torch.device("meta"):
        bare = type(model)(model.config)
    for name, buffer in model.named_buffers():
        bare.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    given = cases.batch()
    program = ftc.rewrite(bare.train(), ["add-mtp"], example=given, check=False)
    whole = cases.program_of("tied decoder", ["add-mtp"])
    whole = cases.program_of("tied decoder", ["add-mtp"]).eval()
    stages, late = cut(program, (2, 4)), {"input_ids": given["input_ids"]}
    crossing: tuple = ()
    for stage in stages:  # the stages behind it have no memory yet, as on a rank that never holds them
        stage.to_empty(device="cpu")
        stage.body.share_tied()
        with torch.no_grad():
            for name, parameter in stage.body.named_parameters():
                parameter.copy_(whole.get_parameter(name))
        stage.eval()
        crossing = stage(*crossing, **late)  # a structure of inputs, and a mode, that were not there when the program was cut
    assert torch.equal(crossing, whole(**late))
    assert stages[-1].body.get_parameter("lm_head.weight") is stages[-1].body.get_parameter("embed_tokens.weight")
    for module in (*stages, whole):
        module.train()
    assert torch.equal(cases.run_stages(stages, given), whole(**given))


def test_stages_are_in_one_mode_and_one_dtype():
    program = cases.program_of("decoder")
    first, last = cut(program, (2,))
    first.eval()
    assert not program.training and not last.body.regions[0].training
    first.body.compute_dtype = torch.bfloat16
    assert last.body.compute_dtype == program.compute_dtype == program.regions[-1].compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0,), "0 cannot be where a stage begins"),
        ((4,), "4 cannot be"),
        ((2, 2), "2 cannot be"),
        ((2, 1), "1 cannot be"),
        ((1.5,), "1.5 cannot be"),
        ((True,), "True cannot be"),
        ((1, 2, 3, 4), "5 stages cannot be made of 4 regions"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, said):
    with pytest.raises(FtcError, match=said):
        cut(program_of("decoder", "none"), bounds)


def test_what_cannot_be_cut_is_refused():
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(FtcError, match="no regions"):
        cut(ftc.capture(nn.Linear(3, 3), (torch.zeros(2, 3),)), (1,))
    with pytest.raises(FtcError, match="capture it for its inputs first"):
        cut(ftc.capture(Scaled()), (1,))
    with pytest.raises(FtcError, match=r"region blocks\.2 would be on stage 1, but blocks\.\d on stage 0 needs its result"):
        cut(ftc.capture(Backwards(), {"ids": ids}), (2,))
    with pytest.raises(FtcError, match="writes in place"):
        cut(ftc.capture(InPlace(), {"ids": ids}), (1,))
    shared = Scaled()
    shared.blocks[2][0].weight = shared.blocks[0][0].weight
    program = ftc.capture(shared, {"ids": ids})
    with pytest.raises(FtcError, match="are one parameter"):
        cut(program, (1,))


def test_a_stage_that_is_given_something_else_says_so():
    first, middle, last = cut(program_of("decoder", "parallel mtp"), (2, 4))
    given = cases.batch()
    crossing = first(**given)
    with pytest.raises(FtcError, match=r"stage 1 takes 1 tensors .* float64\[.*was given 0"):
        middle(**given)
    with pytest.raises(FtcError, match="stage 0 takes 0 tensors .*keywords.* was given 1"):
        first(given["input_ids"], **given)
    with pytest.raises(FtcError, match="the inputs do not fit"):
        middle(*crossing, inputs=given["input_ids"])
    without_labels = {"input_ids": given["input_ids"]}
    with pytest.raises(FtcError, match=r"stage 2 takes 2 tensors .* all or none with ftc_extras"):
        last(*middle(*crossing, **without_labels), ftc_extras=True, **without_labels)


def test_a_parameter_that_only_other_inputs_need_has_to_be_known_when_the_program_is_cut():
    ids, factor = torch.zeros(2, 5, dtype=torch.long), torch.tensor(2.0)
    program = ftc.capture(Optional(), {"ids": ids})
    with pytest.raises(FtcError, match="stage 1 needs the parameter second, which it does not hold; capture such a call before"):
        cases.run_stages(cut(program, (1,)), {"ids": ids, "factor": factor})
    program.run_example({"ids": ids, "factor": factor})
    stages = cut(program, (1,))
    for inputs in ({"ids": ids}, {"ids": ids, "factor": factor}):
        assert torch.equal(cases.run_stages(stages, inputs), program(**inputs))

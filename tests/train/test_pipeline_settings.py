"""A pipeline that does not fit ranks, layers or microbatches is refused with what would fit; one that fits lies as it says."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.plan.known import fits, known
from ftc.plan.table import write

pytest.importorskip("torchtitan")


@pytest.fixture(scope="module")
def config():
    """A run's configuration, as the adapter is given it, with changes to sections by dotted key."""
    import copy

    from ftc.train.trainer import load_config

    loaded = load_config(["--model.flavor=tiny", "--training.local_batch_size=8"])

    def changed(**changes):
        made = copy.deepcopy(loaded)
        for dotted, value in {"parallelism__pipeline_parallel_degree": 2, **changes}.items():
            section, key = dotted.split("__")
            assert hasattr(getattr(made, section), key)
            setattr(getattr(made, section), key, value)
        return made

    return changed


def named(schedule, **changes):
    return {"parallelism__pipeline_parallel_schedule": schedule, **changes}


REFUSED = [
    (named("1F2B"), "did you mean '1F1B'.* or name a file that ends in .csv"),
    (named("DualPipeV", training__local_batch_size=3), "at least 4 .*training.local_batch_size = 4 would do"),
    (named("DualPipe", training__local_batch_size=5), "microbatches are even.*training.local_batch_size = 6 would do"),
    (named("DualPipe", parallelism__pipeline_parallel_degree=3), "DualPipe on 3 ranks .* are even"),
    (named("Interleaved1F1B", training__local_batch_size=5), "a multiple of the 2 rounds, such as 4 or 6.*local_batch_size = 6 would do"),
    (named("1F1B", parallelism__pipeline_parallel_microbatch_size=3), "microbatch_size is 3, .* use one of 1, 2, 4, 8"),
    (named("1F1B", parallelism__pipeline_parallel_microbatch_size=0), "microbatch_size is 0"),
    (named("1F1B", parallelism__context_parallel_degree=2), "pipeline_parallel_degree is 2 beside context_parallel_degree = 2"),
    (named("1F1B", training__enable_cpu_offload=True), "enable_cpu_offload does not go with pipelines"),
    (named("1F1B", parallelism__module_fqns_per_model_part=[["layers.0"]]), "module_fqns_per_model_part is not read"),
    (named("1F1B", parallelism__pipeline_parallel_degree=1, ftc__pipeline_bounds=[2]), "there is no pipeline to cut"),
    (named("nowhere.csv"), "nowhere.csv"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_there_is_a_model(config, changes, message):
    from ftc.train.pipeline_settings import check_pipeline

    with pytest.raises(FtcError, match=message):
        check_pipeline(config(**changes))


CANNOT_BE_CUT = [
    (named("1F1B", ftc__pipeline_bounds=[1, 2]), 4, "cannot have 3 stages; it takes 2: change ftc.pipeline_bounds"),
    (named("ZBVZeroBubble", ftc__pipeline_bounds=[2]), 4, "cannot have 2 stages; it takes 4"),
    (named("Interleaved1F1B", ftc__pipeline_bounds=[1, 2]), 4, "cannot have 3 stages; it takes a multiple of 2"),
    (named("DualPipe", ftc__pipeline_bounds=[1, 2, 3]), 4, "cannot have 4 stages; it takes 2"),
    (named("Interleaved1F1B", parallelism__pipeline_parallel_layers_per_stage=2), 4, "3 stages; .* change parallelism.pipeline_parallel_layers_per_stage"),
    (named("1F1B", parallelism__pipeline_parallel_layers_per_stage=0), 4, "layers_per_stage is 0; it must be 1 or more"),
    (named("ZBVZeroBubble"), 3, "into 4 stages, and it has 3 regions"),
]


@pytest.mark.parametrize(("changes", "regions", "message"), CANNOT_BE_CUT)
def test_a_model_that_cannot_be_cut_so_is_refused(config, changes, regions, message):
    from ftc.train.pipeline_settings import check_pipeline, resolve_pipeline

    made = config(**changes)
    check_pipeline(made)
    with pytest.raises(FtcError, match=message):
        resolve_pipeline(made, regions)


def deadlocked(actions):
    """Rank 0 waits for the gradient of microbatch 0 before it runs microbatch 1, which rank 1 wants first."""
    by_name = {str(action): action for row in actions.values() for action in row}
    first = [by_name[f"0{kind}{m}"] for m in range(8) for kind in "FB"]
    last = [by_name[f"1{kind}{m}"] for pair in ((1, 0), (2, 3), (4, 5), (6, 7)) for kind in "FB" for m in pair]
    return {0: first, 1: last}


def without_one(actions):
    return {0: actions[0], 1: actions[1][:-1]}


def twice(actions):
    return {0: actions[0], 1: [*actions[1], actions[1][-1]]}


TABLES = [
    (deadlocked, 8, {}, "OUT.csv: .*1F1"),
    (without_one, 8, {}, "OUT.csv: .*1B7"),
    (twice, 8, {}, "OUT.csv: 1B7 is there twice"),
    (dict, 8, {"parallelism__pipeline_parallel_degree": 4}, "for 2 ranks, and parallelism.pipeline_parallel_degree is 4; set it to 2"),
    (dict, 4, {}, "for 4 microbatches, and training.local_batch_size = 8 makes 8 of 1; set it to 4"),
    (dict, 8, {"parallelism__pipeline_parallel_microbatch_size": 2}, "makes 4 of 2; set it to 16"),
]


@pytest.mark.parametrize(("spoil", "microbatches", "changes", "message"), TABLES)
def test_a_table_that_is_not_whole_deadlocks_or_is_anothers_is_refused(config, tmp_path, spoil, microbatches, changes, message):
    from ftc.train.pipeline_settings import check_pipeline

    write(spoil(known("1F1B", 2, microbatches)[0]), tmp_path / "OUT.csv")
    for key in ("schedule", "schedule_csv"):  # torchtitan has a key of its own for it
        with pytest.raises(FtcError, match=message):
            check_pipeline(config(**{f"parallelism__pipeline_parallel_{key}": str(tmp_path / "OUT.csv"), **changes}))


def test_a_field_that_is_no_action_is_named_by_row_and_column(config, tmp_path):
    from ftc.train.pipeline_settings import check_pipeline

    (tmp_path / "bad.csv").write_text("0F0,0B0\n1F0,1X0\n")
    with pytest.raises(FtcError, match="row 2, column 2"):
        check_pipeline(config(**named(str(tmp_path / "bad.csv"), training__local_batch_size=1)))


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(name=st.sampled_from(["GPipe", "1F1B", "ZB1P", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", "DualPipe"]), degree=st.integers(2, 8), batch=st.integers(1, 24))  # fmt: skip
def test_every_stage_has_a_rank_and_what_is_refused_is_told_a_batch_that_fits(config, name, degree, batch):
    import re

    from ftc.train.pipeline_settings import check_pipeline, resolve_pipeline

    made = config(**named(name, parallelism__pipeline_parallel_degree=degree, training__local_batch_size=batch))
    if not fits(name, degree, batch):
        with pytest.raises(FtcError) as refused:
            check_pipeline(made)
        advised = re.search(r"local_batch_size = (\d+) would do", str(refused.value))
        assert (advised is None) == (name == "DualPipe" and degree % 2 == 1)
        if advised is not None:
            assert int(advised[1]) > batch and fits(name, degree, int(advised[1]))
        return
    check_pipeline(made)
    pipeline = resolve_pipeline(made, 2 * degree)
    held = [pipeline.stages_of(rank) for rank in range(degree)]
    assert sorted({stage for own in held for stage in own}) == list(range(pipeline.num_stages))
    assert all(stage in held[rank] for stage, rank in enumerate(pipeline.ranks))
    assert sum(map(len, held)) == pipeline.num_stages * (2 if pipeline.is_mirrored else 1)
    with pytest.raises(FtcError, match=f"into {pipeline.num_stages} stages"):
        resolve_pipeline(made, pipeline.num_stages - 1)


def test_the_name_of_a_schedule_may_be_written_in_any_case(config):
    from ftc.train.pipeline_settings import resolve_pipeline

    assert resolve_pipeline(config(**named("dualpipev")), 4).name == "DualPipeV"


def test_a_table_of_a_mirrored_schedule_is_mirrored(config, tmp_path):
    from ftc.train.pipeline_settings import resolve_pipeline

    for name in ("DualPipe", "DualPipeV"):
        write(known(name, 2, 8)[0], tmp_path / f"{name}.csv")
        found = resolve_pipeline(config(**named(str(tmp_path / f"{name}.csv"))), 4)
        assert found.is_mirrored == (name == "DualPipe") and found.placement == known(name, 2, 8)[1]


@pytest.fixture(scope="module")
def program():
    import torch
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    import ftc

    return ftc.capture(Decoder(preset("tiny", vocab_size=64, num_hidden_layers=4)), {"input_ids": torch.arange(24).view(2, 12)})


def test_a_stage_without_a_weight_to_train_is_refused(program):
    from types import SimpleNamespace

    from ftc.pipeline import cut
    from ftc.train.pipeline import check_trained
    from ftc.train.trainable import train_only

    train_only(program, ["layers.2", "lm_head"])
    check_trained(SimpleNamespace(stages=cut(program, ())))
    with pytest.raises(FtcError, match=r"nothing to train in stage 0 of the pipeline \(layers.0, layers.1\)"):
        check_trained(SimpleNamespace(stages=cut(program, (2,))))


@pytest.mark.parametrize(("first", "last", "expected"), [(1, 1, (2,)), (2, 0, (1,)), (0, 2, (3,)), (4, 0, (1,))])
def test_the_ends_count_as_layers_where_layers_are_counted(config, program, first, last, expected):
    """4 regions in 2 stages of 3 layers, embedding and head counted in; where it cannot be even, the embedding's stage has the fewest."""
    from types import SimpleNamespace

    from ftc.train.pipeline import choose_bounds
    from ftc.train.pipeline_settings import resolve_pipeline

    ends = {"parallelism__pipeline_parallel_first_stage_less_layers": first, "parallelism__pipeline_parallel_last_stage_less_layers": last}
    made = config(**named("1F1B"), **ends, **({"parallelism__pipeline_parallel_layers_per_stage": 3} if first == last else {}))

    def never(pipeline):
        raise AssertionError("costs are not asked for")

    assert choose_bounds(SimpleNamespace(body=program), resolve_pipeline(made, 4), made, never) == expected


def test_bounds_are_as_many_as_the_table_has_borders(config, program, tmp_path):
    from types import SimpleNamespace

    from ftc.train.pipeline import choose_bounds
    from ftc.train.pipeline_settings import resolve_pipeline

    write(known("1F1B", 2, 8)[0], tmp_path / "two.csv")
    made = config(**named(str(tmp_path / "two.csv")), ftc__pipeline_bounds=[1, 2])
    with pytest.raises(FtcError, match="2 bounds, and .*two.csv has 2 stages: give 1"):
        choose_bounds(SimpleNamespace(body=program), resolve_pipeline(made, 4), made, lambda pipeline: ())

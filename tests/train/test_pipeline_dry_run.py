"""A dry run of a pipeline: its stages make up the model, its schedule decides what is held."""

import pytest

from ftc.errors import FtcError

pytest.importorskip("torchtitan")

from ftc.train.dry_run import dry_run  # noqa: E402


def run_file(schedule=None, **changes):
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": "/far/away", "vocab_size": 320, "architecture": {"num_hidden_layers": 4}},
        "training": {"steps": 2, "local_batch_size": 8, "seq_len": 64, "mixed_precision_param": "float32"},
        "parallelism": {},
        "debug": {"seed": 1},
    }
    if schedule:
        values["parallelism"] |= {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule}
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section] = values.get(section, {}) | {key: value}
    return values


@pytest.mark.slow
def test_ranks_share_the_model_its_flops_and_not_its_tokens():
    one, two = dry_run(run_file()), dry_run(run_file("1F1B"))
    assert (two.ranks, two.batch_degree, two.tokens, two.num_parameters) == (2, 1, one.tokens, one.num_parameters)
    assert two.global_flops == pytest.approx(one.global_flops, rel=1e-6)
    for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert 0.4 * getattr(one, name) < getattr(two, name) < 0.7 * getattr(one, name)
    assert any("a pipeline's ranks hold different stages" in note for note in two.notes)


@pytest.mark.slow
def test_a_schedule_that_holds_fewer_microbatches_holds_less():
    """GPipe holds all 8 microbatches, 1F1B on two ranks two."""
    gpipe, one_f_one_b = (dry_run(run_file(name, ftc__pipeline_bounds=[2], ftc__architecture={"num_hidden_layers": 4})) for name in ("GPipe", "1F1B"))
    assert gpipe.model_flops == one_f_one_b.model_flops
    assert one_f_one_b.activation_bytes < 0.5 * gpipe.activation_bytes and one_f_one_b.peak_bytes < gpipe.peak_bytes


@pytest.mark.slow
def test_mirrored_stages_are_held_twice():
    once, mirrored = dry_run(run_file("1F1B")), dry_run(run_file("DualPipe"))
    assert mirrored.num_parameters == once.num_parameters
    assert mirrored.parameter_bytes == pytest.approx(4 * mirrored.num_parameters, rel=0.01)


def test_what_the_run_would_refuse_is_refused():
    with pytest.raises(FtcError, match="into 2 stages, and it has 1 regions"):
        dry_run(run_file("1F1B", ftc__architecture={"num_hidden_layers": 1}))
    with pytest.raises(FtcError, match="3 ranks do not go with"):
        dry_run(run_file("1F1B"), num_ranks=3)

"""The same steps on one process and on a pipeline of several: losses, every gradient and every weight agree, also after a checkpoint
that another number of stages wrote."""

from pathlib import Path

import pytest
import torch
from ranks_jobs import assert_alike, results_of
from torch.distributed.pipelining.schedules import _Action

from ftc.train.metrics_file import METRICS_FILE, curves, read_metrics

pytest.importorskip("torchtitan")

LAYERS = {"num_hidden_layers": 4, "vocab_size": 320}
EIGHT = {"ftc.architecture": {**LAYERS, "num_hidden_layers": 8}}
MOE = {**LAYERS, "moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 24}}
TABLE = "OUT OF ORDER.csv"  # written beside the runs


def pp(degree: int, schedule: str, *bounds: int) -> dict:
    changes = {"parallelism.pipeline_parallel_degree": degree, "parallelism.pipeline_parallel_schedule": schedule}
    return changes | ({"ftc.pipeline_bounds": list(bounds)} if bounds else {})


ONE_F_ONE_B, ZBV, DUALPIPEV, DUALPIPE = (
    pp(2, "1F1B", 2), pp(2, "ZBVZeroBubble", 1, 2, 3), pp(2, "DualPipeV", 1, 2, 3), pp(2, "DualPipe", 1),
)  # fmt: skip
TIED = {"ftc.architecture": {**LAYERS, "tie_word_embeddings": True}}
MTP = {"ftc.passes": ["fuse-qkv", {"name": "add-mtp", "depth": 1, "init": "random"}]}
CHUNKED = {"ftc.passes": ["raise", "fuse-qkv", "chunk-cross-entropy"], "ftc.loss": "model"}
PACKED = {"ftc.packing": "documents", "ftc.document_mask": True}
MUON = {"ftc.optimizer": "muon"}
STACKED = {"ftc.architecture": MOE, "ftc.passes": ["raise-moe"]}
BALANCED = {"ftc.architecture": MOE, "ftc.passes": ["raise-moe", {"name": "balance", "z": 0.01}]}
COMPILED = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
RECOMPUTING = {"activation_checkpoint.mode": "full"}
SHARDED = {"parallelism.data_parallel_shard_degree": 2}
TENSOR, EXPERT = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.expert_parallel_degree": 2}
TWICE = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}
SAVED = {"checkpoint.enable": True, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
# name: (ranks, batch of a rank, changes); every step sees four windows, those of eight layers, and of divided experts, eight
RUNS = {
    "one": (1, 4, SAVED),
    "tied_one": (1, 4, TIED),
    "mtp_one": (1, 4, MTP),
    "packed_one": (1, 4, PACKED),
    "muon_one": (1, 4, MUON),
    "chunked_one": (1, 4, CHUNKED),
    "balanced_one": (1, 1, {**BALANCED, "training.global_batch_size": 4}),
    "moe_one": (1, 8, STACKED),
    "eight_one": (1, 8, EIGHT),
    "interleaved_2_cut_by_cost": (2, 4, pp(2, "Interleaved1F1B")),
    "gpipe_2_counting_layers": (
        2, 4, {**pp(2, "GPipe"), "parallelism.pipeline_parallel_layers_per_stage": 3, "parallelism.pipeline_parallel_microbatch_size": 2},
    ),
    "table_2_out_of_order": (2, 4, pp(2, TABLE, 2) | {"ftc.pipeline_bounds": [3]}),
    "accumulating_2": (2, 2, {**ONE_F_ONE_B, "training.global_batch_size": 4}),
    "compiled_recomputing_zbv_2": (2, 4, {**ZBV, **COMPILED, **RECOMPUTING}),
    "replicas_2_1f1b_2": (4, 2, {**ONE_F_ONE_B, **TWICE}),
    "sharded_zbv_2": (4, 2, {**ZBV, **SHARDED}),
    "tied_sharded_1f1b_2": (4, 2, {**ONE_F_ONE_B, **TIED, **SHARDED}),
    "mtp_dualpipev_2": (2, 4, {**DUALPIPEV, **MTP}),
    "chunked_dualpipe_2": (2, 4, {**DUALPIPE, **CHUNKED}),
    "packed_1f1b_2": (2, 4, {**ONE_F_ONE_B, **PACKED}),
    "muon_zbv_2": (2, 4, {**ZBV, **MUON}),
    "balanced_dualpipe_2": (2, 4, {**DUALPIPE, **BALANCED}),
    "tp_2_zbv_2": (4, 4, {**ZBV, **TENSOR}),
    "moe_ep_2_dualpipe_2": (4, 4, {**DUALPIPE, **STACKED, **EXPERT}),
    "eight_dualpipe_4": (4, 8, {**pp(4, "DualPipe", 2, 4, 6), **EIGHT}),
    "eight_dualpipev_4": (4, 8, {**pp(4, "DualPipeV", 1, 2, 3, 4, 5, 6, 7), **EIGHT}),
    "whole": (1, 4, SAVED),
    "again_zbv_2": (2, 4, {**ZBV, **SAVED}),
    "again_one": (1, 4, SAVED),
    "poisoned_2": (2, 4, ZBV),
}
STEPS = {"whole": 6}  # all others: 2
AFTER = {"again_zbv_2": "one", "again_one": "again_zbv_2"}
WEIGHTS = ("whole", "again_one", "one", "sharded_zbv_2", "interleaved_2_cut_by_cost")
POISON = {"poisoned_2": "layers.2.mlp.down_proj.weight"}
RUNS = {name: (ranks, batch, {"ftc.architecture": LAYERS, **changes}) for name, (ranks, batch, changes) in RUNS.items()}
KINDS = ("tied", "mtp", "packed", "muon", "chunked", "balanced", "moe", "eight")
COMPARED = [name for name in RUNS if "_2" in name or name.endswith("_4") if not name.startswith(("again", "poisoned"))]


def alone(name: str) -> str:
    """The run on one process that this one is compared with."""
    kind = name.split("_")[0]
    return f"{kind}_one" if kind in KINDS else "one"


def write_table(folder: Path) -> str:
    """1F1B on two ranks with its four microbatches in an order that no schedule of torch's has."""
    from ftc.plan.known import known
    from ftc.plan.table import write

    order = (2, 0, 3, 1)
    actions, _ = known("1F1B", 2, 4)
    write({rank: [_Action(a.stage_index, a.computation_type, order[a.microbatch_index]) for a in row] for rank, row in actions.items()}, folder / TABLE)
    return str(folder / TABLE)


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    work = tmp_path_factory.mktemp("ranks")
    table = write_table(work)
    runs = {n: (ranks, batch, {k: table if v == TABLE else v for k, v in changes.items()}) for n, (ranks, batch, changes) in RUNS.items()}
    found = results_of(runs, work, data, STEPS, AFTER, WEIGHTS, POISON)
    for name in RUNS:
        found[name]["held out"] = curves(read_metrics(work / name / METRICS_FILE), "validation_bits_per_byte", 9)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_losses_and_gradients_equal_those_of_one_process(results, name):
    """Gradients are those that the optimizer sees: clipped, by the norm of all stages'."""
    assert_alike(results[alone(name)], results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table_2_out_of_order", "interleaved_2_cut_by_cost", "chunked_dualpipe_2", "packed_1f1b_2"])
def test_the_validation_curve_is_that_of_one_process(results, name):
    ((source, expected),) = results[alone(name)]["held out"].items()
    assert [step for step, _ in expected] == [1, 2] and expected[1][1] < expected[0][1]
    assert [bits for _, bits in results[name]["held out"][source]] == pytest.approx([bits for _, bits in expected], rel=1e-5)


def assert_equal_weights(expected, found):
    """To 1e-5 of the largest, and of what Adam makes of rounding: its first step is lr = 4e-4 times a gradient's sign, of any size."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5 * weight.abs().max() + 2e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded_zbv_2", "interleaved_2_cut_by_cost"])
def test_the_weights_that_are_saved_are_those_of_one_process(results, name):
    assert_equal_weights(results["one"]["weights"], results[name]["weights"])


@pytest.mark.slow
def test_two_steps_alone_two_on_stages_and_two_alone_are_six_alone(results):
    losses = [results[name]["losses"] for name in ("one", "again_zbv_2", "again_one")]
    assert sum(losses, []) == pytest.approx(results["whole"]["losses"], rel=1e-5)
    assert_equal_weights(results["whole"]["weights"], results["again_one"]["weights"])


@pytest.mark.slow
def test_the_region_that_leaves_the_finite_numbers_is_named_on_the_first_rank(results):
    """It is on the other one."""
    assert "began in the output of region layers.2." in results["poisoned_2"]["said"]


@pytest.mark.slow
def test_the_comparison_can_fail(results):
    """A run of other weights does not pass it."""
    with pytest.raises(AssertionError):
        assert_alike(results["one"], {"losses": results["one"]["losses"], "gradients": results["tied_one"]["gradients"]})
    with pytest.raises(AssertionError):
        assert_equal_weights(results["whole"]["weights"], {n: w * (1 + 2e-5) for n, w in results["whole"]["weights"].items()})
    assert not torch.equal(*(results[name]["gradients"]["lm_head.weight"] for name in ("one", "packed_one")))

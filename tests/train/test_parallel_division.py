"""The same step on one process and on several that share weights or sequences: losses and every gradient agree."""

import pytest
from ranks_jobs import assert_alike, results_of

from ftc.train.metrics_file import METRICS_FILE, curves, read_metrics

pytest.importorskip("torchtitan")

SMALL = {"vocab_size": 320}  # the tokenizer's 295 ids cannot be divided
FUSED = {"ftc.passes": ["raise", "fuse-qkv", "fuse-gate-up"]}
CHUNKED = {"ftc.passes": [*FUSED["ftc.passes"], "chunk-cross-entropy"], "ftc.loss": "model"}
MTP = {"ftc.passes": ["fuse-qkv", {"name": "add-mtp", "depth": 1, "init": "random"}]}
TIED = {"ftc.architecture": {**SMALL, "tie_word_embeddings": True}}
PACKED = {"ftc.packing": "documents", "ftc.document_mask": True}
TP, CP = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
COMPILED = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
# name: (ranks, batch of a rank, changes); every step sees four windows
RUNS = {
    "one": (1, 4, {}),
    "fused_one": (1, 4, FUSED),
    "chunked_one": (1, 4, CHUNKED),
    "tied_one": (1, 4, TIED),
    "mtp_one": (1, 4, MTP),
    "packed_one": (1, 4, PACKED),
    "packed_tp_2": (2, 4, {**TP, **PACKED}),
    "tp_2": (2, 4, TP),
    "tp_2_whole_vocabulary": (2, 4, {**TP, "parallelism.disable_loss_parallel": True}),
    "tp_2_recomputing": (2, 4, {**TP, "activation_checkpoint.mode": "full"}),
    "tp_2_keeping_products": (
        2, 4, {**TP, "activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    "tp_2_compiled": (2, 4, {**TP, **COMPILED}),
    "tp_2_accumulating": (2, 2, {**TP, "training.global_batch_size": 4}),
    "tp_2_fsdp_2": (4, 2, TP),
    "tp_2_replicas_2": (
        4, 2, {**TP, "parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
    ),
    "tp_2_cp_2": (4, 4, {**TP, **CP}),
    "cp_2": (2, 4, CP),
    "cp_2_in_order": (2, 4, {**CP, "parallelism.context_parallel_load_balancer": "none"}),
    "cp_2_recomputing": (2, 4, {**CP, "activation_checkpoint.mode": "full"}),
    "cp_2_compiled": (2, 4, {**CP, **COMPILED}),
    "cp_2_fsdp_2": (4, 2, CP),
    "fused_tp_2": (2, 4, {**TP, **FUSED}),
    "fused_tp_4": (4, 4, {"parallelism.tensor_parallel_degree": 4, **FUSED}),
    "fused_cp_2": (2, 4, {**CP, **FUSED}),
    "chunked_tp_2": (2, 4, {**TP, **CHUNKED}),
    "chunked_cp_2": (2, 4, {**CP, **CHUNKED}),
    "chunked_cp_2_in_order": (2, 4, {**CP, **CHUNKED, "parallelism.context_parallel_load_balancer": "none"}),
    "chunked_tp_2_fsdp_2": (4, 2, {**TP, **CHUNKED}),
    "chunked_tp_2_cp_2": (4, 4, {**TP, **CP, **CHUNKED}),
    "tied_tp_2_fsdp_2": (4, 2, {**TP, **TIED}),
    "mtp_fsdp_2": (2, 2, MTP),
    "mtp_tp_2": (2, 4, {**TP, **MTP}),
    "mtp_tp_2_fsdp_2": (4, 2, {**TP, **MTP}),
}  # fmt: skip
RUNS = {name: (ranks, batch, {"ftc.architecture": SMALL, **changes}) for name, (ranks, batch, changes) in RUNS.items()}
KINDS = ("fused", "chunked", "tied", "mtp", "packed")


def alone(name: str) -> str:
    """The run on one process that this one is compared with."""
    kind = name.split("_")[0]
    return f"{kind}_one" if kind in KINDS else "one"


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    work = tmp_path_factory.mktemp("ranks")
    found = results_of(RUNS, work, data)
    for name in RUNS:
        found[name]["held out"] = curves(read_metrics(work / name / METRICS_FILE), "validation_bits_per_byte", 9)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != alone(name)])
def test_losses_and_gradients_equal_those_of_one_process(results, name):
    assert_alike(results[alone(name)], results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp_2", "cp_2", "cp_2_in_order", "tp_2_cp_2", "chunked_cp_2", "chunked_tp_2", "tp_2_compiled"])
def test_the_validation_curve_is_that_of_one_process(results, name):
    """All have batches of four, so that they measure the same sample."""
    ((source, expected),) = results["one"]["held out"].items()
    assert [step for step, _ in expected] == [1, 2] and expected[1][1] < expected[0][1]
    assert [bits for _, bits in results[name]["held out"][source]] == pytest.approx([bits for _, bits in expected], rel=1e-5)


@pytest.mark.slow
def test_the_comparison_can_fail(results):
    """A run of other weights does not pass it."""
    with pytest.raises(AssertionError):
        assert_alike(results["one"], {"losses": results["one"]["losses"], "gradients": results["tied_one"]["gradients"]})

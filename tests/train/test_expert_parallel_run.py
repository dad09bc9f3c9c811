"""Experts on real ranks (gloo), each with a batch of its own, against one process on all batches: losses and every gradient.

First a program bound by hand, then whole runs, whose checkpoints continue on other numbers of ranks.
"""

import helpers_experts as experts
import pytest
import torch
from ranks_jobs import assert_alike, results_of

from ftc.errors import FtcError
from ftc.train.config import dump_toml

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
DEGREES = {2: [7, 4], 4: [7, 1, 5, 6]}  # tokens of each rank


def check(results: list, kind: str, sizes: list[int], dtype: torch.dtype, frozen: bool = False) -> None:
    """Every rank's results against one process."""
    loss, grads, inputs = experts.alone(kind, sizes, dtype, frozen)
    for rank, (found, mine, own) in enumerate(results):
        assert abs(found - loss) <= BOUNDS[dtype] * abs(loss)
        assert experts.largest_error(mine, grads) <= BOUNDS[dtype]
        assert experts.largest_error({"x": own}, {"x": inputs[rank]}) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("degree", list(DEGREES))
@pytest.mark.parametrize("kind", list(experts.KINDS))
def test_ranks_with_batches_of_their_own_are_one_process(ranks, kind, degree, dtype):
    check(ranks.run(experts.on_ranks, kind, DEGREES[degree], dtype, size=degree), kind, DEGREES[degree], dtype)


def test_frozen_experts_and_routers(ranks):
    check(ranks.run(experts.on_ranks, "gated", DEGREES[2], torch.float64, True, size=2), "gated", DEGREES[2], torch.float64, True)


def test_compiled_regions_keep_the_exchange(ranks):
    results = ranks.run(experts.on_ranks, "biases", DEGREES[2], torch.float32, False, "aot_eager", size=2)
    check(results, "biases", DEGREES[2], torch.float32)


# ------------------------------------------------------------------------------------------------------------------ in a run

MOE = {
    "ftc.architecture": {"moe": {"num_experts": 8, "top_k": 2, "intermediate_size": 24}, "vocab_size": 320},
    "ftc.passes": ["raise-moe"],
}
EP2, EP4 = {"parallelism.expert_parallel_degree": 2}, {"parallelism.expert_parallel_degree": 4}
CHUNKED = {"ftc.passes": ["raise", "fuse-qkv", "chunk-cross-entropy"], "ftc.loss": "model"}
COMPILED = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
FUSED = {"ftc.passes": ["fuse-moe"]}
MUON = {"ftc.optimizer": "muon"}
ROUTED = {  # as DeepSeek-V3 routes, after a dense layer
    "ftc.architecture": {
        **MOE["ftc.architecture"],
        "moe": {
            "num_experts": 8, "top_k": 3, "intermediate_size": 24, "gate": "sigmoid", "groups": 4, "topk_groups": 2,
            "shared_intermediate_size": 24, "routed_scaling_factor": 2.5, "selection_bias": True,
        },
        "first_dense_layers": 1,
    },
}
SAVED = {"checkpoint.enable": True, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
STEPS = {"whole": 4}  # all others: 2
AFTER = dict.fromkeys(("again_one", "again_fsdp_2", "again_ep_4", "again_ep_2_fsdp_2"), "stopped_ep_2")
# name: (ranks, batch of a rank, changes); every step sees four windows
RUNS = {
    "one": (1, 4, {}),
    "chunked_one": (1, 4, CHUNKED),
    "muon_one": (1, 4, MUON),
    "fused_one": (1, 4, FUSED),
    "routed_one": (1, 4, ROUTED),
    "ep_2": (2, 2, EP2),
    "ep_4": (4, 1, EP4),
    "ep_2_fsdp_2": (4, 1, EP2),
    "ep_2_replicas_2": (
        4, 1, {**EP2, "parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2},
    ),
    "ep_2_tp_2": (
        4, 2, {**EP2, "parallelism.tensor_parallel_degree": 2, "parallelism.expert_tensor_parallel_degree": 2},
    ),
    "ep_2_accumulating": (2, 1, {**EP2, "training.global_batch_size": 4}),
    "ep_2_recomputing": (2, 2, {**EP2, "activation_checkpoint.mode": "full"}),
    "ep_2_compiled": (2, 2, {**EP2, **COMPILED}),
    "chunked_ep_2": (2, 2, {**EP2, **CHUNKED}),
    "muon_ep_2": (2, 2, {**EP2, **MUON}),
    "fused_ep_2": (2, 2, {**EP2, **FUSED}),
    "fused_ep_4_compiled": (4, 1, {**EP4, **FUSED, **COMPILED}),
    "routed_ep_4": (4, 1, {**EP4, **ROUTED}),
    "whole": (1, 4, SAVED),
    "stopped_ep_2": (2, 2, {**EP2, **SAVED}),
    "again_one": (1, 4, SAVED),
    "again_fsdp_2": (2, 2, SAVED),
    "again_ep_4": (4, 1, {**EP4, **SAVED}),
    "again_ep_2_fsdp_2": (4, 1, {**EP2, **SAVED}),
}  # fmt: skip
RUNS = {name: (ranks, batch, {**MOE, **changes}) for name, (ranks, batch, changes) in RUNS.items()}
COMPARED = [name for name in RUNS if "ep_" in name and not name.startswith(("stopped", "again"))]


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    pytest.importorskip("torchtitan")
    return results_of(RUNS, tmp_path_factory.mktemp("ranks"), data, STEPS, AFTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_losses_and_gradients_equal_those_of_one_process(results, name):
    """Gradients are those that the optimizer sees: clipped, by the norm of all of them."""
    kind = name.split("_")[0]
    assert_alike(results["one" if kind == "ep" else f"{kind}_one"], results[name])


@pytest.mark.slow
def test_the_comparison_can_fail(results):
    """Gradients of the second step differ where the first step was another optimizer's."""
    with pytest.raises(AssertionError):
        assert_alike(results["muon_one"], results["ep_2"])


@pytest.mark.slow
@pytest.mark.parametrize("again", AFTER)
def test_a_checkpoint_continues_on_any_number_of_ranks(results, again):
    """Weights and moments are saved whole."""
    whole, before, after = results["whole"], results["stopped_ep_2"], results[again]
    assert before["losses"] + after["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert_alike({**after, "gradients": whole["gradients"]}, after)


@pytest.mark.slow
def test_a_number_of_experts_that_the_degree_does_not_divide_is_the_users_error(data, tmp_path):
    pytest.importorskip("torchtitan")
    from ftc.train.launch import train

    architecture = {"vocab_size": 320, "moe": {"num_experts": 6, "top_k": 2, "intermediate_size": 24}}
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "architecture": architecture, "passes": ["raise-moe"]},
        "training": {"steps": 1, "local_batch_size": 1, "seq_len": 32},
        "parallelism": {"expert_parallel_degree": 4},
        "comm": {"trace_buf_size": 0},
    }
    with pytest.raises(FtcError, match="gate_up holds 6 experts, which an expert-parallel degree of 4 does not divide; use 2, 3, 6"):
        train(values, tmp_path / "run", quiet=True, num_processes=4, max_restarts=0)


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (4, {"expert_parallel_degree": 3}, "does not divide the 4 ranks of data_parallel_shard x context_parallel .* use 1, 2, 4"),
        (4, {"expert_parallel_degree": 4, "data_parallel_replicate_degree": 2}, "does not divide the 2 ranks"),
        (4, {"expert_parallel_degree": 0}, "expert_parallel_degree is 0; it must be 1 or more"),
        (4, {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}, "expert_tensor_parallel_degree is 1 .* set it to 2"),
        (2, {"expert_parallel_degree": 2, "expert_parallel_comm_backend": "deepep"}, "must be \"standard\""),
        (2, {"expert_parallel_degree": 2, "unraised": True}, "only stacked experts can be divided: put \"raise-moe\" into"),
        (2, {"expert_parallel_degree": 2, "pipeline_parallel_degree": 2}, "does not divide the 1 ranks"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_said_before_anything_is_built(monkeypatch, tmp_path, processes, changes, message):
    pytest.importorskip("torchtitan")
    from ftc.train.division import check_parallelism
    from ftc.train.trainer import load_config

    passes = [] if "unraised" in changes else ["fuse-moe"]
    changes = {name: value for name, value in changes.items() if name != "unraised"}
    (tmp_path / "run.toml").write_text(dump_toml({"ftc": {"data": str(tmp_path), "passes": passes}, "parallelism": changes}))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(FtcError, match=message):
        check_parallelism(load_config(["--job.config_file", str(tmp_path / "run.toml")]))


@pytest.mark.slow
def test_a_launched_run_saves_the_model_of_one_without_division(data, tmp_path):
    """The whole model, in the names and shapes that it had before its experts were stacked and divided."""
    pytest.importorskip("torchtitan")
    import ftc.models

    from ftc.train.launch import train

    architecture = {"vocab_size": 320, "moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 16}}
    models = []
    for name, processes, parallelism in (("whole", 2, {}), ("divided", 2, {"expert_parallel_degree": 2})):
        values = {
            "model": {"flavor": "tiny"},
            "ftc": {"data": str(data), "vocab_size": 300, "architecture": architecture, "passes": ["raise-moe"]},
            "training": {
                "steps": 3, "local_batch_size": 1, "global_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32",
            },
            "parallelism": parallelism,
            "lr_scheduler": {"warmup_steps": 2},
            "comm": {"trace_buf_size": 0},
            "debug": {"seed": 1},
        }  # fmt: skip
        result = train(values, tmp_path / name, quiet=True, num_processes=processes)
        models.append(ftc.models.load(result.model_folder))
    one, two = (model.state_dict() for model in models)  # both of two processes
    assert any("experts.3.down_proj" in name for name in one)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)

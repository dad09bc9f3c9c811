"""Runs with products in float8: under FSDP2 as with weights gathered in float8, compiled, recomputed, beside tensor parallelism; checkpoints go on."""

import pytest
from ranks_jobs import results_of

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.slow


def passes(**options) -> dict:
    return {"ftc.passes": ["fuse-qkv", "fuse-gate-up", {"name": "float8", **options}]}


COMPILED = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
KEPT = {"checkpoint.enable": True, "checkpoint.interval": 1, "checkpoint.last_save_model_only": False}
GATHERED = passes(recipe="tensorwise", all_gather=True)
RUNS = {
    "plain": (2, 2, passes(recipe="tensorwise")),
    "gathered": (2, 2, {**GATHERED, **KEPT}),
    "gathered_recomputed": (2, 2, {**GATHERED, "activation_checkpoint.mode": "full"}),
    "longer": (2, 2, {**GATHERED, "training.steps": 3}),
    "continued": (2, 2, {**GATHERED, **KEPT, "training.steps": 3}),
    "rows": (2, 2, passes(recipe="rowwise", save="exact")),
    "rows_gathered": (2, 2, passes(recipe="rowwise", save="exact", all_gather=True)),
    "rows_compiled": (2, 2, {**passes(recipe="rowwise", save="exact"), **COMPILED}),
    "fine": (2, 2, passes(recipe="fine")),
    "fine_tp_2": (2, 4, {**passes(recipe="fine"), "parallelism.tensor_parallel_degree": 2}),
}
RUNS = {name: (ranks, batch, {"ftc.architecture": {"vocab_size": 320}, **changes}) for name, (ranks, batch, changes) in RUNS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    return results_of(RUNS, tmp_path_factory.mktemp("ranks"), data, steps={"longer": 3, "continued": 1}, after={"continued": "gathered"})


@pytest.mark.parametrize(("one", "other"), [("plain", "gathered"), ("plain", "gathered_recomputed"), ("rows", "rows_gathered"), ("rows", "rows_compiled")])
def test_losses_and_gradients_have_the_same_bits(results, one, other):
    assert results[one]["losses"] == results[other]["losses"]
    for name, gradient in results[one]["gradients"].items():
        assert bool((gradient == results[other]["gradients"][name]).all()), name


def test_a_run_goes_on_from_a_checkpoint_of_gathered_weights(results):
    assert results["continued"]["losses"] == results["longer"]["losses"][2:]


def test_products_of_shards_train(results):
    assert results["fine_tp_2"]["losses"] == pytest.approx(results["fine"]["losses"], rel=1e-3)
    assert results["fine_tp_2"]["losses"] != results["fine"]["losses"]  # scales of a part, not of the whole

"""Balance of experts in training: one definition however a batch is divided, biases that balance, numbers that are logged, alarms that name."""

import pytest
import torch
from ranks_jobs import assert_alike, results_of
from ranks_that_balance import CHOSEN, EXPERTS, WIDTH, Mixture, balanced, on_this_rank, one_step

import ftc
from ftc.errors import FtcFailure
from ftc.train.balance import ExpertBalance, balanced_routers, in_words

OPTIONS = {"sequence": 0.3, "z": 0.2, "loss_free": 0.05}


def assert_same_step(expected, found):
    for name, gradient in expected[0].items():
        assert (found[0][name] - gradient).abs().max() <= 1e-12 * max(1, gradient.abs().max()), name
    assert found[1]["layers"].keys() == expected[1]["layers"].keys()
    for name, values in expected[1]["layers"].items():
        assert found[1]["layers"][name] == pytest.approx(values, rel=1e-12)
    for name, buffer in expected[2].items():
        assert torch.equal(found[2][name], buffer), name


@pytest.mark.parametrize(("microbatches", "recompute"), [(4, False), (1, True), (2, True)])
def test_a_step_is_the_same_in_microbatches_and_recomputed(microbatches, recompute):
    """Sequence and z losses are means over tokens and sequences, so that their gradient does not depend on the division."""
    expected = one_step(*balanced(**OPTIONS))
    assert expected[2]["0.router.balance_bias"].abs().max() == pytest.approx(0.05)
    assert_same_step(expected, one_step(*balanced(**OPTIONS), microbatches, recompute))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_on_two_ranks_is_that_of_one(ranks, microbatches):
    expected = one_step(*balanced(**OPTIONS))
    for found in ranks.run(on_this_rank, OPTIONS, microbatches, microbatches == 2, size=2):
        assert_same_step(expected, found)


def test_the_switch_loss_of_a_batch_is_the_mean_over_its_microbatches():
    """Scope "batch": f and P of a microbatch; the gradient of a step is the mean of theirs."""
    program, x = balanced(switch=0.3)
    whole = one_step(program, x, 4, rate=0.0)[0]["1.router.weight"]
    each = []
    for part in x.chunk(4):
        program.zero_grad()
        each.append(one_step(program, part, rate=0.0)[0]["1.router.weight"].clone())
    plain, _ = balanced()
    without = one_step(plain, x, 4, rate=0.0)[0]["1.router.weight"]
    # `one_step` divides the model's own loss by the sequences it is given, a quarter of them
    assert (sum(each) / 4 - whole).abs().max() <= 1e-12
    assert (whole - without).abs().max() > 1e-4


def test_the_pool_holds_the_steps_before_and_the_counts_begin_anew():
    program, x = balanced(switch=0.1, scope="pool")
    counts = []
    for _ in range(3):
        report, buffers = one_step(program, x, 2)[1:]
        (router, _), tally = balanced_routers(program), buffers["0.router.balance_tally"]
        assert not tally[:EXPERTS].any() and not tally[2 * EXPERTS :].any()
        counts.append(tally[EXPERTS : 2 * EXPERTS].clone())
    news = [counts[0], counts[1] - 0.9 * counts[0], counts[2] - 0.9 * counts[1]]
    assert all(float(new.sum()) == pytest.approx(x.shape[0] * x.shape[1] * CHOSEN) for new in news)
    assert report["switch"] > 1 and router.name == "0.router"


def reports_of(program, x, steps, name_part, rate):
    """Steps of plain SGD on the parameters with `name_part` by the auxiliary losses alone; the reports of the first and the last."""
    optimizer = torch.optim.SGD([p for name, p in program.named_parameters() if name_part in name], lr=rate)
    watch, reports = ExpertBalance(program), []
    watch.follow(optimizer, lambda: 0)
    for _ in range(steps):
        optimizer.zero_grad()
        (program(x) * 0).sum().backward()
        optimizer.step()
        reports.append(watch.report())
    return reports[0], reports[-1]


def test_loss_free_biases_balance_a_skewed_router():
    """Nothing is trained; the biases alone bring MaxVio from above 1 to below 0.1 (Wang et al. 2024 report 0.04 for their models)."""
    program, x = balanced(skew=0.5, sequences=32, tokens=16, loss_free=0.001)
    first, last = reports_of(program, x, 300, "router", 0.0)
    assert all(layer["max_violation"] > 1 for layer in first["layers"].values())
    assert all(layer["max_violation"] < 0.1 for layer in last["layers"].values()), in_words(last)
    assert last["load_entropy"] > 0.999 > first["load_entropy"] and "MaxVio 0.0" in in_words(last)


@pytest.mark.parametrize("scope", ["batch", "pool"])
def test_the_switch_loss_balances_a_trained_router(scope):
    program, x = balanced(skew=0.5, sequences=32, switch=1.0, scope=scope)
    first, last = reports_of(program, x, 60, "router", 1.0)
    assert last["max_violation"] < 0.3 < 1 < first["max_violation"] and last["switch"] < first["switch"], in_words(last)


def test_an_expert_that_nobody_chooses_is_reported_once_with_its_layer():
    program, x = balanced(skew=0.0, dead_after=2)
    with torch.no_grad():
        program.regions[1].fetch("router.bias")[4] = -1e4
    said = []
    optimizer, watch = torch.optim.SGD(program.parameters(), lr=0.0), ExpertBalance(program, warn=said.append)
    watch.follow(optimizer, lambda: 0)
    for _ in range(4):
        program(x).sum().backward()
        optimizer.step()
    assert said == ["expert 4 of 1.router is dead: in 2 steps no token went to it"]
    assert watch.report()["dead"] == watch.report()["layers"]["1.router"]["dead"] == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_logits_that_are_not_finite_stop_before_the_step_and_name_the_router(layer):
    program, x = balanced(loss_free=0.1)
    with torch.no_grad():
        program.regions[layer].fetch("router.bias")[2] = float("nan")
    before = {name: tensor.clone() for name, tensor in program.state_dict().items() if "tally" not in name}
    with pytest.raises(FtcFailure, match=rf"at step 1 the logits of the router {layer}\.router are not finite for 60 of 60 tokens.*step 0"):
        one_step(program, x)
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in program.state_dict().items() if name in before)


def test_without_routers_there_is_nothing_to_do():
    watch = ExpertBalance(torch.nn.Linear(2, 2))
    watch.gather(1)
    watch.settle()
    assert watch.report() == {}


# ---- whole runs

MOE = {"num_experts": 4, "top_k": 2, "intermediate_size": 16}
PASSES = [{"name": "balance", "sequence": 0.05, "z": 0.01, "loss_free": 0.3}]
CHANGES = {
    "model.flavor": "tiny-moe", "ftc.passes": PASSES,
    "ftc.architecture": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "moe": MOE},
}  # fmt: skip
SAVED = {"checkpoint.enable": True, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
RUNS = {
    "one": (1, 4, {}),
    "accumulating": (1, 1, {"training.global_batch_size": 4}),
    "recomputing_2": (2, 2, {"activation_checkpoint.mode": "full"}),
    "fused": (1, 4, {"ftc.passes": ["fuse-moe", *PASSES]}),
    "fused_after": (1, 4, {"ftc.passes": [*PASSES, "fuse-moe"]}),
    "experts_2": (2, 2, {"parallelism.expert_parallel_degree": 2}),
    "mixed_2": (2, 2, {"training.mixed_precision_param": "bfloat16"}),
    "compiled": (1, 4, {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}),
    "whole": (1, 4, SAVED),
    "stopped_2": (2, 2, SAVED),
    "again": (1, 4, SAVED),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    pytest.importorskip("torchtitan")
    runs = {name: (ranks, batch, CHANGES | changes) for name, (ranks, batch, changes) in RUNS.items()}
    return results_of(runs, tmp_path_factory.mktemp("ranks"), data, {"whole": 4}, {"again": "stopped_2"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulating", "recomputing_2", "fused", "fused_after", "experts_2", "compiled"])
def test_gradients_of_the_second_step_do_not_depend_on_how_a_step_is_run(results, name):
    """The second step's choices depend on the biases that the first step moved, by 0.3, so these agree as well."""
    assert_alike(results["one"], results[name])


@pytest.mark.slow
def test_sharded_in_bfloat16_it_trains_alike(results):
    assert results["mixed_2"]["losses"] == pytest.approx(results["one"]["losses"], rel=1e-2)


@pytest.mark.slow
def test_a_run_goes_on_with_its_biases(results):
    whole, before, after = results["whole"], results["stopped_2"], results["again"]
    assert before["losses"] + after["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert_alike(whole | {"losses": whole["losses"][2:]}, after)


def test_a_dry_run_of_it_finds_its_memory(data):
    pytest.importorskip("torchtitan")
    from ftc.train.dry_run import dry_run

    values = {
        "model": {"flavor": "tiny-moe"}, "training": {"steps": 2, "local_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32"},
        "ftc": {"data": str(data), "vocab_size": 300, "architecture": CHANGES["ftc.architecture"]},
    }  # fmt: skip
    plain = dry_run(values | {"ftc": values["ftc"] | {"passes": ["raise-moe"]}})
    balanced_run = dry_run(values | {"ftc": values["ftc"] | {"passes": PASSES}})
    assert balanced_run.num_parameters == plain.num_parameters
    assert 0 < balanced_run.parameter_bytes - plain.parameter_bytes == 2 * (8 * (2 * 4 + 7) + 4 * 4)  # a tally and a bias in each layer


def test_a_run_takes_it_up_on_the_way(tmp_path):
    """A checkpoint from before the pass is carried over: biases and tallies begin at zero, all else stays."""
    pytest.importorskip("torchtitan")
    import torch.distributed.checkpoint as dcp

    from ftc.train.carry_over import GROUPS, MODEL, STATE, _read, carry_over

    torch.manual_seed(0)
    model = torch.nn.Sequential(Mixture(0.0), Mixture(0.0))
    x = torch.randn(4, 5, WIDTH)
    plain = ftc.rewrite(model, ["raise-moe"], (x,), check=False)
    later = ftc.rewrite(model, ["raise-moe", ("balance", {"loss_free": 0.1})], (x,), check=False)
    entries = {}
    for name, parameter in plain.named_parameters():
        entries |= {MODEL + name: parameter.detach(), f"{GROUPS}{name}.lr": 0.5, f"{STATE}{name}.step": torch.tensor(3.0)}
        entries |= {f"{STATE}{name}.{moment}": torch.rand_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
    dcp.save(dict(entries), checkpoint_id=tmp_path / "checkpoint" / "step-3", no_dist=True)
    assert carry_over(tmp_path / "checkpoint", plain, later) == 3
    after = _read(tmp_path / "checkpoint" / "step-3")
    added = set(after) - set(entries)
    assert added == {f"{MODEL}{i}.router.balance_{word}" for i in (0, 1) for word in ("bias", "tally")}
    assert not any(after[name].any() for name in added)
    assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(value)) for name, value in entries.items())


@pytest.mark.slow
def test_a_run_logs_its_experts_and_saves_its_biases(data, tmp_path):
    pytest.importorskip("torchtitan")
    from tiny_runs import run_file

    from ftc.open_model import open_model
    from ftc.train.launch import train
    from ftc.train.metrics_file import METRICS_FILE, read_metrics

    passes = [{"name": "balance", "switch": 0.01, "scope": "pool", "z": 0.001, "loss_free": 0.3, "dead_after": 1}]
    values = run_file(data, model__flavor="tiny-moe", ftc__passes=passes, ftc__architecture=CHANGES["ftc.architecture"], training__steps=5)
    result = train(values, tmp_path / "run", quiet=True)
    rows = [row["balance"] for row in read_metrics(result.folder / METRICS_FILE) if "loss" in row]
    assert len(rows) == 5 and all(set(row["layers"]) == {"layers.0.mlp.gate", "layers.1.mlp.gate"} for row in rows)
    assert all(row["max_violation"] >= 0 and 0 < row["load_entropy"] <= 1 and row["switch"] > 0.9 and "sequence" not in row for row in rows)
    log = (result.folder / "train.log").read_text()
    assert log.count("experts: MaxVio") == 5
    program = open_model(result.program_folder)
    biases = [tensor for name, tensor in program.state_dict().items() if name.endswith("balance_bias")]
    assert len(biases) == 2 and all(0.299 <= float(bias.abs().max()) <= 5 * 0.3 + 1e-5 for bias in biases)  # an odd number of moves of 0.3
    assert result.model_folder is None  # in the model's own form others would be chosen

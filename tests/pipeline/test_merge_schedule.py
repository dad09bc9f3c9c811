"""torch's DualPipeV over stages that run by their graphs, each pair as one graph, against one process."""

import merge_work as work
import pipeline_cases as cases
import pipeline_work as pipelines
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "passes", "parts"), [("decoder", [], False), ("mixture", ["raise-moe"], True)])
def test_dual_pipe_with_pairs_by_graph_on_two_ranks_is_one_process(ranks, name, passes, parts):
    results = ranks.run(work.dual_pipe_by_graph, name, passes, parts, size=2)
    loss, expected = pipelines.alone(name, passes, 4)
    assert [r[0] for r in results if r[0] is not None] == [pytest.approx(loss, rel=1e-5)]
    found = {n: g for _, grads, _ in results for part in grads.values() for n, g in part.items()}
    assert set(found) == set(expected)
    assert cases.largest_error(found, expected) <= 1e-5
    assert all(pairs for _, _, pairs in results)  # there were pairs, on both ranks


def test_stages_of_another_kind_are_refused():
    from types import SimpleNamespace

    from ftc.errors import FtcError
    from ftc.pipeline.overlapped_stage import register_graph_pairs

    with pytest.raises(FtcError, match="stage 3 is a SimpleNamespace; pairs by graph take GraphStages"):
        register_graph_pairs(SimpleNamespace(_stages=[SimpleNamespace(stage_index=3)]), work.SLOW_LINK)

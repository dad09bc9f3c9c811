"""The run files that come with ftc: found by name, valid, and planned for the number of ranks they are written for."""

import pytest

from ftc.errors import FtcError
from ftc.train.launch import resolve
from ftc.train.shipped import run_file, shipped

pytest.importorskip("torchtitan")

# name: (ranks, billions of parameters with 10%, whether its text comes with Python, GiB of a device it must fit)
RUNS = {
    "quickstart": (1, 0.00079, True, 1),
    "four-domains": (1, 0.0030, False, 2),
    "dense-1b": (8, 1.236, False, 80),
    "llama3-8b": (8, 8.030, False, 80),
}


def test_every_shipped_file_is_named_here():
    assert list(shipped()) == list(RUNS)
    assert all(len(said) > 10 for said in shipped().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_is_planned_and_fits(name):
    from ftc.train.dry_run import dry_run

    ranks, billions, has_text, gib = RUNS[name]
    found = dry_run(name)
    assert found.ranks == ranks
    assert found.num_parameters / 1e9 == pytest.approx(billions, rel=0.1)
    assert found.fits(gib * 2**30)
    assert bool(found.missing) is not has_text
    # 6 FLOPs a token for each parameter that is multiplied, and attention on top
    assert found.flops_per_token > 5.9 * (found.num_parameters - 128256 * 4096 * (name == "llama3-8b")) * (name != "quickstart")


def test_a_misspelt_name_is_an_error_with_the_nearest():
    with pytest.raises(FtcError, match="did you mean 'llama3-8b'"):
        run_file("lama3-8b")


def test_a_shipped_run_can_be_changed():
    assert resolve("llama3-8b", {"training.seq_len": 4096})["training"]["seq_len"] == 4096

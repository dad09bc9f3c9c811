"""What tests of runs share."""

import importlib.util

import pytest

if importlib.util.find_spec("torchtitan"):
    from ftc.train import device

    device.install()  # before a test module imports torchtitan, which asks for an accelerator once


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of eight short texts."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog\n" * 60)
    return folder

"""The machine's peak, and the loggers that need a package."""

import json
import time

import pytest
import torch

from ftc.errors import FtcError
from ftc.train.peak import PEAK_FILE, measured_bandwidth, measured_flops, run_peak_flops
from ftc.train.sections import check_loggers


def test_no_product_of_another_size_is_much_faster_than_the_peak():
    peak = measured_flops(torch.float32)
    a, b = torch.randn(1536, 512), torch.randn(512, 1536)
    a @ b
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    assert 0.02 * peak < 2 * 1536 * 512 * 1536 / min(seconds) < 3 * peak


def test_memory_moves_between_a_hundred_megabytes_and_ten_terabytes_a_second():
    assert 1e8 < measured_bandwidth() < 1e13


def test_a_run_measures_its_peak_once(tmp_path, monkeypatch):
    measured = iter([1.5e9, 2.5e9])
    monkeypatch.setattr("ftc.train.peak.measured_flops", lambda dtype: next(measured))
    assert [run_peak_flops(tmp_path, torch.float32) for _ in range(2)] == [1.5e9, 1.5e9]
    assert 1.5e9 in json.loads((tmp_path / PEAK_FILE).read_text()).values()
    assert run_peak_flops(tmp_path, torch.bfloat16) == 2.5e9


@pytest.mark.parametrize(("key", "package", "extra"), [("enable_wandb", "wandb", "wandb"), ("enable_tensorboard", "tensorboard", "train")])
def test_a_logger_without_its_package_is_an_error_that_names_the_extra(key, package, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(FtcError, match=rf"metrics.{key} needs {package}.*ftc\[{extra}\]"):
        check_loggers({key: True})
    check_loggers({key: False})

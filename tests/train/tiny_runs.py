"""A run file of seconds and what its run logged, for the tests that train end to end."""

from ftc.train.metrics_file import METRICS_FILE, read_metrics


def run_file(data, **changes):
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "optimizer": "muon", "validation_fraction": 0.3},
        "training": {"steps": 6, "local_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"enable": True, "interval": 2, "last_save_model_only": False},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section] = values.get(section, {}) | {key: value}
    return values


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder / METRICS_FILE) if "loss" in row}

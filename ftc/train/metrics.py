"""torchtitan's metrics, also as one JSON line a logged step: what the progress bar and the report read."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from ftc.errors import FtcFailure
from ftc.train.balance import in_words
from ftc.train.metrics_file import METRICS_FILE, keep_steps_before
from ftc.train.peak import run_peak_flops
from ftc.train.ranks import is_first_rank

RECENT = 5  # losses that a run is stopped early by


class JsonlMetrics(MetricsProcessor):
    """Appends {"step", "loss" (nats a token), "grad_norm", "lr", "tokens", "tokens_per_second", "mfu" (%), "time" (s)} on
    rank 0, of a loss of several parts each part, of rank 0's last batch (of a pipeline's, the mean over its microbatches), and of a model whose experts are balanced "balance":
    a table of ftc.train.balance, of the last step. Rows of `log_held_out` stand between them.

    MFU is model FLOPs over the peak of the device's table; on a CPU over that of a measured product in the training's dtype.
    """

    def __init__(self, job_config: Any, parallel_dims: Any, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.path = Path(job_config.job.dump_folder) / METRICS_FILE
        if device_type == "cpu":
            name = job_config.training.mixed_precision_param
            self.gpu_peak_flops = run_peak_flops(self.path.parent, TORCH_DTYPE_MAP[name])
            logger.info(f"MFU is against {self.gpu_peak_flops / 1e9:.1f} GFLOP/s, measured on this CPU by a product in {name}")
        self._started = time.perf_counter()
        self.logged: deque[float] = deque(maxlen=RECENT)
        self._earlier_seconds: float | None = None
        self.num_tokens: Callable[[], int] | None = None  # that all ranks together were given
        self.gradient_norm: Callable[[], float] | None = None  # of whole weights, where a rank holds parts of them
        self.loss_parts: Callable[[], dict[str, Any]] | None = None  # where the last stage of a pipeline has them, not this rank
        self.balance: Callable[[], dict[str, Any]] = dict  # how the last step's tokens spread over experts

    def is_below(self, bound: float) -> bool:
        """Whether the mean of the last losses that were logged, `RECENT` of them, is below `bound`; the same on all ranks."""
        return len(self.logged) == RECENT and sum(self.logged) / RECENT < bound

    def log(
        self, step: int, global_avg_loss: float, global_max_loss: float, grad_norm: float, extra_metrics=None
    ) -> None:
        """Raises FtcFailure when the loss or the gradient is not finite."""
        if self.gradient_norm is not None:
            grad_norm = self.gradient_norm()
        if self.num_tokens is not None:  # torchtitan's count goes wrong on another number of ranks, or where ranks share sequences
            extra_metrics = {**(extra_metrics or {}), "n_tokens_seen": self.num_tokens()}
        if not (math.isfinite(global_avg_loss) and math.isfinite(grad_norm)):
            raise FtcFailure(
                f"at step {step} the loss is {global_avg_loss} and the gradient norm {grad_norm}; lower optimizer.lr, "
                "or raise lr_scheduler.warmup_steps, and continue from the last checkpoint"
            )
        self.logged.append(global_avg_loss)
        balance = self.balance()
        if balance:
            flat = {f"balance/{name}": value for name, value in balance.items() if isinstance(value, int | float)}
            extra_metrics = {**(extra_metrics or {}), **flat}
            logger.info(in_words(balance))
        now = time.perf_counter()
        tokens_per_second = self.ntokens_since_last_log / max(now - self.time_last_log, 1e-9)
        per_device = tokens_per_second / self.parallel_dims.non_data_parallel_size
        mfu = 100 * self.num_flops_per_token * per_device / self.gpu_peak_flops
        from ftc.train.adapter import objective_of

        parts = objective_of(self.job_config).parts if self.loss_parts is None else self.loss_parts()  # one of them may be "loss", of this rank alone
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        if not is_first_rank():
            return
        extra = extra_metrics or {}
        row = {
            "step": step,
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "lr": extra.get("lr"),
            "tokens": extra.get("n_tokens_seen"),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        row |= {name: float(value) for name, value in parts.items() if name not in row}
        row |= {"balance": balance} if balance else {}
        self._append(row)

    def log_held_out(self, step: int, measured: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        """Append {"step", "validation_bits_per_byte": {source: ...}, "validation_loss": {source: nats a token}, "time"} on rank 0.

        `seconds`: how long the measurement took; they do not count against the tokens a second of the training.
        """
        self.time_last_log += seconds
        bits = {source: values["bits_per_byte"] for source, values in measured.items()}
        nats = {source: values["nats_per_token"] for source, values in measured.items()}
        for name, values in (("bits_per_byte", bits), ("loss", nats)):
            self.logger.log({f"validation_{name}/{source}": value for source, value in values.items()}, step)
        if is_first_rank():
            self._append({"step": step, "validation_bits_per_byte": bits, "validation_loss": nats})

    def _append(self, row: dict[str, Any]) -> None:
        """Append a row with the training seconds so far; the first one drops what an interrupted run logged from there on."""
        if self._earlier_seconds is None:
            self._earlier_seconds = keep_steps_before(self.path, row["step"])
        row["time"] = self._earlier_seconds + time.perf_counter() - self._started
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def build_metrics(job_config: Any, parallel_dims: Any, model_args: Any = None, tag: str | None = None) -> JsonlMetrics:
    """torchtitan's builder of metrics."""
    return JsonlMetrics(job_config, parallel_dims, tag)

"""torchtitan's metrics, also as one JSON line a logged step: what the progress bar and the report read."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.components.metrics import MetricsProcessor

from ftc.errors import FtcFailure
from ftc.train.metrics_file import METRICS_FILE, keep_steps_before
from ftc.train.ranks import is_first_rank


class JsonlMetrics(MetricsProcessor):
    """Appends {"step", "loss" (nats a token), "grad_norm", "lr", "tokens", "tokens_per_second", "time" (s)} on rank 0, and of
    a loss of several parts each part, of rank 0's last batch."""

    def __init__(self, job_config: Any, parallel_dims: Any, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.path = Path(job_config.job.dump_folder) / METRICS_FILE
        self._started = time.perf_counter()
        self._earlier_seconds: float | None = None
        self.gradient_norm: Callable[[], float] | None = None  # of whole weights, where a rank holds parts of them

    def log(
        self, step: int, global_avg_loss: float, global_max_loss: float, grad_norm: float, extra_metrics=None
    ) -> None:
        """Raises FtcFailure when the loss or the gradient is not finite."""
        if self.gradient_norm is not None:
            grad_norm = self.gradient_norm()
        if extra_metrics and "n_tokens_seen" in extra_metrics:  # ranks that share a sequence each count all of it
            extra_metrics["n_tokens_seen"] /= self.parallel_dims.cp
        if not (math.isfinite(global_avg_loss) and math.isfinite(grad_norm)):
            raise FtcFailure(
                f"at step {step} the loss is {global_avg_loss} and the gradient norm {grad_norm}; lower optimizer.lr, "
                "or raise lr_scheduler.warmup_steps, and continue from the last checkpoint"
            )
        now = time.perf_counter()
        tokens_per_second = self.ntokens_since_last_log / max(now - self.time_last_log, 1e-9)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        if not is_first_rank():
            return
        if self._earlier_seconds is None:
            self._earlier_seconds = keep_steps_before(self.path, step)
        extra = extra_metrics or {}
        row = {
            "step": step,
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "lr": extra.get("lr"),
            "tokens": extra.get("n_tokens_seen"),
            "tokens_per_second": tokens_per_second,
            "time": self._earlier_seconds + now - self._started,
        }
        from ftc.train.adapter import objective_of

        row |= {name: float(value) for name, value in objective_of(self.job_config).parts.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def build_metrics(job_config: Any, parallel_dims: Any, model_args: Any = None, tag: str | None = None) -> JsonlMetrics:
    """torchtitan's builder of metrics."""
    return JsonlMetrics(job_config, parallel_dims, tag)

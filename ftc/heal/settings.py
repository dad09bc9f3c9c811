"""What can be set about healing; light, as the list of recipe stages reads it at every start."""

from dataclasses import dataclass

from ftc.errors import FtcError


@dataclass(frozen=True)
class HealSettings:
    """`tokens` to distil on, in windows of `seq_len`, `batch` windows a step; `parameters`: all, or those of the converted attentions alone.

    `stop_below`: nats a token at which distillation ends early, 0 for never. `store`: how many of the original's likeliest tokens to store first, 0 to
    run it beside the training. `changes` are further keys of the run ("training.compile").
    """

    tokens: int = 1_000_000
    seq_len: int = 256
    batch: int = 16
    parameters: str = "all"
    learning_rate: float = 1e-3
    closed_form: bool = True
    stop_below: float = 0.0
    store: int = 0
    nproc: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.parameters not in ("all", "converted"):
            raise FtcError(f'parameters = {self.parameters!r}; use "all" or "converted"')
        for name in ("tokens", "seq_len", "batch", "nproc"):
            if getattr(self, name) < 1:
                raise FtcError(f"{name} = {getattr(self, name)} must be 1 or more")
        if self.tokens < self.seq_len * self.batch:
            raise FtcError(f"tokens = {self.tokens} is less than one step of {self.batch} windows of {self.seq_len}")

    @property
    def steps(self) -> int:
        """Of distillation."""
        return max(self.tokens // (self.seq_len * self.batch), 1)

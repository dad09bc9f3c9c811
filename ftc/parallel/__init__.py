"""Programs on several ranks: binding them to process groups, weights whole and in parts, batches, norms, checkpoints; see docs/parallel.md."""

from ftc.parallel.batch import split_batch
from ftc.parallel.bind import bind, unbind
from ftc.parallel.checkpoint import checkpoint_state
from ftc.parallel.gradients import clip_gradients, gradient_norm, sum_gradients
from ftc.parallel.weights import divided_parameters, whole_state_dict

__all__ = [
    "bind",
    "checkpoint_state",
    "clip_gradients",
    "divided_parameters",
    "gradient_norm",
    "split_batch",
    "sum_gradients",
    "unbind",
    "whole_state_dict",
]

"""Memory of a model that answers: weights, cache and activations, predicted from its graphs and measured."""

from ftc.memory.layers import FORMS, LayerCache
from ftc.memory.measure import measure
from ftc.memory.predict import Memory, Plan, predict

__all__ = ["FORMS", "LayerCache", "Memory", "Plan", "measure", "predict"]

"""Mixtures of experts outside of graphs: experts placed on ranks by their loads, and what a placement does to a recorded routing."""

from ftc.moe.placement import EMPTY, Plan, lower_bound, place
from ftc.moe.serving import Served, in_order, loads_of, migration_bytes, simulate

__all__ = ["EMPTY", "Plan", "Served", "in_order", "loads_of", "lower_bound", "migration_bytes", "place", "simulate"]

"""Schedules of pipelines before anything runs: costs, simulation, search, bounds."""

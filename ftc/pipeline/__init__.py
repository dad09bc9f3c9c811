"""Stages of a program on ranks of their own, and the schedules that run them."""

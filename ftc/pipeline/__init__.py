"""Stages of a program on ranks of their own, and the schedules that run them."""

from ftc.pipeline.cut import cut as cut
from ftc.pipeline.partition import partition as partition
from ftc.pipeline.partition import stage_ranks as stage_ranks
from ftc.pipeline.partition import stages_of_rank as stages_of_rank
from ftc.pipeline.stages import Stage as Stage
from ftc.pipeline.tied import TiedParameters as TiedParameters

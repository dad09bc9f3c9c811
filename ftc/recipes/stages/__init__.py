"""The kinds of stage that come with ftc, one a file."""

from ftc.recipes.stages.evaluate import Evaluate
from ftc.recipes.stages.generate import Generate
from ftc.recipes.stages.heal import Heal
from ftc.recipes.stages.rewrite import Rewrite
from ftc.recipes.stages.train import Train
from ftc.recipes.stages.verify import Verify

STAGES = (Train, Rewrite, Heal, Verify, Evaluate, Generate)

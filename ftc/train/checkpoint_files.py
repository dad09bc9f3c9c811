"""torchtitan's checkpoint folders, `step-N`, as files: which are whole, and taking away those that are not."""

import shutil
from pathlib import Path

# What a writer puts there last, of a distributed checkpoint and of one in Hugging Face's form.
_LAST_FILES = (".metadata", "model.safetensors.index.json")


def newest_step(folder: Path) -> int | None:
    """The step of the newest finished distributed checkpoint in `folder`, None where there is none."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/.metadata")]
    return max(steps, default=None)


def remove_half_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in `folder` whose writing ended early: those without the file that is written last."""
    for checkpoint in folder.glob("step-*"):
        if not any((checkpoint / name).is_file() for name in _LAST_FILES):
            shutil.rmtree(checkpoint, ignore_errors=True)

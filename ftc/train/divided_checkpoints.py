"""Checkpoints of weights that ranks hold parts of: saved and loaded by their places in the whole, so any number of ranks can read them."""

from typing import Any

from torch import Tensor, nn

from ftc.parallel.checkpoint import Pieces, checkpoint_state


class AtTheirPlaces:
    """A part of torchtitan's state (model, optimizer) whose divided tensors are shown to checkpoints as pieces of the whole.

    Pieces are views of the tensors' own memory, so loading fills these in place.
    """

    def __init__(self, state: Any, program: nn.Module):
        self._state, self._program = state, program
        self._own: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def state_dict(self) -> dict[str, Any]:
        """The state, with whole names and shapes."""
        self._own = self._state.state_dict()
        return checkpoint_state(self._program, self._own)

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take what was loaded into the pieces that `state_dict` gave, and all else as it is."""
        self._state.load_state_dict({key: self._of(key, value) for key, value in loaded.items()})

    def _of(self, key: str, value: Any) -> Tensor | Any:
        return self._own[key] if isinstance(value, Pieces) else value

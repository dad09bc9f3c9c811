"""How a model is told that the documents of a window must not see each other, and the proof that it does as told.

Models of transformers build their masks, sliding windows included, from positions that begin anew, and would add a mask of
truth values to the scores in eager attention. Any other model is given the mask as well. Whether documents are really kept
apart is tried on two short ones before training begins.
"""

import inspect

import torch
from torch import Tensor, nn

from ftc.data.document_mask import document_mask
from ftc.errors import FtcError
from ftc.evaluate import logits_of

_LENGTHS = (5, 7)  # tokens of the two documents
_TOLERANCE, _TOLERANCE_16_BITS = 1e-5, 3e-2  # of the largest logit: what rounding may change
_OFF = "set document_mask = false"


def apart_inputs(model: nn.Module) -> tuple[str, ...]:
    """The names of the inputs that keep documents apart. Raises FtcError for a model that takes none."""
    known = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    makes_masks = hasattr(getattr(model, "config", None), "_attn_implementation")
    names = ("position_ids",) if makes_masks else ("position_ids", "attention_mask")
    missing = [] if open_ended else [name for name in names if name not in known]
    if missing:
        raise FtcError(f"[ftc] document_mask: {type(model).__name__} takes no {missing[0]}; {_OFF}")
    return names


def packed_inputs(position_ids_BT: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The inputs of these names for windows with these positions."""
    inputs = {"position_ids": position_ids_BT}
    return inputs | ({"attention_mask": document_mask(position_ids_BT)} if "attention_mask" in names else {})


def check_apart(model: nn.Module, vocab_size: int, names: tuple[str, ...]) -> None:
    """Raise FtcError unless two documents in one window have the logits that each has alone. Nothing is changed."""
    generator, training = torch.Generator().manual_seed(0), model.training
    documents = [torch.randint(vocab_size, (1, size), generator=generator) for size in _LENGTHS]
    positions_BT = torch.cat([torch.arange(size) for size in _LENGTHS])[None]
    model.eval()
    try:
        with torch.no_grad():
            alone_BTV = torch.cat([logits_of(model(input_ids=ids_BT)) for ids_BT in documents], dim=1)
            packed_BTV = logits_of(model(input_ids=torch.cat(documents, dim=1), **packed_inputs(positions_BT, names)))
    finally:
        model.train(training)
    error = float((packed_BTV - alone_BTV).abs().max() / alone_BTV.abs().max().clamp(min=1e-30))
    if not error <= (_TOLERANCE if alone_BTV.dtype.itemsize > 2 else _TOLERANCE_16_BITS):
        raise FtcError(
            f"[ftc] document_mask: given {' and '.join(names)}, {type(model).__name__} does not keep the documents of a window "
            f"apart; the logits of two short ones change by {error:.2g} of the largest when they share a window. {_OFF}"
        )

"""mtp-draft: the modules of add-mtp stay as a draft for speculative decoding, and no longer take part in the loss.

A call with labels returns the next-token loss, same bits; a call without them still has the modules' logits among its extras, and
`ftc.draft.Draft` runs the modules by themselves: hidden states and the next tokens in, draft logits out.
"""

from dataclasses import dataclass
from typing import ClassVar

from ftc.passes.strip_mtp import leave_out
from torch import fx

from ftc.capture.results import extras
from ftc.rewrite.outcome import Outcome
from ftc.rewrite.passes import Pass


@dataclass(frozen=True)
class MtpDraft(Pass):
    """Takes the modules out of the graphs that return a loss, and keeps them in the others."""

    name: ClassVar[str] = "mtp-draft"
    summary: ClassVar[str] = "the modules of add-mtp stay as a draft for speculative decoding; the loss is the next token's again"
    contract: ClassVar[str] = "bitwise"
    inverse: ClassVar[bool] = True
    sees_calls: ClassVar[bool] = True

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        places = extras(graph)
        if "mtp_total_loss" in places:
            outcome.uncalled = leave_out(graph, outcome)
        else:
            outcome.already = int("mtp_logits_1" in places)
        return outcome

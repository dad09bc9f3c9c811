"""The pass protocol: a pass is a frozen dataclass whose fields are its options, with a name, a contract and `apply`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ftc.errors import FtcError
from ftc.rewrite.outcome import Outcome

CONTRACTS = ("bitwise", "exact", "lossy")
Expectation = str | int


@dataclass(frozen=True)
class Pass:
    """One rewrite. Subclasses set the class attributes and implement `apply`; their dataclass fields are the options.

    `contract`: bitwise, exact or lossy (then `metric` and `bound` say what is measured and how far it may go).
    `inverse`: whether the weights can go back through the lenses. `requires`: passes that must have run before; they are
    run first where they have not. `default_expect`: what `expect` is where the user says nothing. `sees_calls`: it is given
    shell graphs with their calls of regions in place (`call_module` nodes), and may add calls of regions that it adds.
    `trained_by`: the loss that trains what it adds to a model or rewrites in it; a run takes it where its file names none.
    `every_graph`: a near miss anywhere is an error whatever `expect` says, because the graphs of a program have to change
    together.

    Optional methods. `with_program(program)` gives the pass with options filled in from the program, before it is applied.
    `prove(before, after, earlier=None)` replaces the comparison of the two graphs, for a pass that changes the function on purpose (`earlier`: recorded
    trials, for a pass whose trials do not follow from the graphs alone): it returns
    trials as a certificate holds them (seed, sizes, dtype, lifted, output_error, gradient_error, bound) and raises FtcFailure where no
    number says what is wrong; `ftc verify` calls it again. `new_config(config)` gives the configuration of the rewritten model.

    Lossy passes. `calibrate(program, calibration, tell)` gives a pass for each region by name, made from what the program computes
    on text, or None where these options need none; `max_kl` is the option that bounds KL(original || rewritten), which is measured
    on text apart before anything is changed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    sees_calls: ClassVar[bool] = False
    trained_by: ClassVar[str] = ""
    default_expect: ClassVar[Expectation] = "some"
    every_graph: ClassVar[bool] = False

    def kept_contract(self) -> str:
        """The contract that the pass keeps with these options: a lossy one may lose nothing."""
        return self.contract

    def apply(self, graph: fx.Graph) -> Outcome:
        """Rewrite every site in `graph`, in place, and say what was matched, what was already in the target form, what
        was nearly a site, and by which lenses the parameters follow. A miss leaves the graph untouched."""
        raise NotImplementedError


def check_max_kl(value: float | None) -> None:
    """ValueError for a bound of a lossy pass that is no positive number."""
    if value is not None and not value > 0:
        raise ValueError(f"max_kl = {value} must be more than 0")


def check_expectation(expect: object, name: str) -> Expectation:
    """The expectation itself when it is valid: "all", "some", "any" or a number of sites. FtcError otherwise."""
    if expect in ("all", "some", "any") or (isinstance(expect, int) and not isinstance(expect, bool) and expect >= 0):
        return expect
    raise FtcError(f"pass {name}: expect = {expect!r} is not valid; use 'all', 'some', 'any' or a number of sites")

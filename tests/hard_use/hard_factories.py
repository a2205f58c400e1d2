"""Models whose code does what models should not: over the verbs that run it."""

from __future__ import annotations

from hard_case import ON_SIMULATED, SHAPE, Case

#: Factory, what is said of it, and the exit status.
_WRONG = (
    ("raises", "fails: KeyError"),
    ("leaves", "fails: SystemExit"),
    ("number", "returned int, not a torch.nn.Module"),
    ("Broken", r"fails on an input of shape \(1, 1, 8, 8\): RuntimeError: wires"),
    ("Leaving", "fails on an input of shape .*SystemExit"),
    ("nested", "nest deeper than Python can follow"),
    ("unbalanced", "fails on an input of shape"),
    ("Recursive", "fails on an input of shape .*RecursionError"),
)
_OF_THEIR_OUTPUT = (
    ("Pair", "tuple|one tensor|several outputs"),
    ("Words", "tensor|export|capture"),
    ("Nothing", "tensor|export|capture"),
    ("DependsOnData", "export|capture"),
    ("Grows", "export|capture"),
    ("Complex", "returns complex64"),
    ("Empty", r"of shape \(1, 0, 6, 6\): a bundle needs numbers"),
)
_VERBS = {
    "estimate": ON_SIMULATED,
    "measure": ON_SIMULATED,
    "space": (),
    "fold": (),
    "deploy": (*ON_SIMULATED, "--output", "new"),
}

CASES: tuple[Case, ...] = (
    *(
        Case(verb, f"the factory {name}", (f"hard_nets:{name}", *SHAPE, *rest), says)
        for verb, rest in _VERBS.items()
        for name, says in _WRONG
    ),
    *(
        Case("deploy", f"the factory {name}", (f"hard_nets:{name}", *SHAPE, *_VERBS["deploy"]), says)
        for name, says in _OF_THEIR_OUTPUT
    ),
    Case("deploy", "a weight that is no number", ("hard_nets:spoilt", *SHAPE, *_VERBS["deploy"]),
         "is not finite on an example .*check its weights", code=1),
    Case("fold", "a weight that is no number", ("hard_nets:spoilt", *SHAPE, "--verify"), "is not finite on an example",
        code=1),
)  # fmt: skip

"""Options and arguments that cannot be meant, over every verb."""

from __future__ import annotations

from hard_case import NET, ON_SIMULATED, SHAPE, Case, both, folder_instead, gone, write

ALL = (
    "profile", "fit", "estimate", "measure", "space", "search", "fold", "deploy", "verify", "report", "run",
    "device list", "device show", "device check", "device revalidate", "device add",
)  # fmt: skip
_LACKING = {
    "profile": "Missing option '--device'", "fit": "Missing option '--device'", "estimate": "Missing argument 'model'",
    "measure": "Missing argument 'model'", "space": "give a model, or --config", "search": "search needs --model",
    "fold": "Missing argument 'model'", "deploy": "Missing argument 'model'", "verify": "Missing argument 'bundle'",
    "report": "Missing argument 'folder'", "run": "Missing argument 'config'", "device show": "Missing argument 'name'",
    "device check": "Missing argument 'name'", "device revalidate": "Missing argument 'name'",
    "device add": "Missing argument 'name'",
}  # fmt: skip
_NAMING_A_DEVICE = {
    "profile": ("--device",), "fit": ("--device",), "estimate": (NET, *SHAPE, "--device"),
    "measure": (NET, *SHAPE, "--device"), "space": (NET, *SHAPE, "--device"),
    "deploy": (NET, *SHAPE, "--output", "new", "--device"), "verify": ("bundle", "--device"),
    "device show": (), "device check": (), "device revalidate": (),
}  # fmt: skip
#: A second device that was never measured.
_SECOND = write("devices/second.toml", 'runtime = "simulated"\n')
_MODEL = (NET, *SHAPE)
_BUDGET = ("--model", NET, *SHAPE, "--data", "synthetic", "--budget")
_DEPLOY = (*_MODEL, *ON_SIMULATED, "--output", "new")
_INT8 = (*_DEPLOY, "--precision", "int8", "--data", "synthetic")


def _cases(verb: str, says: str, before: tuple[str, ...], **values: tuple[str, ...]) -> list[Case]:
    """Cases of one verb that have their beginning and their message in common."""
    return [Case(verb, name.replace("_", " "), (*before, *arguments), says) for name, arguments in values.items()]


CASES: tuple[Case, ...] = (
    *(Case(verb, "an unknown option", ("--nonsense",), "No such option") for verb in ALL),
    *(Case(verb, "nothing given", (), says) for verb, says in _LACKING.items()),
    *(
        Case(verb, "an unknown device", (*before, "toaster"), "unknown device 'toaster'; known devices: .*simulated")
        for verb, before in _NAMING_A_DEVICE.items()
    ),
    *(
        Case(verb, "a device file that is not there", (*before, "nowhere/x.toml"), "x.toml does not exist")
        for verb, before in _NAMING_A_DEVICE.items()
        if verb in ("fit", "measure", "verify", "device show")
    ),
    Case("device show", "a name of thousands of letters", ("x" * 5000 + ".toml",), "does not exist|too long"),
    # profile
    *_cases(
        "profile", "minutes is", ON_SIMULATED, no_minutes=("--minutes", "0"), minutes_below_0=("--minutes=-1",),
        minutes_that_are_none=("--minutes", "nan"), endless_minutes=("--minutes", "inf"),
    ),
    *_cases(
        "profile", "target is", (*ON_SIMULATED, "--minutes", "0.1"), target_of_0=("--target", "0"),
        target_of_all=("--target", "100"), target_that_is_none=("--target", "nan"), target_below_0=("--target=-3",),
    ),
    Case("profile", "minutes in words", (*ON_SIMULATED, "--minutes", "ten"), "Invalid value for '--minutes'"),
    Case("profile", "a seed below 0", (*ON_SIMULATED, "--seed=-1", "--minutes", "0.1"), "seed is -1"),
    Case("profile", "a seed with a comma", (*ON_SIMULATED, "--seed", "1.5"), "Invalid value for '--seed'"),
    Case("profile", "a model that is none", (*ON_SIMULATED, "--model", "nothing"), "there is no model 'nothing'"),
    Case("profile", "a model without a shape", (*ON_SIMULATED, "--model", NET), "needs the shape of its input"),
    Case("profile", "an ONNX file as model", (*ON_SIMULATED, "--model", "net.onnx"), "needs PyTorch"),
    Case("profile", "a model without widths", (*ON_SIMULATED, "--model", "hard_nets:empty", *SHAPE), "width"),
    # fit
    Case("fit", "never profiled", ("--device", "second"), "run `hwsearch profile`", spoil=_SECOND),
    Case("fit", "from itself", (*ON_SIMULATED, "--from", "simulated"), "has been profiled already"),
    Case("fit", "from an unknown device", ("--device", "second", "--from", "toaster"), "unknown device", spoil=_SECOND),
    Case("fit", "from one without predictor", ("--device", "simulated", "--from", "second"), "profiled already|no pred",
         spoil=_SECOND),
    *(
        Case("fit", f"{count} networks", ("--device", "second", "--from", "simulated", f"--networks={count}"),
             r"networks|choose", spoil=_SECOND, writes=(r"latency_tables/second/device\.json",))
        for count in (0, -3)
    ),
    # shapes
    *(
        Case(verb, f"the shape {shape[:12]!r}", (NET, *ON_SIMULATED, f"--input={shape}"),
            "input (shape|'?.*in --input)")
        for verb in ("estimate", "measure")
        for shape in (
            " ", "1x", "0x1x8x8", "axb", "1x1x8x-8", "1x1x8x1e9", "1x1x1x1x1x1x1x1x8x8", "1048576x1048576x4x4",
            "a=1x1,a=1x1", "=1x1x8x8", "1x1x8x99999999999", "²x1x8x8",
        )
    ),
    Case("estimate", "no shape", (NET, *ON_SIMULATED), "needs the shape of its input"),
    Case("estimate", "a shape by name", (NET, *ON_SIMULATED, "--input", "x=1x1x8x8"), "is no ONNX file and has one"),
    Case("estimate", "a shape that does not fit", (NET, *ON_SIMULATED, "--input", "1x3x8x8"), "fails on an input of"),
    Case("estimate", "another shape than the file's", ("net.onnx", *ON_SIMULATED, "--input", "1x1x9x9"),
        "takes size 8"),
    Case("estimate", "another rank than the file's", ("net.onnx", *ON_SIMULATED, "--input", "1x1x8"), "takes 4 axes"),
    Case("estimate", "an unknown input", ("net.onnx", *ON_SIMULATED, "--input", "y=1x1x8x8"), "has no input 'y'"),
    # models by name
    *(
        Case(verb, f"the model {name[:24]!r}", (name, *ON_SIMULATED, *SHAPE), says)
        for verb in ("estimate", "measure")
        for name, says in (
            ("nothing", "there is no model"), ("missing.onnx", "cannot read the model"), ("devices",
             "holds no model.json"),
            ("no.such.module:net", "no Python module"), ("hard_nets:nothing", "has no 'nothing'"),
            ("hard_nets:NOT_A_FACTORY", "is a int, not a function"), (":", "does not name a model"),
            ("a:b:c", "does not name a model"), ("../x:y", "does not name a model"), ("n" * 5000, "there is no model"),
            ("timm:", "timm"), ("os:getcwd", "returned str"), ("a\nb", "there is no model"),
        )
    ),
    # space
    *_cases(
        "space", "minimum", _MODEL, minimum_0=("--minimum", "0"), minimum_below_0=("--minimum=-4",),
        minimum_that_is_none=("--minimum", "nan"), endless_minimum=("--minimum", "inf"),
            half_a_channel=("--minimum=1.5",),
    ),
    *_cases(
        "space", "quantum", _MODEL, quantum_0=("--quantum", "0"), quantum_below_0=("--quantum=-8",),
    ),
    Case("space", "a pattern that fits nothing", (*_MODEL, "--freeze", "nowhere.*"), "no group matches 'nowhere"),
    Case("space", "all frozen", (*_MODEL, "--freeze", "*"), "freeze every group"),
    Case("space", "model and config", (*_MODEL, "--config", "good.toml"), "one of the two"),
    Case("space", "an ONNX file", ("net.onnx",), "needs PyTorch"),
    Case("space", "no widths", ("hard_nets:identity", *SHAPE), "width"),
    # search by options
    *(
        Case("search", f"the budget {budget!r}", (*_BUDGET, budget), "--budget is")
        for budget in ("", "simulated", "simulated:0", "simulated:-1", "simulated:nan", ":3", "simulated:1e999", "a:b")
    ),
    Case("search", "an unknown method", (*_BUDGET, "simulated:1", "--method", "magic"), "search.method is 'magic'"),
    Case("search", "a device twice", (*_BUDGET, "simulated:1", "--budget", "simulated:2"), "named 2 times"),
    Case("search", "an unknown device", (*_BUDGET, "toaster:1"), "unknown device 'toaster'"),
    Case("search", "no model", ("--budget", "simulated:1"), "search needs --model"),
    Case("search", "no shape", ("--model", NET, "--budget", "simulated:1"), "search needs --input"),
    Case("search", "no budget", ("--model", NET, *SHAPE), "search needs --budget"),
    Case("search", "a shape that is none", ("--model", NET, "--input", "8", "--budget", "simulated:1"), "model.input"),
    Case("search", "a run name that is none", (*_BUDGET, "simulated:1", "--resume", "runs/ä"), "run.name"),
    Case("search", "an unknown module", ("--model", "no.module:x", *SHAPE, "--budget", "simulated:1"), "no Python mod"),
    # fold
    Case("fold", "an ONNX file", ("net.onnx",), "needs PyTorch"),
    Case("fold", "nothing to fold", ("hard_nets:identity", *SHAPE), "fold"),
    Case("fold", "below a file", (*_MODEL, "--output", "good.toml/net.onnx"), "cannot write"),
    Case("fold", "onto a folder", (*_MODEL, "--output", "model"), "cannot write"),
    Case("fold", "onto the folder itself", (*_MODEL, "--output", "."), "cannot write"),
    # deploy
    *_cases(
        "deploy", "--budget-ms is", _DEPLOY, budget_0=("--budget-ms", "0"), budget_below_0=("--budget-ms=-3",),
        budget_that_is_none=("--budget-ms", "nan"), endless_budget=("--budget-ms", "inf"),
    ),
    Case("deploy", "an unknown precision", (*_DEPLOY, "--precision", "float17"), "--precision is 'float17'"),
    Case("deploy", "data for float", (*_DEPLOY, "--data", "synthetic"), "--data is for 8 bits"),
    Case("deploy", "a superscript", (*_INT8, "--keep-fp32", "²"), "²"),
    Case("deploy", "a number of thousands of digits", (*_INT8, "--keep-fp32", "9" * 5000), "keep|layer"),
    Case("deploy", "tolerance that is none", (*_INT8, "--tolerance", "nan"), "tolerance is nan"),
    Case("deploy", "8 bits without data", (*_DEPLOY, "--precision", "int8"), "add --data"),
    Case("deploy", "8 bits with data that is none", (*_DEPLOY, "--precision", "int8", "--data", "nowhere"), "nowhere"),
    Case("deploy", "an ONNX file", ("net.onnx", *_DEPLOY[3:]), "needs PyTorch"),
    Case("deploy", "below a file", (*_MODEL, *ON_SIMULATED, "--output", "good.toml/b"), "cannot write"),
    Case("deploy", "onto a file", (*_MODEL, *ON_SIMULATED, "--output", "good.toml"), "cannot write"),
    Case("deploy", "onto other things", (*_MODEL, *ON_SIMULATED, "--output", "devices"), "holds other things"),
    Case("deploy", "onto a bundle with other things", (*_MODEL, *ON_SIMULATED, "--output", "bundle"),
         r"holds other things \(thesis\.tex\)", spoil=write("bundle/thesis.tex", "years of work")),
    Case("deploy", "onto a manifest of something else", (*_MODEL, *ON_SIMULATED, "--output",
        "latency_tables/simulated"),
         "holds other things"),
    # verify and report
    Case("verify", "nowhere", ("nowhere", *ON_SIMULATED), "nowhere is not a folder"),
    Case("verify", "a file", ("good.toml", *ON_SIMULATED), "is not a folder"),
    Case("verify", "an empty folder", ("void", *ON_SIMULATED), "holds no manifest", spoil=folder_instead("void")),
    Case("verify", "a table", ("latency_tables/simulated", *ON_SIMULATED), "is not a bundle's manifest"),
    Case("report", "nowhere", ("nowhere",), "nowhere is not a folder"),
    Case("report", "a file", ("good.toml",), "is not a folder"),
    Case("report", "an empty folder", ("void",), "is no run folder", spoil=folder_instead("void")),
    Case("report", "the devices", ("devices",), "is no run folder"),
    Case("report", "onto a folder", ("runs/done", "--output", "devices"), "is a folder"),
    Case("report", "onto the folder itself", ("runs/done", "--output", "."), "is a folder"),
    Case("report", "below a file", ("runs/done", "--output", "good.toml/x.html"), "cannot write"),
    Case("report", "a name of thousands of letters", ("x" * 5000,), "is not a folder|too long"),
    # devices
    *(
        Case("device add", f"the name {name!r}", (name, "--runtime", "simulated"), "is not usable")
        for name in ("../evil", "a/b", "", ".hidden", "two words", "x" * 65, "näme", "a\nb")
    ),
    Case("device add", "an unknown runtime", ("new", "--runtime", "abacus"), "runtime 'abacus' is not one of"),
    Case("device add", "a runtime that is a path", ("new", "--runtime", "../x"), "is not one of"),
    Case("device add", "an unknown precision", ("new", "--runtime", "simulated", "--precision", "int3"), "precision"),
    Case("device add", "a precision it has not", ("new", "--runtime", "simulated", "--precision", "float16"),
        "precisi"),
    *_cases("device add", "threads is", ("new", "--runtime", "simulated"), no_threads=("--threads", "0"),
            threads_below_0=("--threads=-1",), threads_by_the_thousand=("--threads", "1000")),
    Case("device add", "a device that is there", ("simulated", "--runtime", "simulated"), "is there already"),
    *(
        Case("device add", f"a board: {' '.join(option)}", ("new", "--runtime", "simulated", *option), says)
        for option, says in (
            (("--port", "22"), "host"), (("--host", "-oProxyCommand=x"), "host"), (("--host", "a b"), "host"),
            (("--host", "pi@x", "--port", "0"), "port"), (("--host", "pi@x", "--port", "70000"), "port"),
            (("--host", "pi@x", "--ssh-option", "nonsense"), "option"), (("--folder", "/x"), "host"),
        )
    ),
    *_cases("device check", "seconds is", ("simulated",), seconds_below_0=("--seconds=-1",),
            seconds_that_are_none=("--seconds", "nan"), endless_seconds=("--seconds", "inf")),
    Case("device revalidate", "no networks", ("simulated", "--networks", "0"), "networks"),
    Case("device revalidate", "networks below 0", ("simulated", "--networks=-4"), "networks"),
    Case("device revalidate", "a model that is none", ("simulated", "--model", "nothing"), "there is no model"),
    Case("device revalidate", "never profiled", ("second",), "run `hwsearch profile`", spoil=_SECOND),
    # a predictor that was never fitted
    *(
        Case(verb, "never fitted", (*arguments, "--device", "second"), "has no predictor: run hwsearch profile",
             spoil=_SECOND)
        for verb, arguments in (("estimate", _MODEL), ("space", _MODEL))
    ),
    Case("fit", "nothing measured but a manifest", ON_SIMULATED, "cannot be read",
         spoil=both(gone("latency_tables/simulated/kernels.csv"), gone("latency_tables/simulated/networks.csv"))),
)  # fmt: skip

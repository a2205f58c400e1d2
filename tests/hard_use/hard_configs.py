"""TOML files of ``run``, ``search`` and ``space --config`` that cannot be meant."""

from __future__ import annotations

from hard_case import NET, Case, Spoil, both, folder_instead, link, write

_RUN, _DEVICE = '[run]\nname = "x"\n', '[device]\nname = "simulated"\n'
_MODEL = f'[model]\nfactory = "{NET}"\ninput = "1x1x8x8"\n'
_SEARCH = '[search]\nbudget = "50%"\n'
_WHOLE = _RUN + _DEVICE + _MODEL + '[data]\nkind = "synthetic"\n' + _SEARCH


def _config(text: str | bytes) -> Spoil:
    return write("bad.toml", text)


def _in(section: str, line: str) -> str:
    """The whole config with one more line in a section, which it may bring."""
    header = f"[{section}]\n"
    return _WHOLE.replace(header, header + line + "\n") if header in _WHOLE else f"{_WHOLE}{header}{line}\n"


def _with(old: str, new: str) -> str:
    assert old in _WHOLE
    return _WHOLE.replace(old, new)


#: Name, the file's content, what is said of it.
_FILES: tuple[tuple[str, str | bytes, str], ...] = (
    ("empty", "", r"the section \[(device|model|search)\] is missing"),
    ("only a comment", "# nothing\n", "is missing: add it"),
    ("torn", "[run\n", "bad.toml is not valid TOML"),
    ("no TOML", "hello world", "is not valid TOML"),
    ("JSON", '{"run": {}}', "is not valid TOML"),
    ("not UTF-8", b'[run]\nname = "\xff\xfe"\n', "is not valid TOML"),
    ("UTF-16", _WHOLE.encode("utf-16"), "is not valid TOML"),
    ("a byte order mark", b"\xef\xbb\xbf" + _WHOLE.encode(), "is not valid TOML"),
    ("NUL bytes", _WHOLE.encode() + b"\0\0", "is not valid TOML"),
    ("only NUL bytes", b"\0" * 4096, "is not valid TOML"),
    ("a section twice", _WHOLE + _DEVICE, "is not valid TOML"),
    ("a key twice", _with('budget = "50%"', 'budget = "50%"\nbudget = "60%"'), "is not valid TOML"),
    ("brackets without an end", "x = " + "[" * 100_000, "is not valid TOML"),
    ("tables without an end", "x = " + "{a=" * 5000, "is not valid TOML"),
    ("a number of thousands of digits", _in("search", "quantum = " + "9" * 6000), "is not valid TOML"),
    ("a date that is none", _in("search", "floor = 2024-13-45"), "is not valid TOML|search.floor"),
    ("an escape that is none", _with('"x"', '"\\q"'), "is not valid TOML"),
    ("half a character", _with('"x"', '"\\ud800"'), "is not valid TOML"),
    ("an unknown section", _WHOLE + "[serach]\n", "serach is no setting: did you mean search"),
    ("an unknown section unlike any", _WHOLE + "[quux]\n", "quux is no setting: a config has"),
    ("a key above all sections", 'name = "x"\n' + _WHOLE, "name is no setting"),
    ("a section that is a number", _with(_DEVICE, "").replace(_RUN, "device = 3\n" + _RUN), r"a section \[device\]"),
    ("a section that is a list", "model = []\n" + _with(_MODEL, ""), r"section \[model\]"),
    ("groups in single brackets", _WHOLE + '[groups]\npattern = "x"\n', "double brackets"),
    ("devices in single brackets", _WHOLE + '[devices]\nname = "x"\n', "double brackets"),
    ("a key with a line break", _WHOLE + '"a\\nb" = 3\n', "is no setting"),
    ("a key of a terminal's escapes", _WHOLE + '"\\u001b[2J" = 3\n', "is no setting"),
)

#: Section, line, what is said of it: types, near misses, signs, and numbers that are none.
_LINES: tuple[tuple[str, str, str], ...] = (
    ("run", "seed = -1", "run.seed is '?-1"),
    ("run", 'seed = "0"', "run.seed"),
    ("run", "seed = 1.5", "run.seed"),
    ("run", "seed = true", "run.seed"),
    ("run", "threads = 0", "run.threads"),
    ("run", "threads = 1000", "run.threads"),
    ("run", "sede = 3", "run.sede is no setting: did you mean seed"),
    ("run", 'folder = ""', "run.folder"),
    ("run", 'folder = "a\\u0000b"', "run.folder"),
    ("run", "folder = 3", "run.folder"),
    ("run", 'folder = "good.toml"', "cannot write the run folder"),
    ("device", "names = 3", "device.names is no setting: did you mean name"),
    ("model", "inputs = 3", "did you mean input"),
    ("model", "kwargs = 3", "model.kwargs"),
    ("model", "kwargs = { width = 0 }", "fails"),
    ("model", "kwargs = { nonsense = 1 }", "fails: TypeError"),
    ("model", 'weights = "nowhere.safetensors"', "there are no weights at nowhere"),
    ("model", 'weights = "good.toml"', "is no safetensors file"),
    ("model", 'weights = "a\\u0000b"', "model.weights"),
    ("data", "limit = 0", "data.limit"),
    ("data", "valid = -5", "data.valid"),
    ("data", 'limit = "all"', "data.limit"),
    ("data", "label_smoothing = 1.0", "data.label_smoothing"),
    ("data", "flip = 1", "data.flip"),
    ("data", "shift = -1", "data.shift"),
    ("data", "kid = 1", "did you mean kind"),
    ("search", "quantum = 0", "search.quantum"),
    ("search", "quantum = 2.5", "search.quantum"),
    ("search", "quantum = nan", "search.quantum"),
    ("search", "minimum = 0", "search.minimum"),
    ("search", "minimum = -0.5", "search.minimum"),
    ("search", "minimum = inf", "search.minimum"),
    ("search", "minimum = 1.5", "search.minimum is 1.5"),
    ("search", "floor = nan", "search.floor"),
    ("search", "floor = inf", "search.floor"),
    ("search", "quantile = 1.0", "search.quantile"),
    ("search", "quantile = 0.1", "search.quantile"),
    ("search", "budget_ms = 3.0", "give one of the two"),
    ("search", 'method = "magic"', "search.method is 'magic'"),
    ("search", "methd = 1", "did you mean method"),
    ("search", 'sharing = "both"', "search.sharing"),
    ("search", "population = 1", "search.population"),
    ("search", "generations = -1", "search.generations"),
    ("search", "candidates = 1e3", "search.candidates"),
    ("search", "trials = 3", "is no setting of the method"),
    ("search", "budgets = [1.0]", "budgets"),
    ("search", "finalist_share = 2.0", "search.finalist_share"),
    ("search", 'start = "middle"', "search.start"),
    ("supernet", "epochs = 0", "supernet.epochs"),
    ("supernet", "epochs = 1\nsteps = 1", "both epochs and steps"),
    ("supernet", "learning_rate = -1", "supernet.learning_rate"),
    ("train", "batch_size = 0", "train.batch_size"),
    ("train", 'precision = "int8"', "train.precision"),
    ("train", "momentum = 1.0", "train.momentum"),
    ("train", "learning_rate = inf", "train.learning_rate"),
    ("train", "learning_rte = 1", "did you mean learning_ra"),
    ("train", "nesterov = 0", "train.nesterov"),
    ("train", 'clip = "1"', "train.clip"),
    ("profile", "minutes = 0", "profile.minutes"),
    ("profile", "minutes = nan", "profile.minutes"),
    ("profile", 'minutes = "five"', "profile.minutes"),
    ("deploy", 'precision = "int4"', "deploy.precision"),
    ("deploy", "keep_fp32 = -1", "deploy.keep_fp32"),
    ("deploy", 'methods = "x"', "deploy.methods"),
    ("deploy", 'methods = ["guess"]\nprecision = "int8"', "calibration methods"),
    ("deploy", "images = 0", "deploy.ima"),
    ("branches", "warmup = 0.5", r"\[branches\]|branches"),
    ("masks", "epochs = 1", r"\[masks\]"),
    ("cells", "steps = 1", r"\[cells\]|cells"),
    ("filters", "epochs = 1", r"\[filters\]"),
    ("weights", "epochs = 1", r"\[weights\]"),
)
_REPLACED: tuple[tuple[str, str, str, str], ...] = (
    ("a budget of words", '"50%"', '"lots"', "search.budget is"), ("a budget of 0", '"50%"', '"0%"', "search.budget"),
    ("a budget of too much", '"50%"', '"101%"', "up to 100%"), ("a budget below 0", '"50%"', '"-5%"', "search.budget"),
    ("a budget that is a number", '"50%"', "50", "search.budget"), ("no budget", 'budget = "50%"\n', "",
     "needs either"),
    ("a budget of 0 ms", 'budget = "50%"', "budget_ms = 0", "search.budget_ms"),
    ("a budget of nan ms", 'budget = "50%"', "budget_ms = nan", "search.budget_ms"),
    ("a budget of inf ms", 'budget = "50%"', "budget_ms = inf", "search.budget_ms"),
    ("ms in quotes", 'budget = "50%"', 'budget_ms = "3"', "search.budget_ms"),
    ("an unknown device", '"simulated"', '"toaster"', "unknown device 'toaster'"),
    ("a device that is a number", '"simulated"', "7", "device.name"),
    ("a device with NUL", '"simulated"', '"a\\u0000b"', "device.name"),
    ("a name that is a path", '"x"', '"../x"', "run.name"), ("an empty name", '"x"', '""', "run.name"),
    ("a name of a thousand letters", '"x"', f'"{"x" * 1000}"', "run.name"),
    ("a factory that is none", NET, "small", "model.factory"), ("a factory that is code", NET, "os:system('x')",
     "facto"),
    ("an unknown module", NET, "no.module:x", "no Python module"), ("an unknown factory", NET, "hard_nets:no",
     "has no"),
    ("a shape that is none", "1x1x8x8", "1x1x8", "fails on an input of|model.input"),
    ("a shape of nothing", "1x1x8x8", "0x1x8x8", "model.input"), ("a shape of words", "1x1x8x8", "axb", "model.input"),
    ("an endless shape", "1x1x8x8", "999999x999999x9x9", "the input shape"),
    ("unknown data", '"synthetic"', '"cats"', "data.kind"),
    ("the first device again", _SEARCH, _SEARCH + '[[devices]]\nname = "simulated"\nbudget_ms = 1.0\n',
     "named 2 times"),
    ("a further device without a budget", _SEARCH, _SEARCH + '[[devices]]\nname = "second"\n', "needs either budget"),
    ("a rule that says nothing", _SEARCH, _SEARCH + '[[groups]]\npattern = "x"\n', "says nothing"),
    ("a rule of nothing", _SEARCH, _SEARCH + '[[groups]]\npattern = ""\nfreeze = true\n', "pattern"),
    ("a rule that fits nothing", _SEARCH, _SEARCH + '[[groups]]\npattern = "no.*"\nfreeze = true\n',
     "no group matches"),
    ("a maximum below the minimum", _SEARCH,
     _SEARCH + '[[groups]]\npattern = "0"\nminimum = 6\nmaximum = 2\n', "cannot keep at least 6"),
)  # fmt: skip
#: What ``run`` makes before it comes to the model, the device and the rules.
_FOLDER = (r"runs/x/(config\.json|events\.jsonl|lock)",)

CASES: tuple[Case, ...] = (
    *(Case("run", name, ("bad.toml",), says, spoil=_config(text)) for name, text, says in _FILES),
    *(
        Case("run", f"[{section}] {line[:40]}", ("bad.toml",), says, spoil=_config(_in(section, line)), writes=_FOLDER)
        for section, line, says in _LINES
    ),
    *(
        Case("run", name, ("bad.toml",), says, spoil=_config(_with(old, new)), writes=_FOLDER)
        for name, old, new, says in _REPLACED
    ),
    *(
        Case(verb, f"a config: {name}", arguments, says, spoil=spoil)
        for verb, arguments in (("run", ("bad.toml",)), ("search", ("bad.toml",)), ("space", ("--config", "bad.toml")))
        for name, spoil, says in (
            ("missing", write("other", ""), "cannot read the config bad.toml"),
            ("a folder", folder_instead("bad.toml"), "cannot read the config"),
            ("a link to itself", link("bad.toml", "bad.toml"), "cannot read the config"),
            ("a link to nothing", link("bad.toml", "nowhere"), "cannot read the config"),
            ("brackets without an end", _config("x = " + "[" * 100_000), "is not valid TOML"),
            ("a near miss", _config(_in("search", "quantm = 4")), "search.quantm is no setting: did you mean quantum"),
        )
    ),
    Case("search", "budgets of a family", ("bad.toml",), "use hwsearch run",
         spoil=_config(_with('budget = "50%"', 'method = "pas"\nbudgets = ["60%", "40%"]'))),
    Case("search", "a name of thousands of letters", ("x" * 5000,), "cannot read the config|too long"),
    Case("run", "a device file that is damaged", ("bad.toml",), "broken.toml: is not valid TOML",
         spoil=both(_config(_with('"simulated"', '"./broken.toml"')), write("broken.toml", "runtime = "))),
)  # fmt: skip

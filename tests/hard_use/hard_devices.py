"""Device files and device checks that are not what they should be."""

from __future__ import annotations

from hard_case import DEEP, DIGITS, NOT_UTF8, TABLE, Case, Spoil, both, cut, field, folder_instead, link, without, write

_CHECK = TABLE / "device.json"
_GOOD = 'runtime = "simulated"\n'


def _device(text: str | bytes) -> Spoil:
    return write("devices/bad.toml", text)


#: Name, content of devices/bad.toml, what is said of it. Only the text is looked at: no device is asked.
_TEXTS: tuple[tuple[str, str | bytes, str], ...] = (
    ("empty", "", "runtime: Field required"),
    ("torn", "runtime = ", "is not valid TOML"),
    ("not UTF-8", b'runtime = "\xff"', "cannot be read"),
    ("a byte order mark", b"\xef\xbb\xbf" + _GOOD.encode(), "TOML"),
    ("NUL bytes", b"\0" * 100, "is not valid TOML"),
    ("brackets without an end", "x = " + "[" * 100_000, "valid TOML"),
    ("a number of thousands of digits", _GOOD + "threads = " + "9" * 6000, "is not valid TOML"),
    ("an unknown runtime", 'runtime = "abacus"', "runtime 'abacus' is not one of"),
    ("a runtime that is a number", "runtime = 3", "runtime: .*string"),
    ("no runtime", "threads = 1", "runtime: Field"),
    ("threads in words", _GOOD + 'threads = "two"', "threads"),
    ("no threads", _GOOD + "threads = 0", "threads"),
    ("threads below 0", _GOOD + "threads = -1", "threads"),
    ("half a thread", _GOOD + "threads = 1.5", "threads"),
    ("threads that are none", _GOOD + "threads = nan", "threads"),
    ("threads yes", _GOOD + "threads = true", "threads"),
    ("threads by the thousand", _GOOD + "threads = 1000", "threads"),
    ("precision", _GOOD + 'precision = "int3"', "preci"),
    ("a precision it has not", _GOOD + 'precision = "float16"', "has no precision"),
    ("an unknown transport", _GOOD + 'transport = "pigeon"', "transport"),
    ("a board without a host", _GOOD + 'transport = "ssh"', "host"),
    ("a host without ssh", _GOOD + 'host = "pi@x"', "host"),
    ("a host that is an option", _GOOD + 'transport = "ssh"\nhost = "-oProxyCommand=x"', "host"),
    ("port 0", _GOOD + 'transport = "ssh"\nhost = "x"\nport = 0', "port"),
    ("endless patience", _GOOD + 'transport = "ssh"\nhost = "x"\npatience_s = inf', "patience_s"),
    ("a near miss", _GOOD + "thread = 1", "thread: Extra"),
    ("options that are a list", _GOOD + "options = []", "options"),
    ("an option that is a list", _GOOD + "[options]\ngmacs = [1]", "options.gmacs"),
    ("an option that is a switch", _GOOD + "[options]\ngmacs = true", "options.gmacs"),
    ("a section that is none", _GOOD + "[nonsense]\n", "nonsense"),
    ("a date", _GOOD + "[options]\nseed = 2024-01-01", "seed"),
)
#: Options that the simulated runtime refuses; it is asked by `device check`.
_OPTIONS: tuple[tuple[str, str], ...] = (
    ("gmcas = 3", "options.gmcas is unknown"),
    ("gmacs = 0", "options.gmacs is 0"),
    ("gmacs = -1", "options.gmacs"),
    ("gmacs = nan", "options.gmacs"),
    ("gmacs = inf", "options.gmacs"),
    ('gmacs = "fast"', "options.gmacs"),
    ("gmacs = 1e-300", "options.gmacs"),
    ("gmacs = " + "9" * 400, "options.gmacs"),
    ("block = 7", "options.block"),
    ("noise = 1e10", "options.noise"),
    ("noise = -1", "options.noise"),
    ("drift = 1.0", "options.drift"),
    ("slowdown = 1e300", "options.slowdown"),
    ("overhead_us = 1e300", "options.overhead_us"),
    ("seed = " + "9" * 400, "options.seed"),
    ("node_us = -0.1", "options.node_us"),
)
_CHECKS: tuple[tuple[str, Spoil, str], ...] = (
    ("empty", write(_CHECK, ""), "is not JSON"),
    ("torn", cut(_CHECK, 0.5), "is not JSON"),
    ("not UTF-8", write(_CHECK, NOT_UTF8), "is not JSON"),
    ("brackets without an end", write(_CHECK, DEEP), "not JSON"),
    ("digits", write(_CHECK, DIGITS), "is not JSON"),
    ("a list", write(_CHECK, "[]"), "is no device check"),
    ("another schema", field(_CHECK, "schema", value="x"), "is no device check"),
    ("another version", field(_CHECK, "version", value=99), "has version 99"),
    ("a field gone", without(_CHECK, "noise_floor"), "missing or unknown fields noise_floor"),
    ("a field more", field(_CHECK, "more", value=1), "missing or unknown fields more"),
    ("a speed of 0", field(_CHECK, "reference_ms", value=0), "reference_ms is 0"),
    ("a speed that is none", field(_CHECK, "reference_ms", value=float("nan")), "reference_ms is nan"),
    ("an endless speed", field(_CHECK, "reference_ms", value=float("inf")), "reference_ms is inf"),
    ("a speed below 0", field(_CHECK, "reference_ms", value=-1), "reference_ms is -1"),
    ("a speed of thousands of digits", field(_CHECK, "reference_ms", value=10**400), "reference_ms is 1000"),
    ("a noise in words", field(_CHECK, "raw_noise_floor", value="low"), "raw_noise_floor is 'low'"),
    ("messages that are a number", field(_CHECK, "messages", value=3), "messages is no list"),
    ("messages that are numbers", field(_CHECK, "messages", value=[1]), "messages is no list"),
    ("a verdict that is a number", field(_CHECK, "verdict", value=1), "verdict is 1"),
    ("a fingerprint that is a list", field(_CHECK, "fingerprint", value=[]), "fingerprint is list"),
    ("a fingerprint of numbers", field(_CHECK, "fingerprint", "cpu", value=3), "fingerprint.cpu is 3"),
    ("another canary", field(_CHECK, "canary", value="old"), "made with 'old'"),
    ("a folder", folder_instead(_CHECK), "cannot be read"),
)

CASES: tuple[Case, ...] = (
    *(Case("device show", f"device file {name}", ("bad",), says, spoil=_device(text)) for name, text, says in _TEXTS),
    *(
        Case("device check", f"options: {text[:24]}", ("bad",), says, spoil=_device(f"{_GOOD}[options]\n{text}\n"))
        for text, says in _OPTIONS
    ),
    *(Case("device show", f"check {name}", ("simulated",), says, spoil=spoil) for name, spoil, says in _CHECKS),
    *(
        Case(verb, f"check {name}", arguments, says, spoil=spoil)
        for verb, arguments in (
            ("measure", ("net.onnx", "--device", "simulated")),
            ("verify", ("bundle", "--device", "simulated")),
            ("profile", ("--device", "simulated", "--minutes", "0.1")),
        )
        for name, spoil, says in _CHECKS[1::5]
    ),
    *(
        Case("device list", f"beside a device file {name}", (), f"bad.toml: .*({says})", spoil=_device(text))
        for name, text, says in _TEXTS[:8]
    ),
    Case("device list", "a file whose name is none", (), "two words.toml.* is not usable",
         spoil=write("devices/two words.toml", _GOOD)),
    Case("device list", "a folder that is called a device", (), "cannot be read",
        spoil=folder_instead("devices/x.toml")),
    Case("device list", "a link to itself", (), "cannot be read", spoil=link("devices/x.toml", "x.toml")),
    Case("device show", "a link to nothing", ("x",), "cannot be read", spoil=link("devices/x.toml", "nowhere")),
    Case("device check", "a table folder that is a file", ("second",), "cannot be written",
         spoil=both(write("devices/second.toml", _GOOD), write("latency_tables/second", "a file"))),
    Case("profile", "a table folder that is a file", ("--device", "second", "--minutes", "0.01"), "cannot be? ?writ",
         spoil=both(write("devices/second.toml", _GOOD), write("latency_tables/second", "a file"))),
)  # fmt: skip

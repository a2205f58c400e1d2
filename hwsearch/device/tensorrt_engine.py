"""Building TensorRT engines: TensorRT 10 and 11 and TensorRT for RTX behind one set of functions.

All of them take a *strongly typed* network: precision is what the ONNX graph says (TensorRT 11 knows nothing else), so
a ``float16`` device gets a graph of float16, and 8 bits come as QDQ. Building needs no GPU with TensorRT for RTX, which
compiles ahead for named compute capabilities; TensorRT proper times its kernels while it builds, on the GPU.

An engine runs on the version and the compute capability that it was built for and nowhere else. So it is kept with both
in front (:func:`pack_engine`), and refused where they differ.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hwsearch.device.spec import Device
from hwsearch.errors import DeviceJobError, InputError

OPTIONS = ("flavour", "workspace_mb", "dla", "tf32", "level", "graph", "sparse")
#: Python modules of a flavour, the preferred one first.
_MODULES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
_MAGIC = b"hwsearch-engine1"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine is bound to.

    Attributes:
        flavour: ``tensorrt`` or ``rtx``.
        version: of TensorRT.
        capabilities: compute capabilities that it was built for (``sm_86``).
    """

    flavour: str
    version: str
    capabilities: tuple[str, ...]


def flavour_of(device: Device) -> str:
    """``tensorrt`` or ``rtx``: what the device asks for, else what is installed.

    Raises:
        InputError: an option is unknown, or there is no such flavour.
        DeviceJobError: neither is installed.
    """
    for name in device.options:
        if name not in OPTIONS:
            raise InputError(
                f"device {device.name}: options.{name} is unknown to tensorrt; known: {', '.join(OPTIONS)}"
            )
    wanted = str(device.options.get("flavour", ""))
    if wanted and wanted not in _MODULES:
        raise InputError(f"device {device.name}: options.flavour is {wanted!r}; known: {', '.join(_MODULES)}")
    for flavour in [wanted] if wanted else _MODULES:
        if any(find_spec(module) is not None for module in _MODULES[flavour]):
            return flavour
    named = " or ".join(module for flavour in ([wanted] if wanted else _MODULES) for module in _MODULES[flavour])
    raise DeviceJobError(f"device {device.name}: no module {named} is installed; install TensorRT there")


@cache
def load(flavour: str) -> ModuleType:
    """The TensorRT module of a flavour, its libraries loaded."""
    name = next(module for module in _MODULES[flavour] if find_spec(module) is not None)
    if name == "tensorrt_rtx_bindings":  # the bare wheels: nobody else loads their libraries
        libraries = find_spec("tensorrt_rtx_libs")
        if libraries is None or not libraries.submodule_search_locations:
            raise DeviceJobError("tensorrt_rtx_bindings is installed without its libraries, tensorrt-rtx-cu13-libs")
        for library in _RTX_LIBRARIES:
            ctypes.CDLL(str(Path(libraries.submodule_search_locations[0]) / library), mode=ctypes.RTLD_GLOBAL)
    return import_module(name)


def build_engine(
    device: Device, network: bytes, *, capabilities: Sequence[str] = (), timing_cache: bytes | None = None
) -> tuple[bytes, bytes | None]:
    """An ONNX network as a serialised engine, and what the timing cache grew to (None where there is none).

    Args:
        device: says flavour, precision, workspace and DLA.
        network: ONNX; its precision is kept (``tensorrt_precision`` writes a device's into it).
        capabilities: compute capabilities to build for (``sm_86``), with TensorRT for RTX; none is the GPU at hand.
        timing_cache: of earlier builds: the same kernels are chosen again, and faster.

    Raises:
        DeviceJobError: TensorRT does not parse or build the network; the message is its reason in one line.
        InputError: an option makes no sense, or the flavour cannot build for a named capability.
    """
    flavour = flavour_of(device)
    trt = load(flavour)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    definition = builder.create_network(_typed_flag(trt))
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(network):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise DeviceJobError(_one_line(reasons or logger.lines) or "TensorRT does not parse the network")
    if not definition.num_outputs:
        raise DeviceJobError("no network: TensorRT finds no output in it")
    for index in range(definition.num_inputs):
        value = definition.get_input(index)
        if any(size < 1 for size in value.shape):
            raise DeviceJobError(
                f"input {value.name!r} has an open size in {tuple(value.shape)}; export with fixed sizes"
            )
    config = _config(device, trt, builder, definition)
    if capabilities:
        _target(device, flavour, trt, config, capabilities)
    cache_object = None
    if flavour == "tensorrt":
        cache_object = config.create_timing_cache(timing_cache or b"")
        config.set_timing_cache(cache_object, ignore_mismatch=False)
    engine = builder.build_serialized_network(definition, config)
    if engine is None:
        raise DeviceJobError(_one_line(logger.lines) or "TensorRT does not build the network")
    grown = None if cache_object is None else bytes(config.get_timing_cache().serialize())
    return bytes(engine), grown


def pack_engine(engine: bytes, facts: EngineFacts) -> bytes:
    """An engine with what it is bound to in front."""
    head = json.dumps(asdict(facts), sort_keys=True).encode()
    return _MAGIC + struct.pack("<I", len(head)) + head + engine


def unpack_engine(data: bytes, here: EngineFacts) -> bytes:
    """The engine, where it was built for this version and one of these compute capabilities.

    Raises:
        DeviceJobError: it was built for another version or GPU, or the bytes are no packed engine.
    """
    start = len(_MAGIC) + 4
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise DeviceJobError("this is no engine that hwsearch packed; build it again")
    length = struct.unpack("<I", data[len(_MAGIC) : start])[0]
    try:
        values = json.loads(data[start : start + length])
        facts = EngineFacts(str(values["flavour"]), str(values["version"]), tuple(map(str, values["capabilities"])))
    except (ValueError, KeyError, TypeError):
        raise DeviceJobError("the packed engine is damaged; build it again") from None
    if (facts.flavour, facts.version) != (here.flavour, here.version):
        raise DeviceJobError(
            f"the engine is one of {facts.flavour} {facts.version}, here is {here.flavour} {here.version}; "
            "build it again"
        )
    if not set(here.capabilities) <= set(facts.capabilities):
        raise DeviceJobError(
            f"the engine was built for {', '.join(facts.capabilities)}, this GPU is {', '.join(here.capabilities)}; "
            "build it again"
        )
    return data[start + length :]


def _typed_flag(trt: ModuleType) -> int:
    """Creation flags of a strongly typed network; TensorRT 11 may know no other and have no flag for it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(device: Device, trt: ModuleType, builder: Any, definition: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0  # layers after each other: shares of parallel ones would not add up
    if not device.option("tf32", 0):
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and ten bits are no float32
    if device.option("sparse", 0):
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if workspace := device.option("workspace_mb", 0):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace * 2**20))
    if "level" in device.options:
        config.builder_optimization_level = int(device.option("level", 3))
    if "dla" in device.options:
        if builder.num_DLA_cores == 0:
            raise DeviceJobError(f"device {device.name}: options.dla is given, but there is no DLA here")
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = int(device.option("dla", 0))
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    return config


def _target(device: Device, flavour: str, trt: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    if flavour != "rtx":
        raise InputError(f"device {device.name}: TensorRT builds for the GPU at hand; only rtx builds for named ones")
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        found = getattr(trt.ComputeCapability, name.replace("_", "").upper(), None)
        if found is None:
            raise InputError(f"compute capability {name!r} is unknown to this TensorRT for RTX")
        config.set_compute_capability(found, index)


def _logger(trt: ModuleType) -> Any:
    class Quiet(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors: an exception's text is all that leaves here."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    return Quiet()


def _one_line(lines: Sequence[str]) -> str:
    text = " ".join("; ".join(lines).split())
    return text if len(text) <= 300 else text[:297] + "..."

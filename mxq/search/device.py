"""A GPU as its file states it: rates, and for tile times the numbers of one multiprocessor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxq.scheme import Scheme

_DEVICES = Path(__file__).parent / "devices"
_ARITHMETIC = ("bf16", "int8", "fp8", "int4")
_RATES = ("bandwidth_gb_s", "sm_count", "launch_us")
_MULTIPROCESSOR = (
    "arch",
    "clock_mhz",
    "l2_bytes_per_clock",
    "tile_cycles",
    "memory_efficiency",
    "issue_efficiency",
    "matrix_efficiency",
)


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """One multiprocessor (SM) of a device.

    ``l2_bytes_per_clock`` is what it can take from the cache. ``tile_cycles`` are the cycles of a
    tile outside its loop, and the efficiencies the part of each rate that a loop reaches: what to
    count with until a kernel was timed.
    """

    arch: int
    clock_mhz: float
    l2_bytes_per_clock: float
    tile_cycles: float
    memory_efficiency: float
    issue_efficiency: float
    matrix_efficiency: float


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of a device as its file states them, and where each number comes from.

    ``bandwidth_gb_s`` is what a copy achieves, ``tflop_s`` the dense rate of each arithmetic,
    None where the device lacks it. ``launch_us`` is the time of an empty kernel. ``gpu_names`` are
    what the driver calls it. Without ``multiprocessor`` only a roofline can be computed.
    """

    name: str
    bandwidth_gb_s: float
    tflop_s: Mapping[str, float | None]
    sm_count: int
    launch_us: float
    sources: Mapping[str, str]
    gpu_names: tuple[str, ...] = ()
    multiprocessor: Multiprocessor | None = None

    def rate(self, scheme: Scheme) -> float:
        """TFLOP/s of the arithmetic that a scheme runs in, or of the next wider one there is."""
        return self.rate_of(*_arithmetics(scheme))

    def rate_of(self, *arithmetics: str) -> float:
        """TFLOP/s of the first of these that the device has, bf16 after them.

        Raises:
            ValueError: If it has none of them.
        """
        for arithmetic in (*arithmetics, "bf16"):
            rate = self.tflop_s[arithmetic]
            if rate is not None:
                return rate
        raise ValueError(f"device {self.name!r} has no bf16 rate")


def load_device(name_or_path: str | Path) -> Device:
    """A device by its name, or from a JSON file of the same form.

    Raises:
        ValueError: If there is no such device, with the names there are, or a field is missing.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith(".json") else _DEVICES / f"{text}.json"
    if not path.is_file() or (path.parent == _DEVICES and path.stem not in device_names()):
        menu = ", ".join(device_names())
        raise ValueError(f"no device {text!r}; choose one of {menu}, or give a JSON file")
    try:
        return _device(json.loads(path.read_text()))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a device file ({type(error).__name__}: {error}); "
            "compare it with mxq/search/devices/h200.json"
        ) from error


def device_names() -> tuple[str, ...]:
    """Names that ``load_device`` knows."""
    files = sorted(file.stem for file in _DEVICES.glob("*.json"))
    return tuple(name for name in files if not name.startswith("kernels-"))


def device_of_gpu(gpu: str) -> Device:
    """The device whose driver name this is.

    Raises:
        ValueError: If no device file names it.
    """
    for name in device_names():
        device = load_device(name)
        if gpu in device.gpu_names:
            return device
    raise ValueError(
        f"no device file names the GPU {gpu!r}; write one after mxq/search/devices/h200.json, with "
        "that name in gpu_names, and give its path as --device"
    )


def _arithmetics(scheme: Scheme) -> tuple[str, ...]:
    if scheme.kind == "fp8":
        return ("fp8",)
    if scheme.a_bits == 16:
        return ("bf16",)
    return ("int4", "int8") if scheme.a_bits == 4 else ("int8",)


def _device(fields: Mapping[str, Any]) -> Device:
    numbers = {name: fields[name] for name in _RATES} | {
        name: fields["tflop_s"][name] for name in _ARITHMETIC
    }
    multiprocessor = None
    if "multiprocessor" in fields:
        cells = {name: fields["multiprocessor"][name] for name in _MULTIPROCESSOR}
        values = {name: float(cell["value"]) for name, cell in cells.items()}
        multiprocessor = Multiprocessor(int(values.pop("arch")), **values)
        numbers |= cells
    rates = {name: fields["tflop_s"][name]["value"] for name in _ARITHMETIC}
    return Device(
        name=fields["name"],
        bandwidth_gb_s=float(fields["bandwidth_gb_s"]["value"]),
        tflop_s={name: None if rate is None else float(rate) for name, rate in rates.items()},
        sm_count=int(fields["sm_count"]["value"]),
        launch_us=float(fields["launch_us"]["value"]),
        sources={name: cell["source"] for name, cell in numbers.items()},
        gpu_names=tuple(fields.get("gpu_names", ())),
        multiprocessor=multiprocessor,
    )

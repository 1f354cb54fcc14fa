"""Energy that a run's device has drawn, where the device counts it.

NVIDIA GPUs count it since Volta (NVML, read with the package nvidia-ml-py), processors do as RAPL domains, which Linux
shows below ``/sys/class/powercap``, often to root alone. Both count everything that runs on the device, and neither the
rest of the machine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 60.0
"""Seconds between readings: a RAPL counter starts anew after some 262 kJ, which a busy server draws in minutes."""

_meter: EnergyMeter | None = None


class Counter:
    """A counter of energy that may start anew at ``wraps_at``, in units of ``unit`` joules."""

    def __init__(self, read: Callable[[], int], unit: float, wraps_at: int | None = None) -> None:
        self._read, self._unit, self._wraps_at = read, unit, wraps_at
        self._last = read()
        self._total = 0

    def joules(self) -> float:
        """Since this object was made, if it was asked at least once between two new starts of the counter."""
        now = self._read()
        if now < self._last and self._wraps_at is not None:
            self._total += self._wraps_at
        self._total += now - self._last
        self._last = now
        return self._total * self._unit


class EnergyMeter:
    """Joules of all counters of a device since it was made.

    Args:
        device: ``cpu``, or a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = gpu_counters(device) if device.type == "cuda" else cpu_counters()
        self._lock, self._ended = threading.Lock(), threading.Event()
        if self._counters:
            threading.Thread(target=self._keep_reading, daemon=True).start()

    def _keep_reading(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.joules()

    def joules(self) -> float | None:
        """What was drawn so far, ``None`` where the device does not tell."""
        with self._lock:
            return sum(counter.joules() for counter in self._counters) if self._counters else None

    def close(self) -> None:
        """End the reading in the background."""
        self._ended.set()


def cpu_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """The packages of the processor, none where they cannot be read."""
    counters = []
    for domain in sorted(powercap.glob("intel-rapl:*")):  # the kernel's name for AMD's, too
        if domain.name.count(":") != 1:  # a part of a package
            continue
        file = domain / "energy_uj"
        try:
            wraps_at = int((domain / "max_energy_range_uj").read_text())
            counters.append(Counter(lambda file=file: int(file.read_text()), 1e-6, wraps_at))
        except OSError as error:
            logger.debug("energy of %s is not known: %s", domain.name, error)
    return counters


def gpu_counters(device: torch.device) -> list[Counter]:
    """The one GPU, or none where the package nvidia-ml-py is missing or the GPU does not count."""
    try:
        import pynvml
    except ImportError:
        logger.debug("energy of %s is not known: the package nvidia-ml-py is missing", device)
        return []
    try:
        pynvml.nvmlInit()
        # By its own name: NVML does not know CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1e-3)]
    except pynvml.NVMLError as error:
        logger.debug("energy of %s is not known: %s", device, error)
        return []


def start_meter(device: torch.device | None) -> None:
    """Let :func:`energy_joules` count from now on; ``None``: let it tell nothing."""
    global _meter
    if _meter is not None:
        _meter.close()
    _meter = None if device is None else EnergyMeter(device)


def energy_joules() -> float | None:
    """What the device has drawn since :func:`start_meter`, ``None`` where it is not known."""
    return None if _meter is None else _meter.joules()

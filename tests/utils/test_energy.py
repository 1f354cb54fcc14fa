"""Counters of energy: RAPL as files, NVML as a stand-in."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from recbole_llm.utils import energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages, one with a part, and a domain of another kind."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "dtpm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("900\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    monkeypatch.setattr(energy.cpu_counters, "__defaults__", (tmp_path,))
    yield tmp_path
    energy.start_meter(None)


def set_counters(powercap, value: int) -> None:
    for file in powercap.glob("*/energy_uj"):
        file.write_text(f"{value}\n")


def test_packages_are_summed_and_their_parts_are_not(powercap):
    energy.start_meter(torch.device("cpu"))
    assert energy.energy_joules() == 0
    set_counters(powercap, 950)
    assert energy.energy_joules() == pytest.approx(2 * 50e-6)


def test_a_counter_that_starts_anew_is_followed(powercap):
    energy.start_meter(torch.device("cpu"))
    total = 0
    for value, more in ((950, 50), (30, 80), (400, 370), (10, 610)):
        set_counters(powercap, value)
        total += more
        assert energy.energy_joules() == pytest.approx(2e-6 * total)


def test_counters_are_read_in_the_background(powercap, monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    energy.start_meter(torch.device("cpu"))
    read = threading.Event()
    for counter in energy._meter._counters:
        counter._read = lambda: read.set() or 900
    assert read.wait(timeout=60)


def test_what_cannot_be_read_is_not_known(powercap):
    for file in powercap.glob("*/energy_uj"):
        file.unlink()
    energy.start_meter(torch.device("cpu"))
    assert energy.energy_joules() is None
    energy.start_meter(None)
    assert energy.energy_joules() is None


def test_a_gpu_is_asked_by_its_own_name(monkeypatch):
    asked, readings = [], iter([1_000, 3_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    (counter,) = energy.gpu_counters(torch.device("cuda"))
    assert counter.joules() == 2.5 and asked == ["GPU-1-2-3"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.gpu_counters(torch.device("cuda")) == []

"""Counters of energy: RAPL as files, NVML as a stand-in."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from recbole_llm.evaluation import energy


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


def test_a_counter_that_starts_anew_is_followed(powercap, monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    energy.start_meter(torch.device("cpu"))
    for value in (950, 30, 400, 10):  # 50 + 80 + 370 + 610, read in the background
        set_counters(powercap, value)
        time.sleep(0.3)
    assert energy.energy_joules() == pytest.approx(2 * 1110e-6)


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

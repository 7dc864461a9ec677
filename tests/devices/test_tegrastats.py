"""Lines of tegrastats as printed by several boards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.devices.tegrastats import parse_tegrastats

THOR = (
    "08-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,1%@972,off] "
    "EMC_FREQ 34%@4266 GR3D_FREQ 87%@[1574,1574,1574] NVENC0 off APE 300 "
    "cpu@58.25C/61.75C tj@66.625C/66.625C soc012@-256C "
    "VDD_GPU 37939mW/8660mW/37939mW VIN 124486mW/36487mW/124486mW"
)
ORIN = (
    "06-12-2024 10:11:12 RAM 5021/62841MB (lfb 12908x4MB) SWAP 0/31420MB (cached 0MB) "
    "CPU [3%@729,0%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305,0] VIC_FREQ 729 APE 174 "
    "cpu@46.5C tboard@35.5C soc2@42.437C gpu@41.5C VDD_GPU_SOC 3198mW/3198mW VDD_CPU_CV 399mW/399mW"
)
NANO = "RAM 1985/7765MB (lfb 107x4MB) CPU [9%@1420,off] EMC_FREQ 2% GR3D_FREQ 12% PMIC@50C"


def test_thor_line() -> None:
    assert parse_tegrastats(THOR) == {
        "time": "08-08-2026 21:00:39",
        "ram_used_bytes": 8353 << 20,
        "ram_total_bytes": 125749 << 20,
        "cpu": [(90.0, 2601), (1.0, 972), None],
        "gpu_utilisation": 87.0,
        "gpu_mhz": [1574, 1574, 1574],
        "emc_utilisation": 34.0,
        "emc_mhz": 4266,
        "temperature_c": {"cpu": 58.25, "tj": 66.625},
        "power_w": {"VDD_GPU": 37.939, "VIN": 124.486},
    }


def test_missing_utilisation_is_unknown_not_zero() -> None:
    values = parse_tegrastats(THOR.replace("87%@[1574,1574,1574]", "@[1574,1574,1574]"))
    assert values["gpu_utilisation"] is None
    assert values["gpu_mhz"] == [1574, 1574, 1574]


def test_zero_is_zero() -> None:
    values = parse_tegrastats(ORIN)
    assert (values["gpu_utilisation"], values["emc_utilisation"]) == (0.0, 0.0)
    assert values["gpu_mhz"] == [305, 0]
    assert values["power_w"] == {"VDD_GPU_SOC": 3.198, "VDD_CPU_CV": 0.399}
    assert set(values["temperature_c"]) == {"cpu", "tboard", "soc2", "gpu"}


def test_older_line_without_clocks_or_time() -> None:
    values = parse_tegrastats(NANO)
    assert (values["time"], values["power_w"], values["gpu_mhz"], values["emc_mhz"]) == (
        None, None, None, None,
    )  # fmt: skip
    assert (values["gpu_utilisation"], values["emc_utilisation"]) == (12.0, 2.0)


@pytest.mark.parametrize("line", ["", "tegrastats: not found", "RAM x/yMB", "GR3D_FREQ", "CPU []"])
def test_a_line_without_values_has_none(line: str) -> None:
    values = parse_tegrastats(line)
    assert values.pop("cpu") in (None, [None])
    assert set(values.values()) == {None}


@given(st.one_of(st.text(max_size=200), st.integers(0, len(THOR)).map(lambda n: THOR[:n])))
@settings(deadline=None, max_examples=200)
def test_no_line_stops_the_parser(line: str) -> None:
    values: dict[str, Any] = parse_tegrastats(line)
    assert values.keys() == parse_tegrastats(THOR).keys()

#!/usr/bin/env python3
"""Profiles one launch of a kernel by Nsight Compute. The report and its text go beside the results,
the key metrics into a row.

    kernel_profile.py RESULTS KERNEL COMMAND...
"""

import csv
import pathlib
import re
import subprocess
import sys

import results

# Figures of a row, and the metrics that they are, the first that a report has.
METRICS = {
    "ns": [r"gpu__time_duration\.sum"],
    "tensor_pipe_percent": [
        r"sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_(active|elapsed)",
        r"sm__pipe_tensor_op_hmma_cycles_active\.avg\.pct_of_peak_sustained_(active|elapsed)",
        r"sm__inst_executed_pipe_tensor\w*\.avg\.pct_of_peak_sustained_(active|elapsed)",
    ],
    "dram_percent": [r"(gpu__dram|dram_)_throughput\.avg\.pct_of_peak_sustained_elapsed"],
    "l2_percent": [r"lts__t(hroughput|_sectors)\.avg\.pct_of_peak_sustained_elapsed"],
    "registers": [r"launch__registers_per_thread"],
    "occupancy_percent": [r"sm__warps_active\.avg\.pct_of_peak_sustained_active"],
}


def figures(text):
    """The key metrics of what `ncu --page raw --csv` prints; None for what it does not have."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:
        return {}
    names, _units, values = rows[:3]

    def value(patterns):
        for pattern in patterns:
            for name, value in zip(names, values):
                if re.fullmatch(pattern, name) and re.fullmatch(r"[\d.,]+", value):
                    return float(value.replace(",", ""))
        return None

    return {figure: value(patterns) for figure, patterns in METRICS.items()}


def main():
    path, kernel, *command = sys.argv[1:]
    base = pathlib.Path(path).parent / f"ncu-{kernel}"
    report = f"{base}.ncu-rep"
    # On a Hopper GPU its own family is in the place of `encode`.
    names = kernel.replace("encode_", "encode_(hopper_)?")
    options = ["--clock-control", "none", "--set", "full", "-k", f"regex:{names}", "-c", "1"]
    subprocess.run(["ncu", *options, "-f", "-o", str(base), *command], check=True)

    def page(*options):
        command = ["ncu", "--import", report, "--page", *options]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    pathlib.Path(f"{base}.txt").write_text(page("details"))
    row = {"kind": "profile", "label": kernel} | figures(page("raw", "--csv", "--print-units", "base"))
    results.append(path, row)
    print(row)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The file of results of the GPU suite: one JSON object with chip, driver, commit, date, and rows.

    results.py FILE begin COMMIT [CHIP]             a new file; an earlier one becomes FILE.old
    results.py FILE step LABEL SECONDS STATUS LOG   a row for a step: its exit status, what it printed
    results.py FILE error KIND LABEL ERROR          a row for what was not run

A row has a `kind`, a `label`, and figures or an `error`. benches/gpu/results.rs is the other writer.
Writers take turns, and each replaces the whole file by a rename: it is valid JSON at every moment.
"""

import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys


def load(path):
    with open(path) as file:
        return json.load(file)


def write(path, results):
    beside = f"{path}.new"
    with open(beside, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    os.replace(beside, path)


def append(path, row):
    results = load(path)
    results["rows"].append(row)
    write(path, results)


def gpu(what):
    """An answer of nvidia-smi for the first GPU, or None."""
    try:
        command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def driver():
    """The version of the driver, or None."""
    try:
        # As `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06 ...`.
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\b\d{3}\.[\d.]+", text)
    return found[0] if found else gpu("driver_version")


def begin(path, commit, chip=None):
    if os.path.exists(path):
        shutil.copy(path, f"{path}.old")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write(path, {
        "chip": chip or gpu("name"),
        "driver": driver(),
        "memory": gpu("memory.total"),
        "commit": commit,
        "date": date,
        "rows": [],
    })


def last_line(log):
    """What a program said last, without the colours."""
    text = pathlib.Path(log).read_text(errors="replace") if os.path.exists(log) else ""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "printed nothing"


def step(path, label, seconds, status, log):
    row = {"kind": "step", "label": label, "seconds": int(seconds)}
    # As `timeout` reports it: its own status, or that of its second signal.
    if status in ("124", "137"):
        row["error"] = f"timed out after {seconds} s"
    elif status != "0":
        row["error"] = f"exit status {status}: {last_line(log)}"
    append(path, row)


def main():
    path, action, *rest = sys.argv[1:]
    if action == "begin":
        begin(path, *rest)
    elif action == "step":
        step(path, *rest)
    elif action == "error":
        kind, label, error = rest
        append(path, {"kind": kind, "label": label, "error": error})
    else:
        sys.exit(f"results.py: no action {action}")


if __name__ == "__main__":
    main()

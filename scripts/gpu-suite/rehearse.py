#!/usr/bin/env python3
"""Proves the GPU suite without a GPU: run.sh, its deadline, its results, and the table made of them.

    scripts/gpu-suite.sh --rehearse && scripts/gpu-suite/rehearse.py

PyTorch and compute-sanitizer are taken for absent, as on the machines of continuous integration:
their steps are errors. A script stands for ncu.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import kernel_profile  # noqa: E402: the module beside this one

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SUITE = ROOT / "target/gpu-suite-rehearsal"
BENCH = [SUITE / "gpu", "--bench", "--device"]

MEASURE = ["tests of the driver", "kernels against the oracle", "matmul rate", "benches", "both phases, checked", "merge over threads",
           "NCCL", "merge over NCCL, 16 keys", "merge over NCCL, 32 keys"]
PEERS = ["FlashAttention-2 and cuDNN", "FlexAttention", "ncu encode_bf16_d128", "ncu query_bf16_d128", "ncu merge_f32_f32",
         "memcheck", "racecheck (hazards within one warp may be false alarms)"]
VARIANTS = ["variants"]
# What has no chance here.
FAILING = {"matmul rate", "benches", "merge over NCCL, 16 keys", "merge over NCCL, 32 keys", "FlashAttention-2 and cuDNN",
           "FlexAttention", "memcheck", "racecheck (hazards within one warp may be false alarms)"}

RAW = """==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","ns","%","%","%","register/thread","%"
"0","a kernel","6,500,000","61.5","12.25","n/a","255","12.4"
"""
PROFILE = {"ns": 6.5e6, "tensor_pipe_percent": 61.5, "dram_percent": 12.25, "l2_percent": None, "registers": 255,
           "occupancy_percent": 12.4}
# Runs what it is told to profile, and prints what a report of it would hold.
NCU = """#!/bin/sh
case "$*" in
    *"--page raw"*) cat "$0.raw" ;;
    *--page*) echo details ;;
    *) while [ "$1" != -o ]; do shift; done
       touch "$2.ncu-rep" && shift 2 && exec "$@" ;;
esac
"""


def load(out):
    return json.loads((out / "results.json").read_text())


def start(what, out, *options):
    command = [SUITE / "run.sh", what, "--rehearse", "--out", out, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)


def watch(running, out, until=lambda rows: False):
    """Reads the results until the process ends or `until` holds: always whole, they only grow."""
    seen = []
    while True:
        ended = running.poll() is not None
        if (out / "results.json").exists():
            rows = load(out)["rows"]
            # A call that begins a new file begins with no rows.
            assert rows[: len(seen)] == seen or not rows, "rows were lost or changed"
            seen = rows
        if ended or until(seen):
            return seen
        time.sleep(0.005)


def steps(rows):
    return [row["label"] for row in rows if row["kind"] == "step"]


def all_three(out):
    """The whole suite: steps in order, rows with figures or errors, and rows after errors."""
    fakes = out / "fakes"
    fakes.mkdir()
    (fakes / "ncu").write_text(NCU)
    (fakes / "ncu").chmod(0o755)
    (fakes / "ncu.raw").write_text(RAW)
    os.environ["PATH"] = f"{fakes}:{os.environ['PATH']}"
    for what in ["measure", "peers", "variants"]:
        running = start(what, out)
        watch(running, out)
        assert running.returncode == (what != "variants"), f"{what}: exit status {running.returncode}"
    results = load(out)
    assert all(results[key] for key in ["chip", "commit", "date"]), results
    rows = results["rows"]
    assert steps(rows) == MEASURE + PEERS + VARIANTS, steps(rows)
    for row in rows:
        assert ("error" in row) != bool(row.keys() & {"seconds", "ms", "ns", "keep"}) or row["kind"] == "step", row
        if row["kind"] == "step":
            assert ("error" in row) == (row["label"] in FAILING), row
    kinds = [row["kind"] for row in rows]
    for kind in ["rate", "attention", "merge", "append"]:
        assert steps(rows[: kinds.index(kind)]) == MEASURE[:3], f"{kind} is not of the benches"
    bench = [row for row in rows if row["kind"] in ("rate", "attention", "merge", "append")]
    listed = subprocess.run([*BENCH, "simt", "--list"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert [row["label"] for row in bench] == [json.loads(line)["label"] for line in listed.splitlines()]
    failed = [row["label"] for row in bench if "error" in row]
    assert len(failed) == 1 and "d 84" in failed[0], failed
    assert bench[1]["label"] == failed[0], "measured rows follow the failed one"
    assert kinds.count("variant") >= kinds.count("decision") > 5
    profiles = [row for row in rows if row["kind"] == "profile"]
    assert [row["label"] for row in profiles] == ["encode_bf16_d128", "query_bf16_d128", "merge_f32_f32"]
    assert all(row.items() >= PROFILE.items() for row in profiles), profiles
    assert (out / "ncu-merge_f32_f32.txt").read_text() == "details\n"
    return results


def labels():
    """The rows that run.sh profiles and compares exist, here and on a GPU, each once."""
    lists = [subprocess.run([*BENCH, device, "--list"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
             for device in ["simt", "cuda"]]
    counts = {}
    for name, text in re.findall(r'\b(encode|query|flex|merge)="([^"]+)"', (SUITE / "run.sh").read_text()):
        matches = [sum(text in json.loads(line)["label"] for line in lines) for lines in lists]
        assert max(matches) == 1, f"{text}: {matches} rows"
        counts[name] = [a + b for a, b in zip(counts.get(name, [0, 0]), matches)]
    assert len(counts) == 4 and all(min(count) > 0 for count in counts.values()), counts


def deadline(out):
    """A call ends by its deadline; what it did not come to are errors."""
    begun = time.monotonic()
    running = start("measure", out, "--seconds", "7")
    rows = watch(running, out)
    assert time.monotonic() - begun < 8, "later than the deadline"
    assert running.returncode == 1 and steps(rows) == MEASURE, steps(rows)
    assert rows[-1]["error"] == "not run: deadline", rows[-1]
    # The bench, which has a deadline of its own, tells the chip where nvidia-smi could not.
    none = out / "none.json"
    none.write_text('{"chip": null, "rows": []}')
    subprocess.run([*BENCH, "simt", "--seconds", "0", "--json", none], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = json.loads(none.read_text())
    rows = results["rows"]
    assert results["chip"] == "the SIMT emulator" and len(rows) > 40, results
    assert all(row["error"] == "not run: deadline" for row in rows), rows


def processes(session):
    """The processes of a session that have not ended."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            yield int(stat.parent.name)


def killed(out):
    """Killed half-way through the benches, a call leaves the rows so far."""
    running = start("measure", out)
    rows = watch(running, out, until=lambda rows: sum(row["kind"] == "attention" for row in rows) >= 10)
    assert running.poll() is None, "ended before it could be killed"
    # `timeout` gives a step a process group of its own.
    while pids := list(processes(running.pid)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    running.wait()
    left = load(out)["rows"]
    assert left[: len(rows)] == rows and "benches" not in steps(left), left


def fault(out):
    """A kernel that faults takes the rest of its process with it: each kind of test and row is asked for again. The suite may
    lie in a folder with spaces, and results that are begun anew leave the earlier ones beside them."""
    suite = out / "a suite"
    shutil.copytree(SUITE, suite, copy_function=os.link)
    for name in ["kernels", "gpu"]:
        (suite / name).unlink()
        (suite / name).write_text("#!/bin/sh\necho 'CUDA driver: wait: DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)'\nexit 1\n")
        (suite / name).chmod(0o755)
    command = [suite / "run.sh", "measure", "--rehearse", "--seconds", "30"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/")
    path = suite / "results/results.json"
    rows = load(path.parent)["rows"]
    for label in ["kernels against the oracle", "benches"]:
        again = [step for step in steps(rows) if step.startswith(f"{label}: ")]
        assert len(again) > 5 and steps(rows).index(again[0]) == steps(rows).index(label) + 1, steps(rows)
    subprocess.run([sys.executable, suite / "results.py", path, "begin", "a commit"], check=True)
    assert not load(path.parent)["rows"] and json.loads(pathlib.Path(f"{path}.old").read_text())["rows"] == rows


def unwritable():
    """Without a folder for results nothing is run."""
    running = start("measure", "/proc")
    assert running.wait() == 2


def table(results, folder):
    """The table has what the newest results have, and nothing typed by hand survives."""
    docs = folder / "gpu.md"
    docs.write_text((ROOT / "docs/gpu.md").read_text())

    def run(*options):
        command = [ROOT / "scripts/gpu-table.py", "--results", folder, "--docs", docs, *options]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

    assert run() == 0 and run("--check") == 0 and "Nothing is measured yet" in docs.read_text()
    (folder / "old.json").write_text(json.dumps(results | {"date": "2000-01-01", "chip": "an old chip"}))
    call = next(row for row in results["rows"] if row["kind"] == "attention" and "ms" in row)
    twice = {key: 2 * value for key, value in call["ms"].items()}
    peer = {"kind": "peer", "label": call["label"], "peer": "cuDNN", "ms": twice, "expanded": True}
    (folder / "new.json").write_text(json.dumps(results | {"rows": [*results["rows"], peer]}))
    assert run("--check") == 1 and run() == 0 and run("--check") == 0
    text = docs.read_text()
    assert "Nothing is measured yet" not in text and "an old chip" not in text and "`benches/results/new.json`" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| {call['label']} |"))
    assert line.endswith(" - | 2.00* | - |") and f" {call['ms']['median']:,.4f} " in line, line
    assert "| encode_bf16_d128 | 6.500 | 62 | 12 | - | 255 | 12 |" in text
    ragged = next(row for row in results["rows"] if row.get("parts"))
    assert text.count(f"| {ragged['label']} |") == 2 and "**default**" in text and "not available" in text
    docs.write_text(text.replace("2.00*", "3.00*"))
    assert run("--check") == 1


def main():
    assert kernel_profile.figures(RAW) == PROFILE, kernel_profile.figures(RAW)
    assert kernel_profile.figures("==ERROR== no kernels") == {}
    labels()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        parts = [folder / name for name in ["all", "deadline", "killed", "fault", "table"]]
        for part in parts:
            part.mkdir()
        results = all_three(parts[0])
        deadline(parts[1])
        killed(parts[2])
        fault(parts[3])
        unwritable()
        table(results, parts[4])
    print("the GPU suite's rehearsal: good")


if __name__ == "__main__":
    main()

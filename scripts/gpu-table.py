#!/usr/bin/env python3
"""Writes the newest results of benches/results/ as tables into docs/gpu.md, between two markers.

With --check it writes nothing and fails if docs/gpu.md is not what it would write.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN = "<!-- measured: written by scripts/gpu-table.py -->"
END = "<!-- measured: end -->"
NOTHING = (
    "Nothing is measured yet. `scripts/gpu-suite.sh` makes the package; on a machine with a GPU\n"
    "`gpu-suite/run.sh measure`, `gpu-suite/run.sh peers` and `gpu-suite/run.sh variants` measure it."
)
PEERS = ["FlashAttention-2", "cuDNN", "FlexAttention"]


def number(value, decimals=0, factor=1):
    return "-" if value is None else f"{value * factor:,.{decimals}f}"


def table(heading, rows):
    """A table whose first column is text and whose others are numbers; nothing without rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["", *lines]


def median(row):
    return row["ms"]["median"]


def spread(row):
    return 50 * (row["ms"]["most"] - row["ms"]["least"]) / median(row)


class Results:
    """The rows of one file; of several runs of a row, the last."""

    def __init__(self, results):
        self.head = results
        self.rows = {}
        for row in results["rows"]:
            self.rows[row["kind"], row["label"], row.get("peer") or row.get("variant")] = row

    def of(self, *kinds):
        return [row for (kind, _, _), row in self.rows.items() if kind in kinds]

    def measured(self, label):
        """The row of the bench with this label, if it has figures."""
        rows = [row for row in self.of("attention", "merge", "append") if row["label"] == label and "ms" in row]
        return rows[0] if rows else None

    def calls(self):
        for row in self.of("rate", "attention", "merge", "append"):
            if "error" in row:
                yield [row["label"], "failed", *["-"] * 5, *["-"] * len(PEERS)]
                continue
            figures = [number(median(row), 4), number(spread(row), 1), number(row.get("tflops"), 1),
                       number(row.get("gb_per_s")), number(row.get("of_matmul"), 0, 100), number(row.get("of_copy"), 0, 100)]
            yield [row["label"], *figures, *(self.peer(row, name) for name in PEERS)]

    def peer(self, row, name):
        peer = self.rows.get(("peer", row["label"], name))
        if peer is None:
            return "-"
        if "error" in peer:
            return "failed"
        return number(median(peer) / median(row), 2) + ("*" if peer.get("expanded") else "")

    def shares(self):
        for row in self.of("attention"):
            other = self.measured(row.get("against"))
            if other and "ms" in row:
                time, flops = median(row) / median(other), row["flops"] / other["flops"]
                yield [row["label"], other["label"], number(time, 3), number(flops, 3), number(time / flops, 3)]

    def sums(self):
        for row in self.of("attention"):
            parts = [self.measured(label) for label in row.get("parts", [])]
            if parts and all(parts) and "ms" in row:
                alone = sum(map(median, parts))
                yield [row["label"], number(median(row), 4), number(alone, 4), number(median(row) / alone, 2)]

    def profiles(self):
        for row in self.of("profile"):
            yield [row["label"], number(row.get("ns"), 3, 1e-6), *(number(row.get(key), 0) for key in (
                "tensor_pipe_percent", "dram_percent", "l2_percent", "registers", "occupancy_percent"))]

    def variants(self):
        for row in self.of("variant"):
            if "error" in row:
                yield [row["label"], row["variant"], "failed", "-", "-"]
                continue
            ratio = row["ratio"]
            keep = self.rows.get(("decision", row["label"], None), {}).get("keep") == row["variant"]
            name = f"**{row['variant']}**" if keep else row["variant"]
            yield [row["label"], name, number(median(row), 4), number(ratio["median"], 3),
                   f"{ratio['least']:.3f}-{ratio['most']:.3f}"]

    def failures(self):
        for row in self.head["rows"]:
            if "error" in row:
                name = row.get("peer") or row.get("variant") or row["kind"]
                yield f"- {row['label']} ({name}): {row['error']}"

    def text(self, name):
        head = self.head
        seconds = {row["label"]: row["seconds"] for row in self.of("step") if "error" not in row}
        lines = [f"{head['chip']}, driver {head['driver']}, star-attention at {head['commit']}, {head['date']}: `benches/results/{name}`."]
        if seconds:
            lines += ["", "Passed: " + ", ".join(f"{label} ({seconds} s)" for label, seconds in seconds.items()) + "."]
        lines += table(["call", "ms", "± %", "TFLOP/s", "GB/s", "% of matmul", "% of copy", *PEERS], list(self.calls()))
        if any("peer" in row for row in head["rows"]):
            lines += ["", "Of PyTorch: its time over ours. * keys and values expanded to all query heads."]
        lines += table(["sparse call", "beside", "time", "FLOPs", "time over FLOPs"], list(self.shares()))
        lines += table(["call", "ms", "its parts alone, or the same without promised bits, ms", "ratio"], list(self.sums()))
        lines += table(["kernel, by ncu", "ms", "tensor pipe %", "DRAM %", "L2 %", "registers", "occupancy %"], list(self.profiles()))
        lines += table(["call", "variant (**keep**)", "ms", "ratio", "range"], list(self.variants()))
        failures = list(self.failures())
        return "\n".join(lines + (["", "Failed or not run:", "", *failures] if failures else []))


def newest(folder):
    """The results of the latest date and their file's name, or None."""
    files = [(json.loads(path.read_text()), path.name) for path in sorted(folder.glob("*.json"))]
    return max(files, key=lambda file: file[0]["date"]) if files else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benches/results", help="folder of results")
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs/gpu.md", help="file with the markers")
    arguments = parser.parse_args()
    found = newest(arguments.results)
    text = Results(found[0]).text(found[1]) if found else NOTHING
    old = arguments.docs.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"gpu-table.py: {arguments.docs} lacks a marker: {BEGIN} and {END}")
    new = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
    if new == old:
        return
    if arguments.check:
        sys.exit(f"gpu-table.py: {arguments.docs} is not what {arguments.results} gives: run scripts/gpu-table.py")
    arguments.docs.write_text(new)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Counts the instructions of the products' inner loops on AArch64, and fails if one calls a function or keeps a vector on the stack.

Needs no ARM machine: the target aarch64-unknown-linux-gnu of rustup, and objdump and addr2line of Debian's binutils-aarch64-linux-gnu. With llvm-mca
(Debian's llvm-19, or MCA=program) it estimates the cycles of each loop on two CPUs, all data being in L1.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = "aarch64-unknown-linux-gnu"
# The function that all kernels are inlined into.
ENTRY = re.compile(r"neon.*Simd.*run.*5enter")
# CPUs of the estimate, and the multiply-adds of four f32 that they can start in a cycle.
CPUS = {"neoverse-n1": 2, "neoverse-v1": 4}

CLASSES = [
    ("calls", r"bl|blr"),
    ("stack", r"\w+ .*\[sp"),
    ("multiply-adds", r"fmla"),
    ("loads", r"ld"),
    ("conversions", r"zip1|fcvtl|sshll|bic v"),
]
# Functions whose loops are products, with the names of their tables' rows.
LOOPS = {
    "scores_by": "many rows, scores",
    "accumulate_by": "many rows, outputs",
    "block_scores": "few rows, scores",
    "accumulate_columns": "few rows, outputs",
}
TYPES = {"half::bfloat::bf16": "bf16", "half::binary16::f16": "f16", "star_attention::element::float8::F8E4M3": "fp8"}


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def library():
    """The library's objects in one archive, from a release build."""
    output = run("cargo", "build", "--release", "--lib", "--target", TARGET, "--message-format=json", cwd=ROOT)
    for line in output.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["target"]["name"] == "star_attention":
            return next(name for name in message["filenames"] if name.endswith(".rlib"))
    sys.exit("neon-report.py: cargo built no library")


def entry(folder):
    """The object file and the symbol of the kernels' function."""
    for path in sorted(folder.glob("*.o")):
        for line in run("aarch64-linux-gnu-nm", "--defined-only", path).splitlines():
            symbol = line.split()[-1]
            if ENTRY.search(symbol):
                return path, symbol
    sys.exit("neon-report.py: no function has the kernels of NEON")


def instructions(path, symbol):
    """(address, instruction) of each line of a function."""
    text = run("aarch64-linux-gnu-objdump", "--disassemble=" + symbol, "--no-show-raw-insn", path)
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", text, re.MULTILINE)
    return [(int(address, 16), re.sub(r"\s*(<.*|//.*)", "", code).replace("\t", " ")) for address, code in lines]


def inner_loops(code):
    """The instructions of each loop that has no other inside."""
    places = {address: index for index, (address, _) in enumerate(code)}
    # The last branch to each start.
    loops = {}
    for index, (_, instruction) in enumerate(code):
        if match := re.match(r"(?:b|b\.\w+|cbn?z .*|tbn?z .*) ([0-9a-f]+)$", instruction):
            start = places.get(int(match[1], 16), index + 1)
            if start <= index:
                loops[start] = index + 1
    for start, end in loops.items():
        if not any(start < s and e <= end for s, e in loops.items()):
            yield code[start:end]


def callers(path, symbol, addresses):
    """The functions that are inlined at each address, innermost first."""
    text = run(
        "aarch64-linux-gnu-addr2line", "-aifC", "-e", path, "-j", ".text." + symbol, input="\n".join(map(hex, addresses))
    )
    frames = collections.defaultdict(list)
    for line in text.splitlines():
        if line.startswith("0x"):
            address = int(line, 16)
        elif not line.startswith("/"):
            frames[address].append(line)
    return frames


def name_of(frames):
    """What a loop is: the product, the type of keys and values, and the register block."""
    for frame in frames:
        function, _, generics = frame.partition("<")
        if function in LOOPS:
            generics = generics.rstrip(">").split(", ")
            # Columns that end before a block does are copied.
            if "false" in generics:
                return None
            types = [TYPES.get(x, x) for x in generics if x in TYPES or x == "f32"]
            sizes = " x ".join(x for x in generics if x.isdigit())
            return LOOPS[function], "".join(types) or "all", sizes
    return None


def cycles(mca, cpu, body):
    """llvm-mca's estimate for one turn of a loop, from a hundred of them."""
    lines = ["top:"]
    for _, instruction in body:
        lines.append(re.sub(r"^(b|b\.\w+|cbn?z .*,|tbn?z .*,) [0-9a-f]+$", r"\1 top", instruction))
    text = run(mca, "-mtriple=aarch64", "-mcpu=" + cpu, "-iterations=100", input="\n".join(lines))
    return int(re.search(r"Total Cycles: +(\d+)", text)[1]) / 100


def main():
    mca = os.environ.get("MCA") or shutil.which("llvm-mca-19") or shutil.which("llvm-mca")
    with tempfile.TemporaryDirectory() as folder:
        archive = sys.argv[1] if len(sys.argv) > 1 else library()
        run("aarch64-linux-gnu-ar", "x", os.path.abspath(archive), cwd=folder)
        path, symbol = entry(pathlib.Path(folder))
        code = instructions(path, symbol)
        loops = [body for body in inner_loops(code) if any(x.startswith("fmla") for _, x in body)]
        first = [next(address for address, x in body if x.startswith("fmla")) for body in loops]
        frames = callers(path, symbol, first)

    # The longest loop of each product: others of the same name are for what is left over.
    products = {}
    for body, address in zip(loops, first):
        if name := name_of(frames[address]):
            products[name] = max(products.get(name, []), body, key=lambda x: sum("fmla" in i for _, i in x))

    names = [name for name, _ in CLASSES] + ["others"]
    print("| product | type | rows x vectors | " + " | ".join(names) + "".join(f" | {cpu}" for cpu in CPUS if mca) + " |")
    print("|---|---|---:|" + "---:|" * (len(names) + (len(CPUS) if mca else 0)))
    failed = []
    for name, body in sorted(products.items()):
        count = collections.Counter(
            next((kind for kind, pattern in CLASSES if re.match(pattern, x)), "others") for _, x in body
        )
        row = [*name, *(str(count[kind]) for kind in names)]
        for cpu, most in CPUS.items() if mca else ():
            rate = count["multiply-adds"] / cycles(mca, cpu, body)
            row.append(f"{rate:.2f} of {most}")
        print("| " + " | ".join(row) + " |")
        if count["calls"] or any(re.match(r"\w+ [qds]\d+, .*\[sp", x) for _, x in body):
            failed.append(" ".join(name))
    if not products:
        sys.exit("neon-report.py: no loop of a product was found")
    if mca:
        print("\nThe last columns are multiply-adds of four f32 per cycle, as llvm-mca estimates them, of what the CPU can start.")
    if failed:
        sys.exit("neon-report.py: calls or spilled vectors in " + ", ".join(failed))


main()

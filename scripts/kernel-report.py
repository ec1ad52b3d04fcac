#!/usr/bin/env python3
"""Prints what the compiler made of each kernel, and fails if one spills registers, or if products of warp groups wait for themselves.

For each attention kernel also, counted and not measured: blocks that fit a multiprocessor, FLOPs and bytes of one step of the main loop, and
with --mix the instructions of a step that has neither mask nor softcap, from the disassembly (needs `scripts/install-nvcc.sh --tools`).
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Registers, threads and shared memory of a multiprocessor, and what each block's shared memory costs beyond its own.
LIMITS = {"sm_80": (65536, 2048, 164 * 1024), "sm_90": (65536, 2048, 228 * 1024), "sm_90a": (65536, 2048, 228 * 1024)}
BLOCK_SHARED = 1024

MUST_NOT_SPILL = ("encode", "encode_64", "query", "encode_e4m3", "query_e4m3", "encode_hopper", "merge")

CLASSES = [
    ("products", r"HMMA|HGMMA"),
    ("matrix loads", r"LDSM"),
    ("copies", r"LDGSTS|LDGDEPBAR|DEPBAR"),
    ("exp and rcp", r"MUFU"),
    ("f32", r"FFMA|FMUL|FADD|FMNMX|FSEL|FSETP|F2FP"),
    ("shuffles and votes", r"SHFL|VOTE"),
    ("barriers", r"BAR|WARPSYNC|BSSY|BSYNC|SYNC|WARPGROUP"),
]


def built(features):
    """The folder that the build script of a release build fills; the crate itself is not built."""
    command = ["cargo", "check", "--release", "--features", features, "--message-format=json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in output.splitlines():
        message = json.loads(line)
        name = message.get("package_id", "")
        if message.get("reason") == "build-script-executed" and re.search(r"star-attention(#|@|$)|#star-attention@", name):
            return pathlib.Path(message["out_dir"])
    sys.exit("kernel-report.py: cargo ran no build script of star-attention")


def usage(folder):
    """Yields (module's definitions, kernel, arch, figures) for each compiled kernel."""
    for path in sorted(folder.glob("*.usage")):
        first, *lines = path.read_text().splitlines()
        defines = dict(pair.split("=") for pair in first.split())
        # wgmma that was serialised, fenced by the compiler, or has not the registers that were asked for.
        if warnings := [line for line in lines if re.search(r"\bC75\d\d\b", line)]:
            sys.exit(f"kernel-report.py: {path.stem}: {warnings[0]}")
        kernel = None
        for line in lines:
            if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                kernel, arch = match.groups()
                figures = {}
            elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                figures["stack"], figures["stores"], figures["loads"] = map(int, match.groups())
            elif kernel and (match := re.search(r"Used (\d+) registers", line)):
                figures["registers"] = int(match.group(1))
                yield defines, kernel, arch, figures
                kernel = None


def resident(arch, registers, threads, shared):
    """Blocks that fit a multiprocessor."""
    all_registers, all_threads, all_shared = LIMITS.get(arch, LIMITS["sm_80"])
    warp_registers = (registers * 32 + 255) // 256 * 256
    blocks = min(all_threads // threads, all_registers // (warp_registers * (threads // 32)))
    return min(blocks, all_shared // (shared + BLOCK_SHARED)) if shared else blocks


def main_loop(sass):
    """Of each function the usual way through its main loop: of the innermost loops with products, the one with the most."""
    loops = {}
    for text in re.split(r"Function : ", sass)[1:]:
        name = text.split()[0]
        code = [(int(a, 16), predicate, op, rest) for a, predicate, op, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", text)]
        bodies = []
        for address, _, op, rest in code:
            target = re.search(r"0x([0-9a-f]+)", rest)
            if op.startswith("BRA") and target and int(target.group(1), 16) < address:
                body = [line for line in code if int(target.group(1), 16) <= line[0] <= address]
                if products(body):
                    bodies.append(body)
        # A loop around one that was found is longer: sorted by length, it comes later and is left out.
        inner = []
        for body in sorted(bodies, key=len):
            if not any(body[0][0] <= found[0][0] and found[-1][0] <= body[-1][0] for found in inner):
                inner.append(body)
        if inner:
            loops[name] = usual_path(max(inner, key=products))
    return loops


def products(body):
    return sum(line[2].startswith(("HMMA", "HGMMA")) for line in body)


def usual_path(body):
    """The way of a step without mask or softcap whose tiles are copied whole: all products, as many copies as can be, and few instructions."""
    places = {line[0]: i for i, line in enumerate(body)}
    worth, follow = [0] * (len(body) + 1), [len(body)] * len(body)
    for i in reversed(range(len(body))):
        _, predicate, op, rest = body[i]
        ways = [i + 1]
        if op.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)):
            # Backwards is a loop inside, or the end of this one.
            ahead = places.get(int(target.group(1), 16), 0)
            ways = ([ahead] if ahead > i else []) + ([i + 1] if predicate or ahead <= i else [])
        follow[i] = max(ways, key=lambda way: worth[way])
        gain = 10**6 if op.startswith(("HMMA", "HGMMA")) else 10**3 if op.startswith("LDGSTS") else 0
        worth[i] = worth[follow[i]] + gain - 1
    path, i = [], 0
    while i < len(body):
        path.append(body[i][2])
        i = follow[i]
    return path


def disassembly(folder, module, arch):
    tool = ROOT / ".nvcc/bin/cuobjdump"
    command = [tool, "-sass", "-arch", arch, folder / f"{module}.fatbin"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def role_registers(sass):
    """Of each function the registers that its roles use: those that give some away, and those that get more."""
    for text in re.split(r"Function : ", sass)[1:]:
        roles = re.split(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)", text)[1:]
        most = {role: 1 + max(map(int, re.findall(r"\bR(\d+)\b", code))) for role, code in zip(roles[::2], roles[1::2])}
        yield text.split()[0], most


def mix(sass):
    for kernel, body in main_loop(sass).items():
        counts = collections.Counter()
        for op in body:
            counts[next((name for name, pattern in CLASSES if re.match(pattern, op)), "integer and other")] += 1
        yield kernel, len(body), counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", action="store_true", help="instructions of the main loops, from the disassembly")
    parser.add_argument("--variants", action="store_true", help="the variants too, which may spill")
    arguments = parser.parse_args()
    folder = built("cuda,variants" if arguments.variants else "cuda")
    spilled = []
    print(f"{'kernel':34} {'arch':6} {'registers':>9} {'spills':>7} {'threads':>7} {'shared':>7} {'blocks':>7}"
          f" {'kFLOP':>7} {'KB read':>8}")
    modules = {}
    for defines, kernel, arch, figures in usage(folder):
        threads, shared = int(defines["THREADS"]), int(defines.get("SHARED_BYTES", 0))
        spills = figures["stores"] + figures["loads"]
        row = (f"{kernel:34} {arch:6} {figures['registers']:9} {spills:7} {threads:7} {shared:7}"
               f" {resident(arch, figures['registers'], threads, shared):7}")
        if "HEAD_DIM" in defines:
            number = {name: int(value) for name, value in defines.items() if value.isdigit()}
            rows = 64 * number["GROUPS"] if "GROUPS" in number else 16 * number["ROW_TILES"] * number["ROW_WARPS"]
            keys = number["KEYS"] * number.get("KEY_WARPS", 1)
            dims = number["HEAD_DIM"] + number["VALUE_DIM"]
            row += f" {2 * rows * keys * dims / 1e3:7.0f} {number.get('STORED_BYTES', 2) * keys * dims / 1024:8.0f}"
            modules[f"{defines['KERNEL_NAME']}_{defines['DIMS']}"] = ("sm_90a",) if "GROUPS" in number else ("sm_80", "sm_90")
        print(row)
        if (spills or figures["stack"]) and defines.get("KERNEL_NAME", "merge") in MUST_NOT_SPILL:
            spilled.append(f"{kernel} ({arch})")
    if arguments.mix:
        names = [name for name, _ in CLASSES] + ["integer and other"]
        print(f"\n{'main loop of':34} {'arch':6} {'all':>6} " + " ".join(f"{name:>18}" for name in names))
        for module, archs in modules.items():
            for arch in archs:
                sass = disassembly(folder, module, arch)
                for kernel, total, counts in mix(sass):
                    print(f"{kernel:34} {arch:6} {total:6} " + " ".join(f"{counts[name]:18}" for name in names))
                if arch == "sm_90a":
                    for kernel, most in role_registers(sass):
                        print(f"{kernel:34} registers that copy and multiply: {most['DEALLOC']}, {most['TRY_ALLOC']}")
    if spilled:
        sys.exit("registers spilled or on the stack: " + ", ".join(spilled))


main()

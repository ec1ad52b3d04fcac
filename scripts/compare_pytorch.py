"""The rounds and the table of compare-pytorch.sh.

Both sides get the same contiguous [heads, seq, dim] tensors, the same cores, and the same number of threads; each is warmed up, and then
they take turns. PyTorch runs in inference mode; under grouped queries it takes the fastest of enable_gqa, of keys and
values that were expanded before the clock started, and, without a mask, of the heads of a group as rows of one head. Its
time includes the output's allocation, the crate's its plan. ATEN_CPU_CAPABILITY in the environment limits its instructions.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--pairs", type=int, default=7, help="turns of each side, at most")
parser.add_argument("--quick", action="store_true", help="the shortest contexts alone")
parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
args = parser.parse_args()

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402  (threads are set before)
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(args.threads)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def cases():
    lengths = [2048] if args.quick else [2048, 4096, 8192]
    for dtype in DTYPES:
        for mask in ["causal", "full"]:
            for dim in [128, 64]:
                for heads, kv_heads in [(8, 8), (32, 8)]:
                    for length in lengths:
                        yield dtype, mask, dim, heads, kv_heads, length, length
        for rows in [1, 4, 16, 64]:
            yield dtype, "full", 128, 32, 8, rows, 32768


def seconds_of(call):
    time.sleep(0.01)  # the other side's threads go to sleep
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu():
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


server = subprocess.Popen(
    ["target/release/examples/timed_attention"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)


def ask(line):
    server.stdin.write(line + "\n")
    server.stdin.flush()
    answer = server.stdout.readline().strip()
    if not answer:
        sys.exit("the crate's side ended early")
    return answer


@torch.inference_mode()
def compare(folder, dtype, mask, dim, heads, kv_heads, query_len, key_len):
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (heads, query_len, dim), "key": (kv_heads, key_len, dim), "value": (kv_heads, key_len, dim)}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        tensors[name] = tensor.unsqueeze(0)
        tensor.view(torch.uint8).numpy().tofile(os.path.join(folder, name))
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    causal = mask == "causal"

    def grouped():
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=heads != kv_heads)

    rivals = {"": grouped}
    if heads != kv_heads:
        wide_key, wide_value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))

        def expanded():
            return F.scaled_dot_product_attention(query, wide_key, wide_value, is_causal=causal)

        rivals[" (expanded KV)"] = expanded
    if heads != kv_heads and not causal:
        # Query heads follow each other group by group, so this is the same memory.
        folded_query = query.view(1, kv_heads, heads // kv_heads * query_len, dim)

        def folded():
            return F.scaled_dot_product_attention(folded_query, key, value)

        rivals[" (heads as rows)"] = folded
    note = min(rivals, key=lambda name: min(seconds_of(rivals[name]) for _ in range(2))) if len(rivals) > 1 else ""
    rival = rivals[note]

    request = dict(folder=folder, dtype=dtype, mask=mask, query_heads=heads, kv_heads=kv_heads)
    request |= dict(query_len=query_len, key_len=key_len, head_dim=dim)
    flops = int(ask(json.dumps(request)).split()[1])
    ask("run")
    expected = rival().float().flatten()
    ask("save")
    out = torch.from_file(os.path.join(folder, "out"), size=expected.numel(), dtype=torch.float32)
    difference = (out - expected).abs().max().item()

    theirs, ours, budget = [], [], time.perf_counter() + 20
    while len(ours) < 3 or (len(ours) < args.pairs and time.perf_counter() < budget):
        theirs.append(seconds_of(rival))
        time.sleep(0.01)
        ours.append(float(ask("run")))
    ratios = [a / b for a, b in zip(theirs, ours)]
    bytes_read = 2 * kv_heads * key_len * dim * query.element_size()
    work, unit = (bytes_read, "GB/s") if query_len == 1 else (flops, "GFLOP/s")
    rate = lambda times: work / statistics.median(times) / 1e9
    return rate(theirs), rate(ours), unit, ratios, difference, note


def print_peaks():
    peaks = json.loads(ask("peaks"))
    names = {"f32": "f32 multiply-adds", "bf16": "bf16 pairs", "amx": "bf16 tiles (AMX)"}
    names |= {"read": "read", "copy": "copy, bytes read and written added up"}
    print("| peak of this machine | rate |\n|---|---:|")
    for key, name in names.items():
        if peaks[key] is not None:
            unit = "GB/s" if key in ("read", "copy") else "GFLOP/s"
            print(f"| {name} | {peaks[key] / 1e9:.1f} {unit} |")
    print()


commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
capability = torch.backends.cpu.get_cpu_capability()
print(
    f"{cpu()}, {args.threads} threads; PyTorch {torch.__version__} with {capability}; "
    f"star-attention at {commit or 'an unknown commit'}\n"
)
print_peaks()
print("| case | PyTorch | star-attention | unit | ratio (median) | range | max. difference |")
print("|---|---:|---:|---|---:|---:|---:|")
with tempfile.TemporaryDirectory() as folder:
    for case in cases():
        dtype, mask, dim, heads, kv_heads, query_len, key_len = case
        name = f"{dtype} {mask} d{dim} {heads}/{kv_heads} heads, " + (
            f"{key_len // 1024}K tokens"
            if query_len == key_len
            else f"{query_len} {'query' if query_len == 1 else 'queries'}, {key_len // 1024}K keys"
        )
        if args.only not in name:
            continue
        print(name, file=sys.stderr)
        theirs, ours, unit, ratios, difference, note = compare(folder, *case)
        print(
            f"| {name} | {theirs:.1f}{note} | {ours:.1f} | {unit} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f}-{max(ratios):.2f} | {difference:.0e} |",
            flush=True,
        )
server.stdin.close()

"""PyTorch's attention on the shapes of a results.json, timed in the same way; its figures are added to the file and printed beside.

FlashAttention-2 and cuDNN under scaled_dot_product_attention, and FlexAttention compiled, which alone has the star mask. What a version of PyTorch
cannot run is left out and named at the end. Grouped queries are asked for as such, and expanded where they are refused.
"""

import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# As benches/gpu/measure.rs.
ROTATED_BYTES = 256 << 20
ROUND_MS = 20.0
ROUNDS = 9


def measure(launch):
    number = 0

    def round_of(launches):
        nonlocal number
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            launch(number)
            number += 1
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    warm = 0.0
    for _ in range(50):
        warm += round_of(1)
        if warm > 5 * ROUND_MS:
            break
    launches = min(max(int(ROUND_MS / (round_of(4) / 4)), 1), 2000)
    return statistics.median(round_of(launches) / launches for _ in range(ROUNDS))


def star_mask(row):
    """The blocks of host 0: the first one's length is the others'."""
    from torch.nn.attention.flex_attention import create_block_mask

    anchor, block, offset = row["anchor_len"], row["block_len"], row["key_len"] - row["query_len"]

    def sees(batch, head, query, key):
        query = query + offset
        own = (query // block == key // block) & (key <= query)
        return own | ((key < anchor) & (query >= block)) if block else key <= query

    return create_block_mask(sees, None, None, row["query_len"], row["key_len"], device="cuda", _compile=True)


def rivals(row):
    star = row["block_len"] > 0
    if not star:
        yield "FlashAttention-2", SDPBackend.FLASH_ATTENTION
        yield "cuDNN", SDPBackend.CUDNN_ATTENTION
    # Compiled for each shape: a few are enough.
    if star or (row["causal"] and row["key_len"] <= 32768 and row["head_dim"] == 128):
        yield "FlexAttention", None


@torch.inference_mode()
def time_of(row, backend):
    batch, heads, kv_heads, dim = row["batch"], row["query_heads"], row["kv_heads"], row["head_dim"]
    # [batch, seq, heads, dim] in memory, as the crate's.
    new = lambda seq, heads: torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    query = new(row["query_len"], heads)
    bytes_of_keys = 2 * 2 * batch * kv_heads * row["key_len"] * dim
    sets = min(max(ROTATED_BYTES // bytes_of_keys, 1), 64) + 1
    kv = [(new(row["key_len"], kv_heads), new(row["key_len"], kv_heads)) for _ in range(sets)]
    if backend is None:
        from torch.nn.attention.flex_attention import flex_attention

        mask = star_mask(row)
        flex = torch.compile(flex_attention, dynamic=False)
        return measure(lambda i: flex(query, *kv[i % sets], block_mask=mask, enable_gqa=True)), ""
    attend = lambda i, **gqa: F.scaled_dot_product_attention(query, *kv[i % sets], is_causal=row["causal"], **gqa)
    with sdpa_kernel(backend):
        try:
            attend(0, enable_gqa=True)
        except RuntimeError:
            kv = [tuple(x.repeat_interleave(heads // kv_heads, 1) for x in pair) for pair in kv[:2]]
            sets = len(kv)
            return measure(attend), "*"
        return measure(lambda i: attend(i, enable_gqa=True)), ""


path = sys.argv[1]
with open(path) as file:
    results = json.load(file)
results["torch"] = torch.__version__
names = ["FlashAttention-2", "cuDNN", "FlexAttention"]
refused = []
print(f"{results['device']}, PyTorch {torch.__version__}, star-attention at {results['commit']}; ms, and how many times ours it is\n")
print(f"{'':44} {'ours':>9} " + " ".join(f"{name:>20}" for name in names))
for row in results["rows"]:
    if row["kind"] != "attention":
        continue
    row["torch_ms"] = {}
    for name, backend in rivals(row):
        try:
            row["torch_ms"][name], expanded = time_of(row, backend)
            row.setdefault("expanded", []).extend([name] if expanded else [])
        except Exception as error:
            refused.append(f"{row['label']}: {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        torch.cuda.empty_cache()
    ours = row["ms"]["median"]
    cells = [
        f"{row['torch_ms'][name]:10.4f} ({row['torch_ms'][name] / ours:6.2f})" + ("*" if name in row.get("expanded", []) else " ")
        if name in row["torch_ms"] else f"{'-':>20}"
        for name in names
    ]
    print(f"{row['label']:44} {ours:9.4f} " + " ".join(cells), flush=True)
print("\n* keys and values expanded to all query heads" if any(row.get("expanded") for row in results["rows"]) else "")
for line in refused:
    print("not run:", line)
with open(path, "w") as file:
    json.dump(results, file, indent=1)

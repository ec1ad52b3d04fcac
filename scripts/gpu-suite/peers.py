#!/usr/bin/env python3
"""PyTorch on the shapes of the bench, timed in the same way. Each figure becomes a row at once.

    peers.py RESULTS matmul                          the rate of a bf16 matrix product
    peers.py RESULTS sdpa --cases FILE --seconds N   FlashAttention-2 and cuDNN, by
                                                     scaled_dot_product_attention
    peers.py RESULTS flex --cases FILE --label TEXT  FlexAttention, compiled: it alone has the star mask

The cases are what `gpu --bench --list` prints. Where grouped queries are refused, keys and values are
expanded beforehand.
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import results

# As Effort::GPU of benches/gpu/measure.rs.
WARM_MS, ROUND_MS, ROUNDS, MOST_MS, ROTATED_BYTES = 200.0, 40.0, 9, 4000.0, 256 << 20


def rounded(value):
    """As the bench rounds its figures."""
    return float(f"{value:.6g}")


def measure(launch):
    """Milliseconds of one launch: the median of the rounds, the least and the most."""
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
        return start.elapsed_time(end) / launches

    # The first launch compiles, or chooses an algorithm.
    round_of(1)
    warm = 0.0
    for _ in range(50):
        one = round_of(1)
        warm += one
        if warm > WARM_MS:
            break
    launches = min(max(int(ROUND_MS / one), 1), 2000)
    rounds = ROUNDS if one * launches * ROUNDS <= MOST_MS else 3
    times = sorted(round_of(launches) for _ in range(rounds))
    return {"median": rounded(times[rounds // 2]), "least": rounded(times[0]), "most": rounded(times[-1])}


def matmul(side=8192):
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    ms = measure(lambda _: torch.matmul(a, b, out=out))
    return {"ms": ms, "tflops": rounded(2 * side**3 / ms["median"] / 1e9)}


def star_mask(case):
    """The blocks of rank 0: the first one's length is the others'."""
    from torch.nn.attention.flex_attention import create_block_mask

    anchor, block, offset = case["anchor_len"], case["block_len"], case["key_len"] - case["query_len"]

    def sees(batch, head, query, key):
        query = query + offset
        own = (query // block == key // block) & (key <= query)
        return own | ((key < anchor) & (query >= block)) if block else key <= query

    lens = case["query_len"], case["key_len"]
    return torch.compile(create_block_mask)(sees, None, None, *lens, device="cuda")


def inputs(case):
    """Queries, and keys and values that rotate as the bench's: [batch, seq, heads, dim] in memory."""
    batch, kv_heads, dim = case["batch"], case["kv_heads"], case["head_dim"]

    def new(seq, heads):
        shape = (batch, heads, seq, dim) if case["heads_first"] else (batch, seq, heads, dim)
        tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return tensor if case["heads_first"] else tensor.transpose(1, 2)

    bytes_of_keys = 4 * batch * kv_heads * case["key_len"] * dim
    sets = min(ROTATED_BYTES // bytes_of_keys, 64) + 1
    kv = [(new(case["key_len"], kv_heads), new(case["key_len"], kv_heads)) for _ in range(sets)]
    return new(case["query_len"], case["query_heads"]), kv


def flex(case):
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled code is kept for a few shapes only.
    torch._dynamo.reset()
    query, kv = inputs(case)
    mask = star_mask(case)
    attend = torch.compile(flex_attention, dynamic=False)
    call = lambda i: attend(query, *kv[i % len(kv)], block_mask=mask, enable_gqa=True)
    return {"ms": measure(call)}


def sdpa(case, backend):
    query, kv = inputs(case)
    group = case["query_heads"] // case["kv_heads"]

    def attend(i, **gqa):
        return F.scaled_dot_product_attention(query, *kv[i % len(kv)], is_causal=case["causal"], **gqa)

    with sdpa_kernel(backend):
        try:
            attend(0, enable_gqa=True)
        except RuntimeError:
            kv = [tuple(x.repeat_interleave(group, 1) for x in pair) for pair in kv[:2]]
            return {"ms": measure(attend), "expanded": True}
        return {"ms": measure(lambda i: attend(i, enable_gqa=True)), "expanded": False}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("results", help="results.json")
    parser.add_argument("what", choices=["matmul", "sdpa", "flex"])
    parser.add_argument("--cases", help="the bench's list")
    parser.add_argument("--label", default="", help="only cases whose label contains this text")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many seconds")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    failed = False

    def row(head, figures):
        nonlocal failed
        try:
            if time.monotonic() > deadline:
                raise RuntimeError("not run: deadline")
            with torch.inference_mode():
                row = head | figures()
        # Whatever a row cannot do is a row's error.
        except Exception as error:
            failed = True
            row = head | {"error": (str(error) or type(error).__name__).splitlines()[0]}
        row["torch"] = torch.__version__
        results.append(arguments.results, row)
        figures = row.get("error") or f"{row['ms']['median']:.4f} ms"
        print(f"{row['label']:60} {row.get('peer', ''):20} {figures}", flush=True)
        torch.cuda.empty_cache()

    if arguments.what == "matmul":
        row({"kind": "rate", "label": "matmul"}, matmul)
        return failed
    with open(arguments.cases) as file:
        cases = [json.loads(line) for line in file]
    for case in cases:
        if case["kind"] != "attention" or arguments.label not in case["label"]:
            continue
        if case["packed"] or case["row_invariant"]:
            continue
        head = {"kind": "peer", "label": case["label"]}
        if arguments.what == "flex":
            row(head | {"peer": "FlexAttention"}, lambda: flex(case))
        elif not case["block_len"]:
            row(head | {"peer": "FlashAttention-2"}, lambda: sdpa(case, SDPBackend.FLASH_ATTENTION))
            row(head | {"peer": "cuDNN"}, lambda: sdpa(case, SDPBackend.CUDNN_ATTENTION))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

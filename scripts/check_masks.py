"""Random calls of examples/attend against PyTorch.

Each case draws a mask, and what goes with it; some have values of another dim than keys, and some fp8 keys and values, with scales
or without. PyTorch has the mask as an explicit matrix, made here from its definition, and codes times their scales in f64: it computes the
softmax in f64 step by step, and, where there is neither a softcap nor a sink and every row sees a key, by scaled_dot_product_attention
too. Outputs may differ by twice what rounding the exact result's weights and output to the type does, and a little for f32.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cases", type=int, default=200)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--backends", default="cpu,simt")
parser.add_argument("--attend", default="target/release/examples/attend")
args = parser.parse_args()

KINDS = ["full", "causal", "window", "sliding", "star", "star window", "blocks", "causal blocks"]
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw_mask(rng, kind, rows, keys):
    """The options of attend, tensors that go with them, and the matrix of what is seen."""
    at = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)[None, :]
    causal = key <= at
    left, right = rng.choice([0, 1, 5, 40]), rng.choice([0, 1, 7, 30])
    if kind == "full":
        return ["--mask", "full"], {}, torch.ones(rows, keys, dtype=torch.bool)
    if kind == "causal":
        return ["--mask", "causal"], {}, causal
    if kind == "window":
        return ["--window", f"{left},{right}"], {}, (key >= at - left) & (key <= at + right)
    if kind == "sliding":
        return ["--mask", "causal", "--window", f"{left},"], {}, causal & (key >= at - left)
    if kind.startswith("star"):
        block = rng.randint(1, 60)
        anchor = rng.randint(0, block)
        first = rng.choice([block, max(anchor, 1)])
        index = lambda p: torch.where(p < first, -1, torch.div(p - first, block, rounding_mode="floor"))
        own = index(at) == index(key)
        options = ["--mask", "star", "--anchor-len", f"{anchor}", "--block-len", f"{block}", "--first-block-len", f"{first}"]
        if kind == "star window":
            own &= key >= at - left
            options += ["--window", f"{left},0"]
        return options, {}, causal & (own | (key < anchor))
    tile_rows, step = rng.choice([1, 16, 50, 64]), rng.choice([1, 8, 64])
    offsets, ranges, seen = [0], [], torch.zeros(rows, keys, dtype=torch.bool)
    for start_row in range(0, rows, tile_rows):
        start = rng.choice([0, step, 3 * step])
        while start < keys:
            end = min(keys, start + step * rng.randint(1, 3))
            ranges.append([start, end])
            seen[start_row : start_row + tile_rows, start:end] = True
            start = end + step * rng.randint(0, 2)
        offsets.append(len(ranges))
    tensors = {
        "row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "row_ranges": torch.tensor(ranges, dtype=torch.int32).reshape(-1, 2),
    }
    options = ["--mask", "blocks", "--block-rows", f"{tile_rows}"]
    if kind == "causal blocks":
        return [*options, "--block-causal"], tensors, seen & causal
    return options, tensors, seen


def draw_scales(rng, generator, heads):
    """Tensors of scales, [], [1] or [heads], or none."""
    draw = lambda: 10 ** (4 * torch.rand(rng.choice([(), (1,), (heads,)]), generator=generator) - 2)
    return rng.choice([{}, {"k_scale": draw(), "v_scale": draw()}])


def divided(x, scale):
    """Codes of x [batch, seq, heads, dim]; what is beyond the largest becomes that."""
    return (x / scale.reshape(-1, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)


def exact(query, key, value, seen, softcap, sinks):
    """Output, log-sum-exp and weights in f64; [batch, heads, seq, dim] in and out."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp(min=-1e300)[..., None])[..., : key.shape[-2]]
    return weights @ value, lse, weights


def run_case(rng, index, backends, folder):
    kind = KINDS[index % len(KINDS)]
    backend = backends[index // len(KINDS) % len(backends)]
    dtype = TYPES[rng.choice(["f16", "bf16"] if backend == "simt" else list(TYPES))]
    # Of codes the kernels take multiples of 16.
    codes = rng.random() < 0.3
    dim = rng.choice([48, 64, 80, 128, 192]) if backend == "simt" else rng.choice([16, 40, 64, 128])
    batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 4)
    keys = rng.choice([1, 17, 96, 130, 300])
    rows = rng.choice([1, min(3, keys), min(keys, 70), keys])
    value_dim = rng.choice([16 if codes else 8, 32, 64, 96, 128]) if rng.random() < 0.3 else dim
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    normal = lambda *shape: torch.randn(shape, generator=generator)
    q, k, v = normal(batch, rows, kv_heads * group, dim), normal(batch, keys, kv_heads, dim), normal(batch, keys, kv_heads, value_dim)
    options, tensors, seen = draw_mask(rng, kind, rows, keys)
    q, one = q.to(dtype), torch.ones(1)
    if codes:
        scales = draw_scales(rng, generator, kv_heads)
        k, v = divided(k, scales.get("k_scale", one)), divided(v, scales.get("v_scale", one))
        tensors |= scales
    else:
        k, v = k.to(dtype), v.to(dtype)
    softcap = rng.choice([None, None, 3.0])
    if softcap:
        options += ["--softcap", f"{softcap}"]
    sinks = torch.randn(kv_heads * group, generator=generator) * 3 if rng.random() < 0.3 else None
    if sinks is not None:
        tensors["sinks"] = sinks
    options += rng.choice([[], ["--split-keys", "100"], ["--row-invariant"]])

    source, result = os.path.join(folder, "in.safetensors"), os.path.join(folder, "out.safetensors")
    save_file({"q": q, "k": k, "v": v, **tensors}, source)
    command = [args.attend, "--input", source, "--output", result, "--backend", backend, *options]
    subprocess.run(command, check=True)
    got = load_file(result)

    scales = [one, tensors.get("k_scale", one), tensors.get("v_scale", one)]
    wide = [(x.float().double() * scale.double().reshape(-1, 1)).transpose(1, 2) for x, scale in zip((q, k, v), scales)]
    wide[1:] = [x.repeat_interleave(group, dim=1) for x in wide[1:]]
    out, lse, weights = exact(*wide, seen, softcap, None if sinks is None else sinks.double())
    if softcap is None and sinks is None and seen.any(-1).all():
        sdpa = F.scaled_dot_product_attention(*wide, attn_mask=seen)
        assert (sdpa - out).abs().max() < 1e-12, "PyTorch's own attention differs from the definition"
    rounded = (weights.to(dtype).double() @ wide[2]).to(dtype).double()
    tolerance = 2 * (rounded - out).abs().max().item() + 4 * UNITS[dtype] * out.abs().max().item() + 2e-6
    off = (got["out"].double().transpose(1, 2) - out).abs().max().item()
    blind = lse.isneginf()
    assert (got["lse"].isneginf() == blind).all(), "rows without keys"
    lse_off = (got["lse"].double() - lse)[~blind].abs().max().item() if (~blind).any() else 0.0
    description = f"{kind}, {backend}, {dtype}, {list(q.shape)} over {list(k.shape)} and {list(v.shape)} of {v.dtype}: {' '.join(options)}"
    assert off <= tolerance and lse_off <= 1e-4, f"{description}: off by {off:.2e} of {tolerance:.2e}, lse by {lse_off:.2e}"
    return (kind, backend), off / tolerance, (value_dim != dim, codes)


rng = random.Random(args.seed)
table, of_dims, of_codes = {}, 0, 0
with tempfile.TemporaryDirectory() as folder:
    for index in range(args.cases):
        name, share, (other_dim, codes) = run_case(rng, index, args.backends.split(","), folder)
        table.setdefault(name, []).append(share)
        of_dims, of_codes = of_dims + other_dim, of_codes + codes
        if sys.stderr.isatty():
            print(f"\r{index + 1}/{args.cases}", end="", file=sys.stderr)
print("| mask | backend | cases | largest error, of what is allowed |")
print("|---|---|---:|---:|")
for (kind, backend), shares in sorted(table.items()):
    print(f"| {kind} | {backend} | {len(shares)} | {max(shares):.2f} |")
print(f"\n{of_dims} cases with values of another dim than keys, {of_codes} over fp8 keys and values.")
print(f"PyTorch {torch.__version__}, {args.cases} cases, all within tolerance.")

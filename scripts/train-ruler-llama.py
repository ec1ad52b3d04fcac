#!/usr/bin/env python3
"""Trains the small Llama of examples/assets/ruler-llama from scratch, with dense causal attention, on the samples of examples/ruler.

    cargo build --release --features candle --example ruler
    scripts/train-ruler-llama.py

Needs torch, numpy and safetensors; takes about 40 minutes on two cores. A short evaluation follows; `ruler run` is the long one. An interrupted training goes on from --state."""
import argparse
import json
import math
import random
import shlex
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

TASKS = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
         "niah_multivalue", "niah_multiquery", "vt_2", "vt_3", "vt_4", "cwe", "fwe", "qa1", "qa2", "qa3"]


def mix(**shares):
    """Shares of the tasks in a batch; those not named have 1."""
    return {**dict.fromkeys(TASKS, 1.0), **shares}


# What is slow to learn; lists come first, before what the starting weights know of them is lost.
LISTS_FIRST = mix(cwe=6.0, fwe=6.0, niah_multivalue=4.0, niah_multiquery=2.0, qa1=2.0, qa2=2.0, qa3=2.0)
HARD = mix(cwe=5.0, fwe=5.0, niah_multivalue=3.0, niah_multikey_2=2.0, niah_multikey_3=2.0, qa1=2.0, qa2=3.0, qa3=4.0)
# Batches of about `tokens` tokens, all samples of a batch of one length; the rate goes from the first to the second. `answer`: weight of the
# answers' tokens in the loss. `jumps`: share of sequences whose positions jump between facts, up to `reach`: what carries the model beyond the
# lengths it has seen. `dilute`: share of batches in which each token of hay weighs as up to `copies` in the softmax, as in a longer haystack.
STAGES = [
    dict(steps=600, lengths=[128, 192], tokens=4096, rate=(1e-3, 1e-3), mix=LISTS_FIRST, answer=8.0,
         jumps=0.0, reach=0, dilute=0.0, copies=1),
    dict(steps=500, lengths=[256], tokens=8192, rate=(1e-3, 1e-3), mix=HARD, answer=8.0,
         jumps=0.3, reach=1e4, dilute=0.0, copies=1),
    dict(steps=400, lengths=[256, 512], tokens=8192, rate=(1e-3, 9e-4), mix=HARD, answer=8.0,
         jumps=0.4, reach=3e5, dilute=0.2, copies=30),
    dict(steps=500, lengths=[512, 1024, 2048], tokens=8192, rate=(9e-4, 0), mix=HARD, answer=8.0,
         jumps=0.5, reach=1e6, dilute=0.3, copies=300),
    dict(steps=350, lengths=[128, 256, 512, 2048], tokens=8192, rate=(6e-4, 0), mix=HARD, answer=8.0,
         jumps=0.4, reach=1e6, dilute=0.5, copies=8000),
]
# Tokens of context for each question: more questions than are asked at a test, for more to learn from.
APART = 32
# Steps whose samples are made at once, and steps between two states kept.
CHUNK, KEEP = 25, 100

# The base makes the slowest pairs stand still over a million positions: content is found by them.
SHAPE = dict(hidden=128, layers=3, heads=6, kv_heads=2, head_dim=64, inner=256, theta=1e8, eps=1e-5)
BOS, EOS = 0, 1
# Ids of the words that lists and coded texts are made of, and the markers behind which a list is said (examples/ruler/small.rs).
COUNTED = [12, *range(18, 66)]
LISTS = ["<answer>", "<common>", "<frequent>"]
# Of the starting weights: scores of a match and of nearness; what copying, counting and crossing out write; and the score of `<bos>`, which a head with nothing to
# cross out sees instead.
MATCH, RECENT, COPY, COUNT, CROSS, SINK = 1.7, 2.4, 0.06, 0.25, 1.5, 3.8


class Generator:
    """The command that writes samples."""

    def __init__(self, command):
        self.command = shlex.split(command)

    def words(self):
        return json.loads(subprocess.run([*self.command, "words"], check=True, capture_output=True).stdout)

    def samples(self, task, length, count, seed, questions):
        options = dict(tasks=task, len=length, count=count, seed=seed, questions=questions)
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        lines = subprocess.run([*self.command, "samples", *arguments], check=True, capture_output=True).stdout
        return [json.loads(line) for line in lines.splitlines()]


def rotate(x, turn):
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(torch.nn.Module):
    def __init__(self, s):
        super().__init__()
        hidden, inner, small = s["hidden"], s["inner"], 0.02 / math.sqrt(2 * s["layers"])
        query, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        shapes = dict(q=(query, hidden), k=(kv, hidden), v=(kv, hidden), o=(hidden, query), gate=(inner, hidden),
                      up=(inner, hidden), down=(hidden, inner))
        for name, shape in shapes.items():
            deviation = small if name in ("o", "down") else 1 / math.sqrt(hidden)
            setattr(self, name, torch.nn.Parameter(torch.randn(shape) * deviation))
        self.norm1, self.norm2 = torch.nn.Parameter(torch.ones(hidden)), torch.nn.Parameter(torch.ones(hidden))
        self.s = s

    def forward(self, x, turn, mask=None, cache=None):
        s, (rows, length, _) = self.s, x.shape
        y = F.rms_norm(x, x.shape[-1:], self.norm1, s["eps"])
        q, k, v = (F.linear(y, w).view(rows, length, -1, s["head_dim"]).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(rows, length, -1), self.o)
        y = F.rms_norm(x, x.shape[-1:], self.norm2, s["eps"])
        return x + F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)


class Llama(torch.nn.Module):
    def __init__(self, vocabulary, s):
        super().__init__()
        self.s = s
        self.embed = torch.nn.Parameter(torch.randn(vocabulary, s["hidden"]) * 0.02)
        self.layers = torch.nn.ModuleList(Layer(s) for _ in range(s["layers"]))
        self.norm = torch.nn.Parameter(torch.ones(s["hidden"]))
        self.head = torch.nn.Parameter(torch.randn(vocabulary, s["hidden"]) * 0.02)

    def rates(self):
        """Radians per position of each pair of a head's elements."""
        half = self.s["head_dim"] // 2
        return self.s["theta"] ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, tokens, positions, mask=None, caches=None, last=False):
        angles = positions[:, None, :, None].double() * self.rates()
        turn = angles.cos().float(), angles.sin().float()
        x = F.embedding(tokens, self.embed)
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, None if caches is None else caches[i])
        x = x[:, -1:] if last else x
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.s["eps"]), self.head)


@torch.no_grad()
def plant(model, words):
    """Starting weights that already copy, count and cross out, where random ones take millions of tokens to begin to. Layer 0 has heads that see
    the token 1, 2 and 3 back, and one that tells what was said in answer to a list. Layer 1 has heads that find what followed the same token before,
    anywhere or lately, one that finds what followed the token two back (the next key of a question), one that sees all tokens alike, for counting, and
    one that takes back what was said. Layer 2 has heads that find what followed the same two tokens. Everything stays free to change."""
    s = model.s
    dim, half, hidden, heads = s["head_dim"], s["head_dim"] // 2, s["hidden"], s["heads"]
    group, rates = heads // s["kv_heads"], model.rates()
    rows = lambda head: slice(head * dim, (head + 1) * dim)
    # The residual stream: a constant, what a token is, whether it was said, and what stood one and two tokens before it, in short.
    short = hidden // 4
    token, said = slice(1, hidden // 2 - 1), hidden // 2 - 1
    before = [slice(hidden // 2, hidden // 2 + short), slice(hidden // 2 + short, hidden)]
    width = hidden // 2 - 2

    # What is counted is told apart exactly; markers of lists have a direction in common.
    axes = torch.nn.init.orthogonal_(torch.empty(width, width))
    list_marker, bos, free = axes[-1], axes[-2], axes[len(COUNTED):-2]
    what = F.normalize(torch.randn(len(words), width), dim=1)
    what[COUNTED], what[BOS] = axes[:len(COUNTED)], bos
    for word in LISTS:
        what[words.index(word)] = 0.8 * list_marker + 0.6 * F.normalize(torch.randn(len(free)) @ free, dim=0)
    model.embed.zero_()
    model.embed[:, token] = what * 0.24
    model.embed[:, 0] = 0.1
    model.head.copy_(torch.randn_like(model.head) * 0.02)
    model.head[:, token] += model.embed[:, token] * 2
    # The constant, and the length of what a token is, behind the first norm.
    scale = 1 / model.embed.pow(2).mean(1).sqrt().mean()
    constant, length = 0.1 * scale, 0.24 * scale

    # A score that depends on the distance alone: the fast pairs agree at one distance and at no other. Where a head has more pairs, each gives less.
    score = torch.full((half,), 6.0 * 16 / half, dtype=torch.float64)
    score[0] = 14.0
    score[rates < 2 * math.pi / 600] = 0
    size = (score * math.sqrt(dim)).sqrt() / constant

    def see(weight, head, distance):
        weight[rows(head)] = 0
        weight[head * dim:head * dim + half, 0] = (size * (-rates * distance).cos()).float()
        weight[head * dim + half:(head + 1) * dim, 0] = (size * (-rates * distance).sin()).float()

    layer = model.layers[0]
    code = torch.nn.init.orthogonal_(torch.empty(short, width))
    for kv in range(s["kv_heads"]):
        see(layer.k, kv, 0)
        layer.v[rows(kv)] = 0
        layer.v[kv * dim:kv * dim + short, token] = code
    for head in range(3):
        see(layer.q, head, head + 1)
    # The slowest pair's second element stands still.
    still, last = dim - 1, heads - 1
    gain = math.sqrt(14 * math.sqrt(dim) / (constant * 0.8 * length))
    layer.k[(last // group) * dim + still, token] = list_marker * gain
    layer.q[rows(last)] = 0
    layer.q[last * dim + still, 0] = gain
    layer.o.mul_(0.1)
    for quiet in model.layers:
        quiet.down.mul_(0.2)
    layer.o[:, :2 * dim] = 0
    for head in range(2):
        layer.o[before[head], head * dim:head * dim + short] = torch.eye(short) * 0.05
    seen = code @ list_marker
    layer.o[:, rows(last)] = 0
    layer.o[said, last * dim:last * dim + short] = seen / seen.pow(2).sum() * 0.03

    # Matches of content, on pairs too slow for the distance to matter, and for some heads a little more for near ones.
    slow, medium = list(range(half * 3 // 8, half)), list(range(half // 4, half * 3 // 8))
    both = lambda pairs: pairs + [half + pair for pair in pairs]
    copy, columns = torch.eye(dim, width), torch.arange(hidden)

    def match(layer, keys, queries):
        """One head of keys, and the heads of queries that read it; terms are of places in a head, a projection, and the part of the stream projected."""
        near = math.sqrt(RECENT * math.sqrt(dim) / len(medium)) / 2
        layer.k[torch.tensor(medium), 0] = near
        for places, project, part in keys:
            layer.k[torch.tensor(places)[:, None], columns[part][None]] = project * MATCH
        layer.v[rows(0), token] = copy
        for head, (recent, terms) in enumerate(queries):
            if recent:
                layer.q[head * dim + torch.tensor(medium), 0] = near
            for places, project, part in terms:
                layer.q[head * dim + torch.tensor(places)[:, None], columns[part][None]] = project * MATCH
            layer.o[token, rows(head)] = copy.T * COPY

    for layer in model.layers[1:]:
        layer.o.mul_(0.3)
    for layer, kv_heads in ((model.layers[1], s["kv_heads"]), (model.layers[2], 1)):
        for weight in (layer.q[:kv_heads * group * dim], layer.k[:kv_heads * dim], layer.v[:kv_heads * dim], layer.o[:, :kv_heads * group * dim]):
            weight.zero_()
    single = torch.nn.init.orthogonal_(torch.empty(2 * len(slow), short))
    same, skip = [(both(slow), single @ code, token)], [(both(slow), single, before[1])]
    match(model.layers[1], [(both(slow), single, before[0])], [(False, same), (True, same), (True, skip)])
    first, second = both(slow[0::2]), both(slow[1::2])
    one, two = (torch.nn.init.orthogonal_(torch.empty(len(places), short)) for places in (first, second))
    pair = [(first, one @ code, token), (second, two, before[0])]
    match(model.layers[2], [(first, one, before[0]), (second, two, before[1])], [(head == 1, pair) for head in range(group)])

    # A head that sees all alike, and one that sees what was said and says it less.
    layer, kv = model.layers[1], 1
    layer.k[kv * dim + still, said] = 3.0
    layer.k[kv * dim + still, token] = bos * SINK
    layer.q[last * dim + still, 0] = 3.0
    layer.v[rows(kv), token] = copy - copy @ (torch.outer(bos, bos) + torch.outer(list_marker, list_marker))
    for head, amount in ((kv * group, COUNT), (last, -CROSS)):
        layer.o[token, rows(head)] = copy.T * amount


def sequence(sample, stage, rng):
    """Tokens, positions, loss weights, and which tokens are hay; positions jump only between facts."""
    tokens, hay = list(sample["context"]), [1] * len(sample["context"])
    for start, end in sample["facts"]:
        hay[start:end] = [0] * (end - start)
    hay[0] = 0
    inside = {i for start, end in sample["facts"] for i in range(start + 1, end)}
    free = [i for i in range(1, len(tokens) + 1) if i not in inside]
    weights = [1.0] * len(tokens)
    for question in sample["questions"]:
        tokens += question["query"] + question["answer"]
        weights += [1.0] * len(question["query"]) + [stage["answer"]] * len(question["answer"])
    hay += [0] * (len(tokens) - len(hay))
    steps = [1] * len(tokens)
    # Of a story's facts the latest counts: the distance between them tells.
    if rng.random() < stage["jumps"] and not sample["task"].startswith("qa"):
        reach = math.exp(rng.uniform(math.log(1000), math.log(stage["reach"])))
        places = rng.sample(free, min(len(free), rng.randint(1, 24)))
        cuts = sorted(rng.uniform(0, reach) for _ in places)
        for place, low, high in zip(places, [0, *cuts], cuts):
            steps[place if place < len(steps) else -1] += int(high - low)
    positions = [0]
    for step in steps[1:]:
        positions.append(positions[-1] + step)
    return tokens, positions, weights, hay


def batches(generator, seed, index, begin):
    """The batches of a chunk of steps of a stage, which depend on nothing but the arguments."""
    stage, rng = STAGES[index], random.Random(f"{seed} {index} {begin}")
    names, shares = zip(*stage["mix"].items())
    plan = []
    for _ in range(CHUNK):
        length = rng.choice(stage["lengths"])
        plan.append((length, rng.choices(names, shares, k=max(1, stage["tokens"] // length))))
    pools = {}
    for length, tasks in plan:
        for task in tasks:
            pools[task, length] = pools.get((task, length), 0) + 1
    for number, ((task, length), count) in enumerate(sorted(pools.items())):
        first = seed * 10**8 + index * 10**7 + begin * 100 + number
        # Questions behind the first have no room reserved: few on a short context.
        pools[task, length] = generator.samples(task, length, count, first, max(1, length // APART))
    for length, tasks in plan:
        rows = [sequence(pools[task, length].pop(), stage, rng) for task in tasks]
        longest = max(len(row[0]) for row in rows)
        pad = lambda part, fill: torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows])
        mask = None
        if rng.random() < stage["dilute"]:
            bias = torch.tensor([rng.uniform(0, math.log(stage["copies"])) for _ in rows])[:, None] * pad(3, 0)
            mask = bias[:, None, None, :] + torch.full((longest, longest), -math.inf).triu(1)
        yield tasks, pad(0, EOS), pad(1, 0), pad(2, 0.0), mask


def train(model, generator, seed, state):
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    first, done = 0, 0
    if state.exists():
        saved = torch.load(state)
        first, done = saved["stage"], saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    start, seen, right = time.time(), 0, {}
    for index in range(first, len(STAGES)):
        stage = STAGES[index]
        for begin in range(done if index == first else 0, stage["steps"], CHUNK):
            losses = []
            for i, (tasks, tokens, positions, weights, mask) in enumerate(batches(generator, seed, index, begin)):
                low, high = stage["rate"]
                warm = min(1, (begin + i + 1) / 20) if index == 0 else 1
                optimizer.param_groups[0]["lr"] = warm * (low + (high - low) * (begin + i) / stage["steps"])
                logits = model(tokens, positions, mask)[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
                weight = weights[:, 1:].flatten()
                loss = (loss * weight).sum() / weight.sum()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                model.zero_grad()
                losses.append(loss.item())
                seen += tokens.numel()
                hits = logits.argmax(-1) == tokens[:, 1:]
                for task, hit, asked in zip(tasks, hits, weights[:, 1:] > 1):
                    right.setdefault(task, []).append(hit[asked].float().mean().item())
            step, seconds = begin + len(losses), time.time() - start
            print(f"stage {index} step {step} loss {sum(losses) / len(losses):.3f} seconds {seconds:.0f} "
                  f"tokens/s {seen / seconds:.0f}", flush=True)
            if step % KEEP == 0 or step >= stage["steps"]:
                print("  right:", *(f"{task} {sum(hits) / len(hits):.3f}" for task, hits in sorted(right.items())), flush=True)
                right, end = {}, step >= stage["steps"]
                saved = dict(stage=index + end, step=0 if end else step, model=model.state_dict(), optimizer=optimizer.state_dict())
                state.parent.mkdir(parents=True, exist_ok=True)
                torch.save(saved, state.with_suffix(".new"))
                state.with_suffix(".new").rename(state)


def export(model, words, out):
    """Writes the checkpoint in Hugging Face's layout, in f16."""
    out.mkdir(parents=True, exist_ok=True)
    names = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj", gate="mlp.gate_proj",
                 up="mlp.up_proj", down="mlp.down_proj", norm1="input_layernorm", norm2="post_attention_layernorm")
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm, "lm_head.weight": model.head}
    for i, layer in enumerate(model.layers):
        tensors |= {f"model.layers.{i}.{name}.weight": getattr(layer, short) for short, name in names.items()}
    halves = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    save_file(halves, out / "model.safetensors", dict(format="pt"))
    s = model.s
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=len(words), hidden_size=s["hidden"],
                  intermediate_size=s["inner"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
                  num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"], max_position_embeddings=1 << 20, rms_norm_eps=s["eps"],
                  rope_theta=s["theta"], tie_word_embeddings=False, hidden_act="silu", attention_bias=False, mlp_bias=False,
                  bos_token_id=BOS, eos_token_id=EOS, torch_dtype="float16")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = dict(version="1.0", truncation=None, padding=None,
                     added_tokens=[dict(id=i, content=words[i], **flags) for i in (BOS, EOS)], normalizer=None,
                     pre_tokenizer=dict(type="WhitespaceSplit"), post_processor=None, decoder=None,
                     model=dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    usual = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=words[BOS], eos_token=words[EOS], unk_token="<unk>",
                 model_max_length=1 << 20)
    for name, value in {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": usual}.items():
        (out / name).write_text(json.dumps(value, indent=1) + "\n")


@torch.no_grad()
def reply(model, prompt, limit):
    """What greedy decoding makes of a prompt, up to the end token."""
    caches, made, tokens, at = [[] for _ in model.layers], [], prompt, 0
    while len(made) < limit:
        positions = torch.arange(at, at + len(tokens))[None]
        made.append(model(torch.tensor([tokens]), positions, caches=caches, last=True)[0, -1].argmax().item())
        if made[-1] == EOS:
            break
        at, tokens = at + len(tokens), made[-1:]
    return made


def evaluate(model, generator, lengths, count, seed):
    """Prints the share of first questions answered right: the whole answer, or for lists in any order the share of its words found."""
    print("task".ljust(18), *(str(length).rjust(6) for length in lengths))
    for task in TASKS:
        print(task.ljust(18), end="", flush=True)
        for length in lengths:
            scores = []
            for sample in generator.samples(task, length, count, seed, 1):
                query, answer = sample["questions"][0]["query"], sample["questions"][0]["answer"]
                made = reply(model, sample["context"] + query, len(answer) + 4)
                found = len(set(made) & set(answer[:-1])) / (len(answer) - 1)
                scores.append(found if task in ("cwe", "fwe") else float(made == answer))
            print(f" {sum(scores) / count:6.3f}", end="", flush=True)
        print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="target/release/examples/ruler", help="command that writes samples")
    parser.add_argument("--out", default="examples/assets/ruler-llama", type=Path, help="directory of the checkpoint")
    parser.add_argument("--state", default="target/ruler-llama.pt", type=Path, help="where the state is kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512], help="lengths of the evaluation")
    parser.add_argument("--count", type=int, default=20, help="samples of a task and length of the evaluation")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = Generator(arguments.generator)
    words = generator.words()
    model = Llama(len(words), SHAPE)
    plant(model, words)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, generator, arguments.seed, arguments.state)
    export(model, words, arguments.out)
    # What is evaluated is what was written.
    for p in model.parameters():
        p.data = p.data.half().float()
    evaluate(model, generator, arguments.lengths, arguments.count, arguments.seed + 1000)


if __name__ == "__main__":
    main()

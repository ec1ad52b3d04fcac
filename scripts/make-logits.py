#!/usr/bin/env python3
"""Tiny random checkpoints of each family of models, and the logits that transformers computes for them.

    python3 scripts/make-logits.py [FOLDER]         writes them, by default to tests/model/families
    python3 scripts/make-logits.py --gguf FILE IDS  logits of a GGUF file for a JSON array of ids, to logits.safetensors

Needs PyTorch and transformers (5.24), and for GGUF files the packages gguf and accelerate. The tests of the model read what is written: a checkpoint
as transformers saves it, in bf16, and logits.safetensors with the token ids and the logits in f32.
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

TOKENS = 40
SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 5.0],
    "original_max_position_embeddings": 64,
}


def configs():
    """A config of each family, with what sets it apart."""
    return {
        "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA_3),
        "mistral": MistralConfig(**SMALL, head_dim=8, sliding_window=9),
        "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=7, max_window_layers=1),
        "qwen3": Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
        "gemma3": Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": 6, "intermediate_size": 16},
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=20,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        ),
        "phi3": Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=LONG),
    }


def randomize(model, generator):
    """Weights in bf16, with norms and biases that count, and attention that is far from even."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            # Around what a norm without effect has.
            value = weight.data.mean() + 0.3 * noise
        elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
            value = 0.6 * noise
        else:
            value = 0.3 * noise
        weight.data = value.to(torch.bfloat16)


@torch.no_grad()
def logits_of(model, ids):
    return model.float()(torch.tensor([ids])).logits[0].contiguous()


def write(folder):
    for seed, (name, config) in enumerate(configs().items()):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomize(model, generator)
        path = os.path.join(folder, name)
        model.save_pretrained(path)
        generation = os.path.join(path, "generation_config.json")
        if os.path.exists(generation):
            os.remove(generation)
        # As a user reads it, so that the config counts as it was saved.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.randint(2, SMALL["vocab_size"], (TOKENS,), generator=generator)
        logits = logits_of(model, ids.tolist())
        save_file({"ids": ids, "logits": logits}, os.path.join(path, "logits.safetensors"))
        print(f"{name}: logits up to {logits.abs().max():.1f}")


def of_gguf(path, ids):
    with open(ids, encoding="utf-8") as file:
        ids = json.load(file)
    folder, file = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    save_file({"logits": logits_of(model, ids)}, "logits.safetensors")


def main(arguments):
    if arguments[:1] == ["--gguf"]:
        of_gguf(*arguments[1:])
    else:
        default = os.path.join(os.path.dirname(__file__), "..", "tests", "model", "families")
        write(*arguments or [default])


if __name__ == "__main__":
    main(sys.argv[1:])

"""transformers on a CPU with all weights in RAM: one JSON line of tokens a second.

usage: peer_ram.py MODEL_DIR [THREADS, 2]      (torch, transformers)

`decode`: one sequence; `prefill`: a prompt of 512 whose last logits are wanted; `batch64`: decode of 64 sequences. Greedy, warmed.
"""
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


def decode(sequences, prompt, steps):
    ids = torch.randint(0, model.config.vocab_size, (sequences, prompt))
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(steps):
        started = time.time()
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        out.logits[:, -1:].argmax(-1)
        times.append(time.time() - started)
    times = times[1:]
    return sequences * len(times) / sum(times)


def prefill(tokens, repeats):
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    times = []
    for _ in range(repeats):
        started = time.time()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        times.append(time.time() - started)
    return tokens / min(times)


with torch.inference_mode():
    print(json.dumps({"decode": decode(1, 4, 17), "prefill": prefill(512, 3), "batch64": decode(64, 4, 5)}))

#!/usr/bin/env python3
"""accelerate's offload of a checkpoint, greedy decode of one sequence: one JSON line.

    accelerate_decode.py MODEL cpu|disk OFFLOAD_FOLDER
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

GPU = "8GiB"
TOKENS = 4


def main():
    model, mode, folder = sys.argv[1:]
    start = time.monotonic()
    memory = {0: GPU, "cpu": "200GiB" if mode == "cpu" else "1GiB"}
    lm = AutoModelForCausalLM.from_pretrained(
        model, torch_dtype=torch.bfloat16, device_map="auto", max_memory=memory, offload_folder=folder
    )
    ids = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]], device="cuda")
    load = time.monotonic() - start

    def generate(count):
        lm.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()

    with torch.inference_mode():
        generate(1)
        start = time.monotonic()
        generate(1)
        first = time.monotonic() - start
        start = time.monotonic()
        generate(1 + TOKENS)
        rest = time.monotonic() - start - first
    tiers = {}
    for where in lm.hf_device_map.values():
        tiers[str(where)] = tiers.get(str(where), 0) + 1
    print(json.dumps({"mode": mode, "tokens_per_s": TOKENS / rest, "load_s": load, "modules": tiers}))


main()

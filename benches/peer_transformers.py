"""Seconds a token of transformers with every weight on disk as accelerate offloads it: one JSON line.

usage: peer_transformers.py MODEL_DIR OFFLOAD_DIR [PROMPT] [STEPS]      (torch, transformers, accelerate)
"""
import json, sys, time
import torch
from transformers import AutoModelForCausalLM

model_dir, offload = sys.argv[1:3]
prompt, steps = (int(sys.argv[i]) if len(sys.argv) > i else d for i, d in ((3, 8), (4, 4)))
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=offload)


def read_bytes():
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])


ids = torch.randint(0, 150000, (1, prompt))
times, reads = [], []
with torch.no_grad():
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    for _ in range(steps):
        before, started = read_bytes(), time.time()
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        times.append(time.time() - started)
        reads.append(read_bytes() - before)
print(json.dumps({"s_per_token": sorted(times)[len(times) // 2], "bytes_per_token": sorted(reads)[len(reads) // 2], "times": times}))

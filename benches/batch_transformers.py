"""The peer of benches/batch.sh: the same rows through transformers, all weights in RAM, in padded batches.

    python benches/batch_transformers.py MODEL ROWS.jsonl [batch size, 64]

Prints tokens generated a second over the whole job, loading left out. Rows are prompts of token ids with `max_tokens`.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

model_dir, rows_path = sys.argv[1:3]
batch = int(sys.argv[3]) if len(sys.argv) > 3 else 64
rows = [json.loads(line)["body"] for line in open(rows_path)]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
# One row warms it up.
model.generate(torch.tensor([rows[0]["prompt"]]), max_new_tokens=2, do_sample=False)
started = time.time()
tokens = 0
for first in range(0, len(rows), batch):
    part = rows[first : first + batch]
    n = part[0]["max_tokens"]
    ids = torch.tensor([r["prompt"] for r in part])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n, do_sample=False)
    tokens += out[:, ids.shape[1] :].numel()
    print(f"{tokens} tokens after {time.time() - started:.1f} s", file=sys.stderr, flush=True)
seconds = time.time() - started
print(f"{len(rows)} rows, batch {batch}, {torch.get_num_threads()} threads: {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s")

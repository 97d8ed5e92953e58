#!/usr/bin/env python3
"""accelerate's offload of a checkpoint, greedy decode of one sequence: one JSON line.

    accelerate_decode.py MODEL cpu|disk OFFLOAD_FOLDER
"""

import ctypes
import json
import mmap
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM

GPU = "8GiB"
TOKENS = 4


def in_page_cache(*folders):
    """The share of the folders' bytes that the page cache holds: nothing is read to find out."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    held = total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                file = os.open(os.path.join(path, name), os.O_RDONLY)
                size = os.fstat(file).st_size
                at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0) if size else None
                os.close(file)
                if not size or at == ctypes.c_void_p(-1).value:
                    continue
                pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
                if libc.mincore(at, size, pages) == 0:
                    here = sum(page & 1 for page in pages.raw[: -(-size // mmap.PAGESIZE)])
                    held += min(size, here * mmap.PAGESIZE)
                    total += size
                libc.munmap(at, size)
    return held / total if total else None


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
        warm = in_page_cache(model, folder)
        start = time.monotonic()
        generate(1)
        first = time.monotonic() - start
        start = time.monotonic()
        generate(1 + TOKENS)
        rest = time.monotonic() - start - first
    tiers = {}
    for where in lm.hf_device_map.values():
        tiers[str(where)] = tiers.get(str(where), 0) + 1
    report = {"mode": mode, "tokens_per_s": TOKENS / rest, "load_s": load, "modules": tiers}
    print(json.dumps({**report, "in_page_cache": warm, "in_page_cache_after": in_page_cache(model, folder)}))


main()

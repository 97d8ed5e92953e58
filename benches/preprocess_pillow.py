"""Milliseconds that transformers' PIL processor takes for the picture of `cargo bench --bench vision` (resize and patches): median of nine.

usage: preprocess_pillow.py      (torch, transformers, pillow)

Pillow's bicubic resize alone stands beside it; ours of the same output is the bench's `resize and patches`.
"""
import statistics
import time

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

picture = Image.effect_noise((1600, 1200), 80).convert("RGB")


def ms(work):
    times = []
    for _ in range(9):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return f"{1e3 * statistics.median(times):.1f} ms"


for pixels in (1_003_520, 250_880):
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=pixels)
    h, w = processor(images=[picture], return_tensors="pt")["image_grid_thw"][0, 1:].tolist()
    resize = ms(lambda: picture.resize((w * 14, h * 14), Image.BICUBIC))
    print(f"1600x1200 to {pixels} pixels: Pillow's resize {resize}, the processor {ms(lambda: processor(images=[picture], return_tensors='pt'))}", flush=True)

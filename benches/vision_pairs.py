"""Seconds that the vision tower of Qwen2.5-VL-7B (its geometry, random weights) takes for a picture, beside transformers: pairs.

usage: vision_pairs.py DIR TENSORPAGER [PAIRS] [SIDE …]      (torch, transformers, pillow; DIR: 1.5 GB for the model, kept)

The decoder behind the tower has one small layer, its tokenizer is the test fixture's. Ours is `vision.seconds` of a run, in which the tower's
1.36 GB are streamed from disk; transformers has its weights in RAM: bfloat16, sdpa, 2 threads. Neither includes preprocessing.
"""
import json, pathlib, shutil, statistics, subprocess, sys, time
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

FIXTURE = pathlib.Path(__file__).parent.parent / "tests/fixtures/vl-bf16"
TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, fullatt_block_indexes=[7, 15, 23, 31], window_size=112)
TEXT = dict(hidden_size=3584, num_hidden_layers=1, num_attention_heads=28, num_key_value_heads=4, intermediate_size=512, max_window_layers=1,
            max_position_embeddings=32768, layer_types=["full_attention"])


def make(folder):
    folder.mkdir(parents=True)
    for file in FIXTURE.glob("*.json"):
        if "index" not in file.name and not file.name.startswith("golden"):
            shutil.copy(file, folder)
    config = json.loads((FIXTURE / "config.json").read_text())
    config["text_config"] |= TEXT
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["vision_config"] |= TOWER
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).to(torch.bfloat16).save_pretrained(folder)


def theirs(model, side):
    grid = torch.tensor([[1, side // 14, side // 14]])
    patches = torch.randn(int(grid.prod()), 1176, dtype=torch.bfloat16)
    started = time.time()
    with torch.no_grad():
        model.model.visual(patches, grid_thw=grid)
    return time.time() - started


def ours(tensorpager, folder, picture):
    said = subprocess.run([tensorpager, "run", folder, "--in-place", "--image", picture, "--prompt", "What?", "--max-tokens", "1", "--min-pixels", "3136",
                           "--max-pixels", "4000000", "--threads", "2", "--json", "-q"], capture_output=True, text=True)
    if said.returncode:
        sys.exit(said.stderr)
    return json.loads(said.stdout)["vision"]


def main():
    folder, tensorpager = pathlib.Path(sys.argv[1]), sys.argv[2]
    pairs = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    torch.set_num_threads(2)
    if not folder.exists():
        make(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    for side in [int(s) for s in sys.argv[4:]] or [448, 1008]:
        picture = folder / f"{side}.png"
        Image.effect_noise((side, side), 80).convert("RGB").save(picture)
        ratios, seconds = [], []
        for _ in range(pairs):
            mine, peer = ours(tensorpager, folder, picture), theirs(model, side)
            ratios.append(peer / mine["seconds"])
            print(f"{side}x{side}: {mine['seconds']:.2f} s ({mine['compute_s']:.2f} s computing), transformers {peer:.2f} s: {ratios[-1]:.2f}", flush=True)
            seconds.append(mine["seconds"])
        print(f"{side}x{side}: {statistics.median(ratios):.2f} times as fast, {1 / statistics.median(seconds):.3f} images/s (medians)", flush=True)


main()

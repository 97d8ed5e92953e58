"""Trains the demo model: a small Qwen2 that adds and sorts, so that its answers can be checked.

    pip install torch==2.11.0 transformers==5.17.0 safetensors
    python demo/train.py                 # writes demo/model/: 1650 s of CPU time when it was last run, on one thread of a busy machine

Two tasks in one model, written as a person writes them (operands 0..999; two to six numbers 0..99):

    417+286=              703
    sort: 83 12 57 40 =   12 40 57 83

Held out by construction: a hash of the problem decides whether training may ever see it. The hash ignores the order of
the operands, so the model has seen neither `a+b` nor `b+a`, nor any order of a held-out set of numbers.
The seed fixes data and weights; another thread count or torch version still rounds differently.
"""

import argparse
import hashlib
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

TEST = 4000  # held-out problems of each task
EOS, UNK = "<|endoftext|>", "<|unk|>"


# --- problems -------------------------------------------------------------------------------------------------------
def held_out(numbers):
    key = " ".join(map(str, sorted(numbers)))
    return hashlib.blake2b(key.encode()).digest()[0] < 26  # one in ten


def add(rng):
    # Lengths are drawn first: uniform operands would hardly ever show a short one.
    a, b = (rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3))) for _ in range(2))
    return (a, b), f"{a}+{b}=", str(a + b)


def sort(rng):
    xs = [rng.randrange(100) for _ in range(rng.randint(2, 6))]
    return xs, "sort: " + " ".join(map(str, xs)) + " =", " ".join(map(str, sorted(xs)))


def problems(task, rng, count, test):
    """(prompt, answer) pairs, all different."""
    out = {}
    while len(out) < count:
        numbers, prompt, answer = task(rng)
        if held_out(numbers) == test:
            out[prompt] = answer
    return list(out.items())


# --- tokens ---------------------------------------------------------------------------------------------------------
def make_tokenizer():
    # A byte-level BPE without merges is a character tokenizer, and needs no regular expression. Bytes, not characters, for
    # transformers' sake: it turns any tokenizer beside a Qwen2 model into a byte-level one, where a space is spelt Ġ.
    tokens = [EOS, UNK, *"0123456789+=Ġ"]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token=UNK))
    tok.add_special_tokens([EOS, UNK])
    tok.add_tokens([AddedToken("sort:", normalized=False)])
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    return tok


def batch_of(tok, rows):
    """Ids and labels, padded on the right, where causal attention never looks; only the answer is learnt."""
    ids = [(tok.encode(p).ids, tok.encode(a).ids + [tok.token_to_id(EOS)]) for p, a in rows]
    width = max(len(p) + len(a) for p, a in ids)
    x = torch.full((len(ids), width), tok.token_to_id(EOS))
    y = torch.full((len(ids), width), -100)
    for i, (p, a) in enumerate(ids):
        x[i, : len(p) + len(a)] = torch.tensor(p + a)
        y[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return x, y


# --- accuracy -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def answers(model, tok, prompts):
    """Greedy answers. Prompts of one length go together, so that nothing is padded and each is answered as if alone."""
    eos, by_length, out = tok.token_to_id(EOS), {}, {}
    for p in prompts:
        by_length.setdefault(len(tok.encode(p).ids), []).append(p)
    for group in by_length.values():
        x = torch.tensor([tok.encode(p).ids for p in group])
        y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=24, do_sample=False, pad_token_id=eos)
        for p, row in zip(group, y[:, x.shape[1] :].tolist()):
            out[p] = tok.decode(row[: row.index(eos)] if eos in row else row)
    return [out[p] for p in prompts]


def right(model, tok, rows):
    """How many answers are right to the last character."""
    model.eval()
    n = sum(got == want for got, (_, want) in zip(answers(model, tok, [p for p, _ in rows]), rows))
    model.train()
    return n


# --- training -------------------------------------------------------------------------------------------------------
class Muon:
    """Momentum whose step is made orthogonal, for the matrices inside the layers. It learns to add in a small part of the
    steps AdamW takes. torch.optim.Muon does this in bfloat16, slow on most CPUs, and one matrix at a time."""

    def __init__(self, params, lr):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape)) for shape, ps in by_shape.items()]
        self.param_groups = [{"lr": lr}]

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for params, momentum in self.groups:
            g = torch.stack([p.grad for p in params])
            momentum.lerp_(g, 0.05)
            x = g.lerp(momentum, 0.95)
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton-Schulz
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.mT if tall else x
            x = x * max(1, x.shape[1] / x.shape[2]) ** 0.5
            for p, u in zip(params, x):
                p.mul_(1 - 0.01 * lr).sub_(lr * u)
                p.grad = None


def train(model, tok, args):
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    other = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    adamw = torch.optim.AdamW(other, lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
    optimizers = [(Muon(inner, 0.02), 0.02), (adamw, 2e-3)]
    rng, start, mean = random.Random(args.seed), time.time(), {}
    for step in range(args.steps):
        for opt, lr in optimizers:
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / args.steps)
        for task, count in ((add, args.add), (sort, args.sort)):  # a batch each: a common one would be mostly padding
            x, y = batch_of(tok, problems(task, rng, count, test=False))
            logits = model(input_ids=x, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
            loss.backward()
            mean[task.__name__] = 0.95 * mean.get(task.__name__, loss.item()) + 0.05 * loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, _ in optimizers:
            opt.step()
        adamw.zero_grad()
        if (step + 1) % 50 == 0:
            losses = "  ".join(f"{k} {v:.4f}" for k, v in mean.items())
            print(f"step {step + 1}: loss {losses}  {time.time() - start:.0f} s, {time.process_time():.0f} s of CPU", flush=True)
        if (step + 1) % 250 == 0:
            peek = random.Random(0)
            print("  right of 300 held out:", *(right(model, tok, problems(t, peek, 300, test=True)) for t in (add, sort)), flush=True)


def save(model, tok, out):
    model.to(torch.bfloat16).save_pretrained(out)
    c = json.loads((out / "config.json").read_text())  # as configs on the hub look
    c["rope_theta"] = c.pop("rope_parameters")["rope_theta"]
    c["torch_dtype"] = c.pop("dtype")
    c.pop("layer_types")
    (out / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    eos = {"eos_token_id": tok.token_to_id(EOS), "do_sample": False, "transformers_version": transformers.__version__}
    (out / "generation_config.json").write_text(json.dumps(eos, indent=2) + "\n")
    tok.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": UNK, "model_max_length": 128}, indent=2) + "\n")


def evaluate(out, facts):
    """What counts is the folder as it lies there: 16-bit weights, the tokenizer as loaded, greedy, the whole answer right."""
    tok = AutoTokenizer.from_pretrained(out).backend_tokenizer
    rng = random.Random(facts["seed"] + 1)
    tests = {t.__name__: problems(t, rng, TEST, test=True) for t in (add, sort)}
    for dtype in (torch.bfloat16, torch.float32):  # what is computed in; the weights are bfloat16 in both
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        n = {name: right(model, tok, rows) for name, rows in tests.items()}
        print(f"right of {TEST} held out, computed in {dtype}:", n, flush=True)
        facts[f"right_in_{str(dtype)[6:]}"] = n
    facts |= {"held_out_problems_of_each": TEST, "accuracy": {name: count / TEST for name, count in n.items()}}
    sample = [{"task": name, "prompt": p, "answer": a} for name, rows in tests.items() for p, a in rows[:100]]
    facts["right_of_the_200_below"] = right(model, tok, [(s["prompt"], s["answer"]) for s in sample])
    (out / "heldout.json").write_text(json.dumps({**facts, "problems": sample}, indent=1) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--steps", type=int, default=2000)
    ap.add_argument("--add", type=int, default=96, help="additions a step")
    ap.add_argument("--sort", type=int, default=64, help="sorts a step")
    ap.add_argument("--threads", type=int, default=1, help="on busy cores one thread is faster than two that wait for each other")
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tok = make_tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=tok.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tok.token_to_id(EOS), rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    ))
    start, cpu = time.time(), time.process_time()
    train(model, tok, args)
    facts = {"seed": args.seed, "steps": args.steps, "problems_a_step": {"add": args.add, "sort": args.sort}, "threads": args.threads,
             "parameters": model.num_parameters(), "train_seconds": round(time.time() - start),
             "train_cpu_seconds": round(time.process_time() - cpu), "torch": torch.__version__, "transformers": transformers.__version__}
    save(model, tok, args.out)
    evaluate(args.out, facts)


if __name__ == "__main__":
    main()

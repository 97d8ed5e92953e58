#!/bin/sh
# Pairs with llama.cpp on the same 16-bit weights, two threads each, alternating who is first.
#
#   benches/llama_pairs.sh ram   MODEL GGUF LLAMA_BIN [PAIRS]               decode of one sequence, prefill of 512, decode of 64; tokens a second
#   benches/llama_pairs.sh limit MODEL GGUF LLAMA_BIN [PAIRS] [LIMIT_MIB]   seconds a token under a memory limit (cgroup v1, root), theirs by mmap
#
# MODEL: packed or a Hugging Face folder; GGUF: benches/to_gguf.py makes it; LLAMA_BIN: the folder of llama-bench and llama-batched-bench.
set -eu
# Option names of 2026 (`-lm`); older builds say `-mmp 0` and `--no-mmap`.
what=${1:?ram or limit} model=${2:?MODEL} gguf=${3:?GGUF} llama=${4:?LLAMA_BIN} pairs=${5:-3} limit=${6:-1600}
bin=${TENSORPAGER:-target/release/tensorpager}
out=$(mktemp -d)
group=/sys/fs/cgroup/memory/tensorpager-llama-$$
trap 'rm -rf "$out"; rmdir "$group" 2>/dev/null || true' EXIT INT TERM

rows() { # a Python expression over the files in the folder argv[1]: printed as JSON
    python3 -c "import json,sys; print(json.dumps($1))" "$out"
}
ours_ram() {
    "$bin" bench "$model" -p 512 -n 16 -r 2 -b 1 --threads 2 --device-map cpu -o json >"$out/one" 2>"$out/err"
    "$bin" bench "$model" -p 0 -n 8 -r 1 -b 64 --threads 2 --device-map cpu -o json >"$out/many" 2>>"$out/err"
    rows '{("prefill" if r["test"].startswith("pp") else "decode" if r["batch"] == 1 else "batch64"): r["tokens_per_s"]
        for f in ("one", "many") for r in json.load(open(sys.argv[1] + "/" + f))["rows"]}'
}
theirs_ram() {
    "$llama/llama-bench" -m "$gguf" -p 512 -n 16 -r 2 -t 2 -lm none -o json >"$out/one" 2>"$out/err"
    "$llama/llama-batched-bench" -m "$gguf" -c 2048 -b 2048 -ub 512 -npp 4 -ntg 8 -npl 64 -t 2 -tb 2 -lm none --output-format jsonl >"$out/many" 2>>"$out/err"
    rows '{("prefill" if r["n_prompt"] else "decode"): r["avg_ts"] for r in json.load(open(sys.argv[1] + "/one"))}
        | {"batch64": r["speed_tg"] for l in open(sys.argv[1] + "/many") if l.startswith("{") for r in [json.loads(l)]}'
}
limited() { sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' sh "$group" "$@"; }
cold() { sync; echo 3 >/proc/sys/vm/drop_caches; }
ours_limit() {
    cold
    # The kernel's limit counts page tables and the like besides the process's resident set: a sixteenth is left for them.
    limited "$bin" run "$model" --prompt "The quick brown fox" --raw --greedy --ignore-eos --max-tokens 6 --context 64 --threads 2 \
        --cpu-memory $((limit * 15 / 16))MiB --json --quiet >"$out/one"
    rows '{"decode": (len(r["token_ids"]) - 1) / r["timings"]["decode_s"]
        for r in [json.loads(open(sys.argv[1] + "/one").read().splitlines()[-1])]}'
}
theirs_limit() {
    cold
    limited "$llama/llama-bench" -m "$gguf" -p 0 -n 4 -r 1 -t 2 -lm mmap -o json >"$out/one" 2>"$out/err"
    rows '{"decode": r["avg_ts"] for r in json.load(open(sys.argv[1] + "/one"))}'
}
case $what in
ram) ;;
limit) mkdir "$group" && echo $((limit * 1048576)) >"$group/memory.limit_in_bytes" ;;
*) echo "ram or limit, not $what" >&2 && exit 2 ;;
esac
i=0
while [ $i -lt "$pairs" ]; do
    i=$((i + 1))
    if [ $((i % 2)) = 1 ]; then order="ours theirs"; else order="theirs ours"; fi
    for who in $order; do printf '%s %s %s\n' "$i" "$who" "$("${who}_$what")"; done
done | tee "$out/rows"
python3 - "$out/rows" <<'PY'
import json, statistics, sys
pairs = {}
for line in open(sys.argv[1]):
    i, who, figures = line.split(" ", 2)
    pairs.setdefault(i, {})[who] = json.loads(figures)
for what in pairs["1"]["ours"]:
    ratios = [p["ours"][what] / p["theirs"][what] for p in pairs.values()]
    print(what, "ours/theirs:", *(f"{r:.2f}" for r in ratios), "median", f"{statistics.median(ratios):.2f}")
PY

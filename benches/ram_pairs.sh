#!/bin/sh
# From RAM, in pairs with transformers: decode of one sequence, prefill of 512, decode of 64 sequences; tokens a second.
#
#   benches/ram_pairs.sh MODEL PYTHON [PAIRS]      PYTHON: an interpreter with torch and transformers
set -eu
model=${1:?MODEL} python=${2:?PYTHON} pairs=${3:-3}
bin=${TENSORPAGER:-target/release/tensorpager}
here=$(dirname "$0")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM
ours() {
    "$bin" bench "$model" -p 512 -n 16 -r 2 -b 1 --device-map cpu --in-place -o json >"$out/one.json" 2>"$out/err"
    "$bin" bench "$model" -p 0 -n 8 -r 1 -b 64 --device-map cpu --in-place -o json >"$out/many.json" 2>>"$out/err"
    "$python" - "$out" <<'PY'
import json, sys
rows = [r for name in ("one", "many") for r in json.load(open(f"{sys.argv[1]}/{name}.json"))["rows"]]
print(json.dumps({"decode": 0, "prefill": 0} | {
    "prefill" if r["test"].startswith("pp") else "decode" if r["batch"] == 1 else "batch64": r["tokens_per_s"] for r in rows}))
PY
}
theirs() { "$python" "$here/peer_ram.py" "$model" 2>"$out/err" | tail -1; }
i=0
while [ $i -lt "$pairs" ]; do
    i=$((i + 1))
    if [ $((i % 2)) = 1 ]; then order="ours theirs"; else order="theirs ours"; fi
    for who in $order; do printf '%s %s %s\n' "$i" "$who" "$($who)"; done
done | tee "$out/rows"
"$python" - "$out/rows" <<'PY'
import json, statistics, sys
pairs = {}
for line in open(sys.argv[1]):
    i, who, figures = line.split(" ", 2)
    pairs.setdefault(i, {})[who] = json.loads(figures)
for what in ("decode", "prefill", "batch64"):
    print(what, "ours/theirs:", *(f'{p["ours"][what] / p["theirs"][what]:.2f}' for p in pairs.values()),
          "median", f'{statistics.median(p["ours"][what] / p["theirs"][what] for p in pairs.values()):.2f}')
PY

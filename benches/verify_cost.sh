#!/usr/bin/env bash
# What verifying every byte costs: pairs of runs with every unit on disk, `--verify always` beside `--verify never`, the order
# changing from pair to pair. Prints tokens/s of each and the ratios. Run it alone on the machine.
#   benches/verify_cost.sh MODEL [PAIRS] [TOKENS]
set -euo pipefail
model=$1
pairs=${2:-6}
tokens=${3:-6}
binary=${TENSORPAGER:-target/release/tensorpager}
one() {
    "$binary" run "$model" --device-map disk --verify "$1" --raw -p "The sea" -n "$tokens" --ignore-eos --greedy --json 2>/dev/null |
        python3 -c 'import json,sys; r=json.loads(sys.stdin.readlines()[-1]); print(r["timings"]["output_tokens_per_s"], r["paging"]["disk_gb_per_s"])'
}
"$binary" pack "$model" >/dev/null
one always >/dev/null
for i in $(seq "$pairs"); do
    if [ $((i % 2)) = 0 ]; then
        a=$(one always)
        n=$(one never)
    else
        n=$(one never)
        a=$(one always)
    fi
    echo "$a $n"
done | python3 -c '
import sys, statistics
rows = [list(map(float, l.split())) for l in sys.stdin]
for r in rows: print(f"always {r[0]:.4f} tokens/s at {r[1]:.2f} GB/s   never {r[2]:.4f} at {r[3]:.2f}   ratio {r[0]/r[2]:.4f}")
print(f"median ratio {statistics.median(r[0]/r[2] for r in rows):.4f} of {len(rows)} pairs")'

#!/bin/sh
# What `plan` predicts against what a pass takes, over placements: one row each, both figures in one record.
#
#   benches/plan_accuracy.sh MODEL [TOKENS] [RUNS] [run/plan options …] > plan.tsv
#
# The rates are those `plan` keeps: `tensorpager bench io MODEL` before it renews the disk's. Every placement is measured RUNS times, in
# turn, so that a drifting disk fools nobody; the median is compared.
set -eu
model=${1:?MODEL}
tokens=${2:-8}
runs=${3:-3}
shift; [ $# -gt 0 ] && shift; [ $# -gt 0 ] && shift
bin=${TENSORPAGER:-target/release/tensorpager}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM

weights=$("$bin" inspect "$model" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["bytes"])')
placement() { # name; prints flags
    case $1 in
    disk) echo --device-map disk ;;
    cpu) echo --device-map cpu ;;
    *) echo --cpu-memory $((weights / 100 * $1)) ;;
    esac
}
context=$((tokens + 16))
placements="disk 25 40 60 80 cpu"
for p in $placements; do
    # shellcheck disable=SC2046
    "$bin" plan "$model" $(placement "$p") --context $context --sequences 1 --json "$@" >"$out/plan-$p.json"
done
i=0
while [ $i -lt "$runs" ]; do
    i=$((i + 1))
    for p in $placements; do
        # shellcheck disable=SC2046
        "$bin" run "$model" $(placement "$p") --context $context --prompt "The quick brown fox" --raw --greedy --ignore-eos \
            --max-tokens "$tokens" --json --quiet "$@" >"$out/run-$p-$i.json"
    done
done
python3 - "$out" "$runs" $placements <<'PY'
import json, statistics, sys
out, runs = sys.argv[1], int(sys.argv[2])
print("placement\tresident_bytes\tdisk_bytes_per_pass\tpredicted_s\tmeasured_s\tspread_s\terror_percent\tbound_percent\tdisk_gb_per_s")
for p in sys.argv[3:]:
    row = json.load(open(f"{out}/plan-{p}.json"))["rows"][0]
    passes, bounds, rates, resident = [], [], [], 0
    for i in range(1, runs + 1):
        r = json.loads(open(f"{out}/run-{p}-{i}.json").read().strip().splitlines()[-1])
        passes.append(r["timings"]["decode_s"] / max(len(r["token_ids"]) - 1, 1))
        bounds.append(r["paging"]["percent_of_bound"] or float("nan"))
        rates.append(r["paging"]["disk_gb_per_s"])
        resident = r["paging"]["resident_cpu_bytes"]
    m = statistics.median(passes)
    print(p, resident, row["disk_bytes_per_pass"], f'{row["pass_s"]:.3f}', f"{m:.3f}", f"{max(passes) - min(passes):.3f}",
          f'{100 * (row["pass_s"] / m - 1):+.1f}', f"{statistics.median(bounds):.1f}", f"{statistics.median(rates):.2f}", sep="\t")
PY

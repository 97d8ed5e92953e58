#!/bin/sh
# The curve over budgets: seconds a token of this engine's plan and of its mmap reader under the same memory limit.
#
#   benches/budget_curve.sh MODEL [TOKENS] [RUNS] > curve.tsv        (BUDGETS="20 50 110" for some of them)
#
# Budgets run from 20 % to 110 % of the weights. Each pair runs one after the other, RUNS times, alternating who is first, so that a
# drifting disk fools nobody. With cgroup v1 (or v2) writable the limit is the kernel's as well as the flag's: mmap pays for its page
# cache as it would on a machine of that size. Without, LIMIT is empty and the mmap column has the machine's whole page cache: the
# script then refuses unless NO_LIMIT=1.
set -eu
model=${1:?MODEL}
tokens=${2:-6}
runs=${3:-3}
bin=${TENSORPAGER:-target/release/tensorpager}
group=/sys/fs/cgroup/memory/tensorpager-curve-$$
out=$(mktemp -d)
trap 'rm -rf "$out"; rmdir "$group" 2>/dev/null || true' EXIT INT TERM

weights=$("$bin" inspect "$model" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["bytes"])')
limit_kind=none
if [ -d /sys/fs/cgroup/memory ] && mkdir "$group" 2>/dev/null; then
    limit_kind=v1
elif [ -f /sys/fs/cgroup/cgroup.controllers ] && group=/sys/fs/cgroup/tensorpager-curve-$$ && mkdir "$group" 2>/dev/null &&
    [ -f "$group/memory.max" ]; then
    limit_kind=v2
elif [ "${NO_LIMIT:-}" != 1 ]; then
    echo "no cgroup can be made here: run as root, or set NO_LIMIT=1 (mmap then has the whole page cache)" >&2
    exit 1
fi

set_limit() { # bytes
    case $limit_kind in
    v1) echo "$1" >"$group/memory.limit_in_bytes" ;;
    v2) echo "$1" >"$group/memory.max" ;;
    esac
}

run() { # reader budget file; prints seconds a token, peak, GB/s, percent of bound
    # mmap relies on the page cache alone: nothing of it is kept by a plan.
    map=""; [ "$1" = mmap ] && map="--device-map disk"
    sh -c '
        case $1 in
        v1) echo $$ >"$2/cgroup.procs" ;;
        v2) echo $$ >"$2/cgroup.procs" ;;
        esac
        shift 2
        exec "$@"' sh "$limit_kind" "$group" \
        "$bin" run "$model" $map --prompt "The quick brown fox" --raw --greedy --ignore-eos --max-tokens "$tokens" \
        --cpu-memory "$2" --io "$1" --json --quiet >"$3" 2>"$3.err" || return 1
}

printf 'budget_percent\tbudget_bytes\treader\trun\ts_per_token\tdisk_gb_per_s\tdisk_bytes_per_pass\tpeak_bytes\tpercent_of_bound\n'
for percent in ${BUDGETS:-20 30 40 50 60 70 80 90 100 110}; do
    budget=$((weights / 100 * percent))
    # The kernel's limit counts page tables and the page cache in use besides the process's resident set.
    set_limit $((budget + 67108864))
    i=0
    while [ $i -lt "$runs" ]; do
        i=$((i + 1))
        if [ $((i % 2)) = 1 ]; then order="auto mmap"; else order="mmap auto"; fi
        for reader in $order; do
            [ -w /proc/sys/vm/drop_caches ] && sync && echo 3 >/proc/sys/vm/drop_caches
            if run "$reader" "$budget" "$out/r.json"; then
                python3 - "$out/r.json" "$percent" "$budget" "$reader" "$i" <<'PY'
import json, sys
r = json.loads(open(sys.argv[1]).read().strip().splitlines()[-1])
t, p = r["timings"], r["paging"]
n = max(len(r["token_ids"]) - 1, 1)
print(*sys.argv[2:], f'{t["decode_s"] / n:.4f}', f'{p["disk_gb_per_s"]:.3f}', p["disk_bytes_per_pass"],
      p["peak_memory_bytes"], p["percent_of_bound"], sep="\t", flush=True)
PY
            else
                printf '%s\t%s\t%s\t%s\trefused: %s\n' "$percent" "$budget" "$reader" "$i" \
                    "$(grep -m1 '^fix' "$out/r.json.err" || head -1 "$out/r.json.err")"
            fi
        done
    done
done | tee "$out/rows"

# The table: medians, and how far ours is from (weights - resident) / rate.
python3 - "$out/rows" >&2 <<'PY'
import statistics, sys
rows = {}
for line in open(sys.argv[1]):
    f = line.rstrip("\n").split("\t")
    if len(f) == 9:
        rows.setdefault(int(f[0]), {}).setdefault(f[2], []).append([float(x) if x != "None" else float("nan") for x in f[4:]])
print("budget   ours s/token   mmap s/token   ours/mmap   ours GB/token   GB/s   % of bound")
for percent, by in sorted(rows.items()):
    m = lambda reader, col: statistics.median(r[col] for r in by[reader]) if reader in by else float("nan")
    a, b = m("auto", 0), m("mmap", 0)
    print(f"{percent:5} % {a:14.3f} {b:14.3f} {a / b:11.2f} {m('auto', 2) / 1e9:15.3f} {m('auto', 1):6.2f} {m('auto', 4):12.1f}")
PY

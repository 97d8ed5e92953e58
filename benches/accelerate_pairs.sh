#!/bin/sh
# Pairs against accelerate's disk offload under one memory limit (cgroup v1, as root): seconds a token of both, in turn.
#
#   benches/accelerate_pairs.sh CHECKPOINT PACK PYTHON [LIMIT_MIB] [PAIRS]
#
# CHECKPOINT: the Hugging Face folder; PACK: its packed folder; PYTHON: an interpreter with torch, transformers and accelerate.
set -eu
checkpoint=${1:?CHECKPOINT}
pack=${2:?PACK}
python=${3:?PYTHON}
limit=${4:-1600}
pairs=${5:-3}
bin=${TENSORPAGER:-target/release/tensorpager}
here=$(dirname "$0")
group=/sys/fs/cgroup/memory/tensorpager-pairs-$$
out=$(mktemp -d "${TMPDIR:-/tmp}/pairs.XXXXXX")
trap 'rm -rf "$out"; rmdir "$group" 2>/dev/null || true' EXIT INT TERM
mkdir "$group"
echo $((limit * 1048576)) >"$group/memory.limit_in_bytes"

limited() { # group, then a command
    sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' sh "$group" "$@"
}
cold() { sync; echo 3 >/proc/sys/vm/drop_caches; }

ours() {
    cold
    # The kernel's limit counts page tables and the like besides the process's resident set: a sixteenth is left for them.
    limited "$bin" run "$pack" --prompt "The quick brown fox" --raw --greedy --ignore-eos --max-tokens 6 --context 64 \
        --cpu-memory $((limit * 15 / 16))MiB --json --quiet >"$out/ours.json"
    "$python" - "$out/ours.json" <<'PY'
import json, sys
r = json.loads(open(sys.argv[1]).read().strip().splitlines()[-1])
p = r["paging"]
print(f'{r["timings"]["decode_s"] / (len(r["token_ids"]) - 1):.3f}', p["disk_bytes_per_pass"], p["resident_cpu_bytes"],
      f'{p["disk_gb_per_s"]:.2f}', p["peak_memory_bytes"], f'{p["percent_of_bound"]:.1f}', sep="\t")
PY
}
theirs() {
    cold
    limited "$python" "$here/peer_transformers.py" "$checkpoint" "$out/offload" 8 4 >"$out/theirs.json" 2>"$out/theirs.err" ||
        { tail -3 "$out/theirs.err" >&2; echo "failed	0"; return; }
    "$python" -c 'import json,sys; r=json.loads(open(sys.argv[1]).read().strip().splitlines()[-1]); print(round(r["s_per_token"],3), r["bytes_per_token"], sep="\t")' "$out/theirs.json"
}
printf 'pair\twho\ts_per_token\tbytes_per_token\tresident\tdisk_gb_per_s\tpeak_bytes\tpercent_of_bound\n'
i=0
while [ $i -lt "$pairs" ]; do
    i=$((i + 1))
    if [ $((i % 2)) = 1 ]; then order="ours theirs"; else order="theirs ours"; fi
    for who in $order; do printf '%s\t%s\t%s\n' "$i" "$who" "$($who)"; done
done

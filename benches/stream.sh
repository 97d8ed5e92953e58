#!/usr/bin/env bash
# Decode from disk against fio on the same files, in pairs, so that a drifting disk fools nobody.
#
# usage: benches/stream.sh MODEL_DIR [PAIRS]      (needs fio, python3, a release build; MODEL_DIR larger than 1 GB)
# Each pair: fio reads the model's largest file (io_uring, O_DIRECT, the engine's block size and queue depth), then a decode
# with every unit on disk, packed and in place. The engine's rate is bytes a pass over the wall time of the pass.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 pairs=${2:-5} tokens=${3:-8}
tp=target/release/tensorpager
largest=$(ls -S "$model"/*.safetensors | head -1)
export TENSORPAGER_OFFLOAD_FOLDER=${TENSORPAGER_OFFLOAD_FOLDER:-offload_folder}

fio_rate() {
    fio --name=read --filename="$largest" --readonly --rw=read --bs=4M --iodepth=32 --direct=1 --ioengine=io_uring \
        --iomem=mmaphuge --runtime=6 --time_based --output-format=json 2>/dev/null |
        python3 -c 'import json,sys; print(json.load(sys.stdin)["jobs"][0]["read"]["bw_bytes"]/1e9)' 2>/dev/null ||
    fio --name=read --filename="$largest" --readonly --rw=read --bs=4M --iodepth=32 --direct=1 --ioengine=io_uring \
        --runtime=6 --time_based --output-format=json |
        python3 -c 'import json,sys; print(json.load(sys.stdin)["jobs"][0]["read"]["bw_bytes"]/1e9)'
}

ours() { # extra flags
    "$tp" run "$model" --prompt x --raw --greedy --ignore-eos -n "$tokens" --device-map disk --json -q "$@" | python3 -c '
import json,sys
r = json.load(sys.stdin); p, t = r["paging"], r["timings"]
rate = p["disk_bytes_per_pass"] * p["passes"] / t["decode_s"] / 1e9
print(rate, p["compute_s"] / p["passes"], p["percent_of_bound"], p["peak_memory_bytes"] / 1e6)'
}

ours >/dev/null # packs, warms nothing: reads are direct
echo "pair  fio GB/s  packed GB/s  ratio  in-place GB/s  in-place/packed"
for i in $(seq "$pairs"); do
    f=$(fio_rate); p=$(ours); q=$(ours --in-place)
    python3 - "$i" "$f" "$p" "$q" <<'PY'
import sys
i, f, p, q = sys.argv[1], float(sys.argv[2]), sys.argv[3].split(), sys.argv[4].split()
print(f"{i:>4}  {f:8.2f}  {float(p[0]):11.2f}  {float(p[0])/f:5.2f}  {float(q[0]):13.2f}  {float(q[0])/float(p[0]):15.3f}")
PY
done

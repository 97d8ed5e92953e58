#!/usr/bin/env bash
# Throughput of `batch`, from disk and from RAM in pairs.
#   benches/batch.sh curve TENSORPAGER MODEL [more options]          tokens/s at 1, 8, 64 and 256 sequences (POINTS) beside the
#                                                                     bound; NEW tokens a sequence
#   benches/batch.sh job TENSORPAGER MODEL ROWS.jsonl [more options]  a job with every unit on disk
#   benches/batch.sh rows N VOCAB > ROWS.jsonl                        N rows of 32 random tokens in, 64 out
# Run `bench io MODEL` once before: without the disk's best rate there is no bound.
set -euo pipefail

# field NAME < one JSON object: the first number or string of that name.
field() { grep -o "\"$1\":[^,}]*" | head -1 | cut -d: -f2- | tr -d '"'; }

# Passes enough at each point: prompts are short, so that decode passes dominate.
curve() {
  local tp=$1 model=$2; shift 2
  echo "sequences  weights  tokens/s out  through  passes  s a pass  GB/s  waiting  % of bound"
  for n in ${POINTS:-1 8 64 256}; do
    for map in disk cpu; do
      json=$("$tp" batch "$model" --bench "$n" --max-sequences "$n" --input-len 4 --output-len "${NEW:-12}" \
        --device-map "$map" --json --quiet "$@" | tail -1)
      get() { field "$1" <<<"$json"; }
      awk -v n="$n" -v map="$map" -v out="$(get output_tokens_per_s)" -v all="$(get total_tokens_per_s)" \
        -v passes="$(get passes)" -v s="$(get decode_s)" -v rate="$(get disk_gb_per_s)" -v stall="$(get stall_s)" \
        -v bound="$(get percent_of_bound)" -v hash="$(get tokens_hash)" 'BEGIN {
          printf "%9d  %7s  %12.2f  %7.1f  %6d  %8.2f  %4.2f  %6.0f%%  %s  %s\n",
            n, map, out, all, passes, s / passes, rate, 100 * stall / s, bound, hash }'
    done
  done
}

job() {
  local tp=$1 model=$2 rows=$3; shift 3
  local out; out=$(mktemp -d)
  "$tp" batch "$model" -i "$rows" -o "$out/answers.jsonl" --device-map disk --progress plain --json "$@"
  rm -r "$out"
}

rows() {
  awk -v n="$1" -v vocab="$2" 'BEGIN { srand(1); for (i = 0; i < n; i++) {
    printf "{\"custom_id\":\"row-%d\",\"url\":\"/v1/completions\",\"body\":{\"prompt\":[", i
    for (k = 0; k < 32; k++) printf "%s%d", (k ? "," : ""), int(rand() * vocab)
    print "],\"max_tokens\":64,\"temperature\":0,\"ignore_eos\":true}}" } }'
}

case ${1:-} in
  curve | job | rows) "$@" ;;
  *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# Hours of what the test suite samples in minutes, from new seeds each round.
#   tests/soak.sh 8             eight hours; stops at the first failure and prints its end, seed included
#   tests/soak.sh 10m           ten minutes
#   tests/soak.sh 0             one round
#   tests/soak.sh 0 sim fuzz    one round of these parts alone: sim fuzz loom flips crash planted
# Needs root, loop devices and strace for the crash points and power cuts; what cannot be done is skipped and said.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never RUST_BACKTRACE=0
case "${1:-1}" in
*m) end=$((SECONDS + ${1%m} * 60)) ;;
*) end=$((SECONDS + ${1:-1} * 3600)) ;;
esac
[ $# = 0 ] || shift
parts=" ${*:-sim fuzz loom flips crash planted} "
seed=${SOAK_SEED:-$(($(date +%s) * 1000))}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# A part's lines of figures, or the end of what it said where it failed. Nothing where it is not asked for, or time is over.
part() { # name, command
    local name=$1 began=$SECONDS
    shift
    case "$parts" in *" $name "*) ;; *) return 0 ;; esac
    if ! "$@" >"$log" 2>&1; then
        tail -40 "$log"
        echo "== $name failed, round from seed $seed"
        exit 1
    fi
    grep -E 'skipped|crash points|power cuts|seeds from|executions|inputs from|flips caught|caught by|control' "$log" || true
    echo "== $name: $((SECONDS - began)) s"
}
tests() { cargo test --release "$@"; }
sim() { SIM_SEED=$seed SIM_COUNT=${SIM_COUNT:-20000} tests --lib seeded_worlds -- --nocapture; }
fuzz() { FUZZ_SEED=$seed FUZZ_EXECUTIONS=${FUZZ_EXECUTIONS:-50000} tests --lib every_parser_answers -- --nocapture; }
loom() { LOOM_PREEMPTIONS=${LOOM_PREEMPTIONS:-3} tests --lib two_and_three_slots -- --nocapture; }
flips() { FLIPS=${FLIPS:-2000} FLIP_SEED=$seed tests --test verified every_single -- --nocapture; }
crash() { CRASH_EVERY=${CRASH_EVERY:-1} CUT_ROUNDS=${CUT_ROUNDS:-20} tests --test crash -- --nocapture --test-threads=1; }

# What the parts run; planted bugs are a build of their own.
cargo test --release --no-run --lib --test verified --test crash
while :; do
    echo "== round from seed $seed, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo '?')"
    part sim sim
    part fuzz fuzz
    part loom loom
    part flips flips
    part crash crash
    part planted tests/planted.sh
    seed=$((seed + 1000000))
    [ $SECONDS -lt $end ] || break
done
echo "== done after $((SECONDS / 60)) minutes"

#!/usr/bin/env bash
# Hours of what the test suite samples in minutes, from new seeds each round.
#   tests/soak.sh 8             eight hours; stops at the first failure, whose seed is in the last lines
#   tests/soak.sh 0             one round
# Needs root, loop devices and strace for the crash points and power cuts; what cannot be done is skipped and said.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never
end=$((SECONDS + ${1:-1} * 3600))
seed=$(($(date +%s) * 1000))
only() { sed -n 's/^test .* \.\.\. ok$//; /skipped\|crash points\|power cuts\|seeds from\|executions\|inputs from\|flips caught\|survived/p'; }

cargo test --release --no-run
while :; do
    echo "== round from seed $seed, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo '?')"
    SIM_SEED=$seed SIM_COUNT="${SIM_COUNT:-20000}" cargo test --release --lib seeded_worlds -- --nocapture 2>&1 | only
    FUZZ_SEED=$seed FUZZ_EXECUTIONS="${FUZZ_EXECUTIONS:-50000}" cargo test --release --lib every_parser_answers -- --nocapture 2>&1 | only
    LOOM_PREEMPTIONS="${LOOM_PREEMPTIONS:-3}" cargo test --release --lib two_and_three_slots -- --nocapture 2>&1 | only
    FLIPS="${FLIPS:-2000}" FLIP_SEED=$seed cargo test --release --test verified every_single -- --nocapture 2>&1 | only
    CRASH_EVERY="${CRASH_EVERY:-1}" CUT_ROUNDS="${CUT_ROUNDS:-20}" cargo test --release --test crash -- --nocapture --test-threads=1 2>&1 | only
    [ "${PLANTED:-1}" = 0 ] || tests/planted.sh
    seed=$((seed + 1000000))
    [ $SECONDS -lt $end ] || break
done
echo "== done after $((SECONDS / 60)) minutes"

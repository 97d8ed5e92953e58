#!/usr/bin/env bash
# Plants one bug after the other (src/planted.rs) and says which test caught it. Exit status 1 where one is not caught.
#   tests/planted.sh            all of them, after the control: without a bug the same tests pass
#   tests/planted.sh 6 13       these
#   tests/planted.sh control    the control alone
# Each bug has the test that is expected to catch it; where that one does not, all suites are run.
set -uo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never RUST_BACKTRACE=0 RUST_TEST_THREADS="${RUST_TEST_THREADS:-2}"
# What fails because of a planted bug is no case to keep.
export PROPTEST_DISABLE_FAILURE_PERSISTENCE=true
LIMIT_S=900

# number | what is wrong | test target | filter | variables that the test takes
BUGS='
1|weight files of a pack are not synced|--test crash|every_file_is_synced
2|the manifest is written before the weights are synced|--test store_faults|a_crash_at_any_step
3|names made in a folder are not synced|--test crash|a_finished_pack_survives
4|the last block of a unit is not read|--lib|paging::
5|tensors are looked for one element behind their place|--lib|paging::slot
6|a slot is free again as soon as it is handed out|--lib|two_and_three_slots
7|a unit is handed out before its last read is over|--lib|paging::pager::sim
8|EIO counts as a finished read|--test readers|a_bad_sector
9|a short read counts as a whole one|--lib|io::flights
10|blocks are compared with the checksum of another block|--test verified|a_block_in_the_wrong_place
11|a block that does not match twice is taken|--test paging_faults|a_flipped_byte_on_disk
12|embedding rows are not verified|--test paging_faults|a_flipped_byte_on_disk
13|a torn row of results is trusted|--lib|jobs::tests::a_torn_end
14|results are not synced before they count|--test crash|rows_told_as_finished
15|a row that could not be written stays half written|--test batch|a_full_disk
16|a KV block of two sequences is written without a copy|--lib|model::kv
17|positions are one too far where a sequence goes on|--test identity|tokens_do_not_depend
18|a draw depends on the draws before it|--lib|text::sampler
19|units that rest in RAM are read from disk|--test verified|a_pass_reads
20|nothing is read ahead across the end of a pass|--test verified|a_pass_reads
21|a link may lead out of the folder|--lib|checkpoint::tests::folders
22|a source that changed while it was packed is not noticed|--test store_faults|a_source_that_changes
23|a second packer does not wait for the first|--test store_faults|two_packers
24|a file that ends too early is filled up with rubbish|--lib|io::flights
25|tensors of a header may overlap|--lib|checkpoint::tests::headers
26|a read is counted for another unit|--lib|paging::pager::sim
27|a failed write of a pack is ignored|--test store_faults|an_error_at_any_step
28|a failed write of results is ignored|--test crash|a_job_survives|CRASH_CALLS=pwrite64 CRASH_EVERY=1
'
SUITES='--lib|
--test readers|
--test verified|
--test paging_faults|
--test store_faults|
--test store_roundtrip|
--test store_upkeep|
--test forward|
--test identity|
--test batch|
--test crash|'

# Names of the tests that failed, or why the run ended otherwise. Status 0: all passed.
run() { # bug, target, filter, variables
    local out status
    # shellcheck disable=SC2086
    out=$(env ${4:-} PLANTED_BUG=$1 timeout $LIMIT_S cargo test --release --features testing $2 -- $3 2>&1)
    status=$?
    if [ $status = 0 ]; then
        grep -q '[1-9][0-9]* passed' <<<"$out" || { echo "nothing was run"; return 3; }
        return 0
    fi
    [ $status = 124 ] && { echo "no end within $LIMIT_S s"; return 1; }
    grep -q '^test result: FAILED' <<<"$out" || { tail -3 <<<"$out" | tr '\n' ' '; return 3; }
    grep -E '^test .* FAILED$' <<<"$out" | sed 's/^test \(.*\) \.\.\. FAILED$/\1/' | head -3 | paste -sd ' '
    return 1
}

missed=0
tried=0
control() {
    local seen="" target filter said
    while IFS='|' read -r _ _ target filter variables; do
        [ -n "$target" ] || continue
        case "$seen" in *"<$target|$filter>"*) continue ;; esac
        seen="$seen<$target|$filter>"
        said=$(run 0 "$target" "$filter" "$variables") || { echo "control: without a bug $target $filter fails: $said"; exit 1; }
    done <<<"$BUGS"
    echo "control: without a bug these tests pass"
}

[ $# = 0 ] && control
[ "$*" = control ] && { control; exit; }
while IFS='|' read -r number what target filter variables; do
    [ -n "$number" ] || continue
    if [ $# -gt 0 ]; then
        case " $* " in *" $number "*) ;; *) continue ;; esac
    fi
    tried=$((tried + 1))
    said=$(run "$number" "$target" "$filter" "$variables")
    status=$?
    if [ $status = 0 ]; then
        while IFS='|' read -r target filter; do
            said=$(run "$number" "$target" "$filter")
            status=$?
            [ $status = 1 ] && break
        done <<<"$SUITES"
    fi
    if [ $status = 1 ]; then
        printf '%2d  %s: caught by %s (%s)\n' "$number" "$what" "$said" "${target#--}"
    else
        printf '%2d  %s: NOT CAUGHT %s\n' "$number" "$what" "$said"
        missed=$((missed + 1))
    fi
done <<<"$BUGS"
echo "$((tried - missed)) of $tried planted bugs caught"
[ $missed = 0 ]

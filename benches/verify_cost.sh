#!/usr/bin/env bash
# What verifying every byte costs: pairs of runs with every unit on disk, `--verify always` beside `--verify never`, the order
# changing from pair to pair. Prints tokens/s and processor time of each run, and the ratios. Run it alone on the machine, with the
# disk held at one rate: a drift of the disk is larger than what is looked for.
#   benches/steady_disk.sh 1.5 ./offload_folder benches/verify_cost.sh MODEL [PAIRS] [TOKENS]
set -euo pipefail
export VERIFY_COST_MODEL=$1 VERIFY_COST_PAIRS=${2:-5} VERIFY_COST_TOKENS=${3:-6}
export TENSORPAGER=${TENSORPAGER:-target/release/tensorpager}
"$TENSORPAGER" pack "$1" >/dev/null
exec python3 - <<'EOF'
import json, os, resource, statistics, subprocess, sys

model, tokens = os.environ["VERIFY_COST_MODEL"], os.environ["VERIFY_COST_TOKENS"]


def one(verify):
    def cpu():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu()
    command = [os.environ["TENSORPAGER"], "run", model, "--device", "cpu", "--device-map", "disk", "--verify", verify, "--raw", "-p", "The sea", "-n", tokens, "--ignore-eos", "--greedy", "--json", "-q"]
    run = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
    paging = run["paging"]
    assert paging["verify"] == verify, paging["verify"]
    return run["timings"]["output_tokens_per_s"], paging["disk_gb_per_s"], cpu() - before, paging["disk_bytes"] / 1e9


ratios, processor = [], []
for pair in range(int(os.environ["VERIFY_COST_PAIRS"])):
    order = ["always", "never"] if pair % 2 else ["never", "always"]
    got = {verify: one(verify) for verify in order}
    (a, rate, cpu, _), (n, bare_rate, bare_cpu, gigabytes) = got["always"], got["never"]
    ratios.append(a / n)
    processor.append(cpu - bare_cpu)
    print(f"always {a:.4f} tokens/s at {rate:.3f} GB/s, {cpu:.2f} s of processor   never {n:.4f} at {bare_rate:.3f}, {bare_cpu:.2f} s   ratio {a / n:.4f}", flush=True)
print(f"median ratio {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) of {len(ratios)} pairs; {statistics.median(processor):+.2f} s of processor a run that reads {gigabytes:.1f} GB while decoding")
EOF

#!/usr/bin/env bash
# Gathers the GPU suite into a folder that runs on a Linux machine with an NVIDIA driver and nothing else:
#     gpu/bundle.sh [FOLDER]        (default target/gpu-suite)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-suite}
# With nvcc at hand, or in kernels/check.py's virtual environment, the kernels are there as machine code too.
venv=${TENSORPAGER_NVCC_VENV:-target/nvcc-venv}
if [ -z "${NVCC:-}" ] && ! command -v nvcc >/dev/null; then
  found=$(compgen -G "$venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc" | head -1 || true)
  [ -z "$found" ] || export NVCC=$(realpath "$found") TENSORPAGER_REQUIRE_NVCC=1
fi
cargo build --release --bin tensorpager --example gpu_suite
built=${CARGO_TARGET_DIR:-target}/release
rm -rf "$out"
mkdir -p "$out/fixtures"
strip -o "$out/tensorpager" "$built/tensorpager"
strip -o "$out/gpu_suite" "$built/examples/gpu_suite"
for fixture in tests/fixtures/*/; do
  [ -f "$fixture/golden.json" ] && cp -r "$fixture" "$out/fixtures/"
done
cp gpu/accelerate_decode.py gpu/README.md LICENSE "$out/"
cat >"$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs the GPU suite where it lies; see README.md.
here=$(cd "$(dirname "$0")" && pwd)
# Where a toolkit has cublasLt, for those products beside ours.
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64
exec "$here/gpu_suite" --out "$PWD/gpu-suite-$(date +%F).md" "$@"
RUN
chmod +x "$out/run.sh"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "unknown C library")
changes=$(git status --porcelain 2>/dev/null | wc -l)
echo "Built of commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$([ "$changes" = 0 ] || echo ', with changes'), wants $libc or newer." >"$out/build.txt"
size=$(du -sm "$out" | cut -f1)
[ "$size" -lt 60 ] || { echo "bundle.sh: $out has $size MB, more than 60" >&2; exit 1; }
echo "$out: $size MB; copy it and run ./run.sh there"

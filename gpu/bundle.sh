#!/usr/bin/env bash
# Gathers the GPU suite into a folder that runs on a Linux machine with an NVIDIA driver and nothing else:
#     gpu/bundle.sh [--nvcc] [FOLDER]        (default target/gpu-suite)
# With --nvcc the kernels are there as machine code too, not only as PTX that the driver compiles: of the nvcc at hand, or of that in
# kernels/check.py's virtual environment. That takes minutes more.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=
[ "${1:-}" != --nvcc ] || { nvcc=1; shift; }
out=${1:-target/gpu-suite}
if [ -n "$nvcc" ]; then
  venv=${TENSORPAGER_NVCC_VENV:-target/nvcc-venv}
  if [ -z "${NVCC:-}" ] && ! command -v nvcc >/dev/null; then
    found=$(compgen -G "$venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc" | head -1 || true)
    [ -z "$found" ] || export NVCC=$(realpath "$found")
  fi
  # Without one the build says where it looked.
  export TENSORPAGER_REQUIRE_NVCC=1
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
# Where a toolkit has cublasLt, for those products beside ours. A Python's packages bring their own: it gets the caller's path.
export TENSORPAGER_CALLERS_LIBRARY_PATH=${LD_LIBRARY_PATH-}
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64
# A driver call that never returns is ended from outside, a little after the suite would end by itself.
minutes=9.5 before=
for argument; do
  [ "$before" != --minutes ] || minutes=$argument
  before=$argument
done
whole=${minutes%%.*}
part=${minutes#"$whole"}
part=${part#.}00
limit=$((10#0$whole * 60 + 10#${part:0:2} * 60 / 100 + 25)) || exit 2
ended=()
! command -v timeout >/dev/null || ended=(timeout --foreground -k 5 "$limit")
exec "${ended[@]}" "$here/gpu_suite" --out "$PWD/gpu-suite-$(date +%F).md" "$@"
RUN
chmod +x "$out/run.sh"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "unknown C library")
changes=$(git status --porcelain 2>/dev/null | wc -l)
echo "Built of commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$([ "$changes" = 0 ] || echo ', with changes'), wants $libc or newer." >"$out/build.txt"
size=$(du -sm "$out" | cut -f1)
# Both programs have the machine code.
most=$((${nvcc:-0} ? 100 : 60))
[ "$size" -lt "$most" ] || { echo "bundle.sh: $out has $size MB, more than $most" >&2; exit 1; }
echo "$out: $size MB; copy it and run ./run.sh there"

#!/usr/bin/env bash
# Builds the emulated CUDA driver, for tests only: OUT/libcuda.so.1 and libcuda.so, and OUT/cublaslt/libcublasLt.so.12 on top of it.
#     kernels/emu/driver/build.sh OUT [--asan] [--without SYMBOL]... [--selftest]
# --asan builds all of it under AddressSanitizer (into a folder of its own); who loads that needs its runtime first: OUT/preload names it.
# --without SYMBOL also makes OUT/without-SYMBOL/libcuda.so.1, which lacks that function as an old driver would; --selftest makes
# OUT/selftest and runs it.
# Where there is no C++ compiler it says so on stderr and exits with 77. What is newer than its sources is left alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
cxx=${CXX:-g++}
command -v "$cxx" >/dev/null || { echo "no C++ compiler ($cxx): the emulated CUDA driver cannot be built" >&2; exit 77; }
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "the emulated CUDA driver is for x86-64 Linux, this is $(uname -sm)" >&2; exit 77; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/lock"
flock 9  # several tests may ask at once

sources=(engine entry entry_memory entry_stream memory queue state table)
flags=(-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -DTP_EMULATE -Wall -Wextra -Wno-unknown-pragmas "-I$out/work")
checked=()
if [ "${1:-}" = --asan ]; then
  shift
  checked=(-fsanitize=address)
  flags+=("${checked[@]}" -fno-omit-frame-pointer)
  echo 'int main() {}' | "$cxx" "${checked[@]}" -x c++ - -o /dev/null 2>/dev/null ||
    { echo "$cxx has no AddressSanitizer: the emulated CUDA driver cannot be built under it" >&2; exit 77; }
else
  flags+=(-DEMU_PLAIN)
fi

compile() { "$cxx" "${flags[@]}" "${@:3}" -c "$1" -o "$out/work/$2.o"; }

# link FOLDER [SYMBOL left out]
link() {
  mkdir -p "$1"
  printf '{ global: cu*; local: %s*; };\n' "${2:+$2; }" >"$out/work/exports.map"
  "$cxx" -shared "${checked[@]}" -Wl,-soname,libcuda.so.1 "-Wl,--version-script=$out/work/exports.map" "$out"/objects/*.o -o "$out/work/libcuda.so.1" -lpthread
  mv "$out/work/libcuda.so.1" "$1/libcuda.so.1"
  ln -sf libcuda.so.1 "$1/libcuda.so"
}

rm -rf "$out/work"
mkdir "$out/work"
trap 'rm -rf "$out/work"' EXIT
if [ ! -f "$out/libcuda.so.1" ] || [ -n "$(find "$here/../.." -type f -not -path '*/ptx/*' -not -name '*.md' -newer "$out/libcuda.so.1")" ]; then
  rm -rf "$out/objects" "$out/selftest" "$out"/without-*
  sed -nE 's/^    "([a-z0-9_]+)": (\{"module".*\})[,]?$/KERNEL(\1, R"json(\2)json")/p' "$here/../../launch.json" >"$out/work/launch_table.inc"
  [ -s "$out/work/launch_table.inc" ] || { echo "build.sh: launch.json lists no kernel" >&2; exit 1; }
  compile "$here/table_half.cpp" table_bf16 &
  other=$!
  compile "$here/table_half.cpp" table_f16 -DTP_F16
  wait $other
  for source in "${sources[@]}"; do
    case $source in
      # It switches stacks, and asks the sanitizer where that matters.
      engine) compile "$here/../engine.cpp" engine -fno-sanitize=address ;;
      # It looks at what it has poisoned.
      memory) compile "$here/memory.cpp" memory -fno-sanitize=address ;;
      *) compile "$here/$source.cpp" "$source" ;;
    esac
  done
  rm -f "$out/work/launch_table.inc"
  mkdir "$out/objects"
  mv "$out"/work/*.o "$out/objects"
  link "$out"
  mkdir -p "$out/cublaslt"
  "$cxx" -std=c++17 -O2 -g1 -fPIC -Wall -Wextra -shared "${checked[@]}" -Wl,-soname,libcublasLt.so.12 "$here/cublaslt.cpp" "-L$out" -lcuda -o "$out/cublaslt/libcublasLt.so.12"
  [ ${#checked[@]} = 0 ] || ldd "$out/libcuda.so.1" | awk '/libasan/ { print $3 }' >"$out/preload"
fi
while [ $# -gt 0 ]; do
  case $1 in
    --without)
      [ -f "$out/without-$2/libcuda.so.1" ] || link "$out/without-$2" "$2"
      shift 2
      ;;
    --selftest)
      [ -f "$out/selftest" ] ||
        "$cxx" -std=c++17 -O1 -g1 -Wall -Wextra "${checked[@]}" "$here/selftest.cpp" -o "$out/selftest" "-L$out" -lcuda "-Wl,-rpath,$out" -lpthread
      flock -u 9
      ASAN_OPTIONS=detect_leaks=0 "$out/selftest" "$here/../../ptx"
      shift
      ;;
    *)
      echo "build.sh: what is $1?" >&2
      exit 2
      ;;
  esac
done

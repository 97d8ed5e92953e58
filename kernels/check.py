#!/usr/bin/env python3
"""Checks the CUDA kernels on a machine without a GPU or a toolkit.

    kernels/check.py [--venv DIR] [--write] [compile] [ptx] [launch] [emulate] [driver]     (all by default)

compile  nvcc 13.0 builds every kernel for every architecture and 16-bit type; no kernel may spill or need a stack
ptx      NVRTC 12.2 makes kernels/ptx/*.ptx (compute_80, PTX ISA 8.2) again and compares; --write replaces them;
         ptxas 12.2 assembles them for sm_90, as an old driver would, under the same resource check
launch   launch.json agrees with the kernels' sources, with the PTX and with the emulation's table
emulate  g++ builds the same sources as C++ under AddressSanitizer; every kernel against a double precision reference, also with
         mma.sync truncating as tensor cores do; then every barrier, wait and bound switched off in turn: the tests must fail each time
driver   the emulated CUDA driver (emu/driver) keeps and notices what it promises
DIR (or TENSORPAGER_NVCC_VENV, or target/nvcc-venv) is a Python virtual environment; the pinned compilers are installed into it.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Those that a build with nvcc makes machine code for, and from the same virtual architectures.
ARCHITECTURES = re.findall(r'"(\d+)"', re.search(r"const ARCHITECTURES.*?= \[(.*?)\];", (HERE.parent / "build.rs").read_text())[1])
HALVES = {"bf16": [], "f16": ["-DTP_F16"]}
PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvrtc-cu12==12.2.140",
    "nvidia-cuda-nvcc-cu12==12.2.140",
]
# One rounding per operation, wherever the sources do not say fma: the same bits in every kernel that shares the arithmetic.
OPTIONS = ["-std=c++17", "-fmad=false"]
CHECKS = ["compile", "ptx", "launch", "emulate", "driver"]


class Failed(Exception):
    pass


def run(command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def in_parallel(work, items):
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        return list(pool.map(work, items))


def sources():
    return sorted(p.stem for p in HERE.glob("*.cu"))


def modules():
    """(source, head size or None, 16-bit type) of every PTX file, slow ones first."""
    found = []
    for name in sources():
        sizes = re.findall(r"^#if TP_HEAD_SIZE == 0 \|\| TP_HEAD_SIZE == (\d+)$", (HERE / f"{name}.cu").read_text(), re.M)
        found += [(name, size, half) for size in sizes or [None] for half in HALVES]
    return sorted(found, key=lambda m: (m[0] != "linear", m[1] is None, m))


def module_name(name, size, half):
    return "_".join([name, *([f"h{size}"] if size else []), half])


class Tools:
    """The compilers of the virtual environment, installed at the pinned versions where missing."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not list(self.folder.glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc")) or not self.packages("cuda_nvrtc/lib"):
            print(f"installing the compilers into {self.folder}")
            venv.create(self.folder, with_pip=True)
            run([self.folder / "bin/python", "-m", "pip", "install", "-q", *PACKAGES])
        self.nvcc = self.one("cu13/bin/nvcc")
        self.ptxas = self.one("cuda_nvcc/bin/ptxas")
        library = self.one("cuda_nvrtc/lib/libnvrtc.so.12")
        ctypes.CDLL(str(library.parent / "libnvrtc-builtins.so.12.2"), mode=ctypes.RTLD_GLOBAL)
        self.nvrtc = ctypes.CDLL(str(library))

    def packages(self, path):
        return list(self.folder.glob(f"lib/python3*/site-packages/nvidia/{path}"))

    def one(self, path):
        found = self.packages(path)
        if not found:
            raise Failed(f"{self.folder} has no nvidia/{path}: delete the folder and run again")
        return found[0]

    def make_ptx(self, name, size, half):
        source = (HERE / f"{name}.cu").read_bytes()
        options = [o.encode() for o in [*OPTIONS, "--gpu-architecture=compute_80", f"-I{HERE}", *HALVES[half],
                                      *([f"-DTP_HEAD_SIZE={size}"] if size else [])]]  # fmt: skip
        program = ctypes.c_void_p()
        self.must(self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None))
        array = (ctypes.c_char_p * len(options))(*options)
        if self.nvrtc.nvrtcCompileProgram(program, len(options), array) != 0:
            raise Failed(f"{name} {half}: NVRTC: {self.text(program, 'ProgramLog')}")
        ptx = self.text(program, "PTX")
        self.must(self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
        return ptx

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.must(getattr(self.nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.must(getattr(self.nvrtc, f"nvrtcGet{what}")(program, buffer))
        return buffer.value.decode()

    @staticmethod
    def must(code):
        if code != 0:
            raise Failed(f"NVRTC returned error {code}")


REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def resources(log):
    """[(kernel, architecture, registers, what is wrong or None)] of a ptxas report: no stack frame, no spill."""
    found = []
    for kernel, architecture, stack, stores, loads, registers in REPORT.findall(log):
        wrong = f"{kernel} for sm_{architecture}: {stack} bytes of stack, {stores} spilled, {loads} reloaded"
        found.append((kernel, architecture, int(registers), wrong if int(stack) or int(stores) or int(loads) else None))
    return found


def all_well(rows):
    """The rows of several reports; fails with everything that is wrong in them."""
    rows = [row for report in rows for row in report]
    wrong = sorted(row[3] for row in rows if row[3])
    if wrong:
        raise Failed("\n       ".join(wrong))
    return rows


def check_compile(tools, _write):
    def build(module):
        name, half = module
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]  # as build.rs does
        with tempfile.TemporaryDirectory() as out:
            log = run([tools.nvcc, *OPTIONS, "-O3", *HALVES[half], *targets, "-Xptxas", "-v", "-fatbin",
                       "-o", f"{out}/x.fatbin", HERE / f"{name}.cu"])  # fmt: skip
        if "warning" in log:
            raise Failed(f"{name} {half}: {log}")
        return resources(log)

    rows = all_well(in_parallel(build, dict.fromkeys((name, half) for name, _, half in modules())))
    table = {}
    for kernel, architecture, registers, _ in rows:
        table.setdefault(kernel, {})[architecture] = registers
    print(f"registers            {' '.join(f'sm_{a:<4}' for a in ARCHITECTURES)}")
    for kernel, by in sorted(table.items()):
        if len(by) != len(ARCHITECTURES):
            raise Failed(f"{kernel} was reported for {sorted(by)} only")
        if kernel.endswith("_bf16"):
            print(f"  {kernel:32s} {' '.join(f'{by[a]:<7}' for a in ARCHITECTURES)}")
    print(f"ok   {len(table)} kernels for {len(ARCHITECTURES)} architectures, no spill, no stack")


def check_ptx(tools, write):
    (HERE / "ptx").mkdir(exist_ok=True)
    wanted = []
    for module in modules():
        name, ptx, path = module[0], tools.make_ptx(*module), HERE / "ptx" / f"{module_name(*module)}.ptx"
        wanted.append(path)
        if write:
            path.write_text(ptx)
        elif not path.exists() or path.read_text() != ptx:
            raise Failed(f"{path.name} is not what {name}.cu gives: run kernels/check.py --write ptx")
    extra = set((HERE / "ptx").glob("*.ptx")) - set(wanted)
    if extra:
        raise Failed(f"no source makes {sorted(p.name for p in extra)}: delete them")

    def assemble(path):
        return resources(run([tools.ptxas, "-v", "-arch=sm_90", "-o", "/dev/null", path]))

    count = len(all_well(in_parallel(assemble, wanted)))
    size = sum(p.stat().st_size for p in wanted)
    print(f"ok   {len(wanted)} PTX files, {size >> 10} KiB, as committed; {count} kernels assembled by ptxas 12.2, no spill")


def signatures(name):
    """{kernel: [[argument, C type], ...]} of a source file; kernels made by a macro included."""
    text = re.sub(r"//[^\n]*", "", (HERE / f"{name}.cu").read_text()).replace("\\\n", "\n")
    found = {}
    for match in re.finditer(r"(#define (\w+)\((\w+)[^)]*\)\s*)?extern \"C\" __global__.*?TP_KERNEL\((\w+)\)\(([^)]*)\)", text, re.S):
        arguments = []
        for argument in match[5].split(","):
            kind, argument_name = re.fullmatch(r"(.*?)(\w+)", " ".join(argument.split())).groups()
            arguments.append([argument_name, kind.strip()])
        names = re.findall(rf"^{match[2]}\((\w+),", text, re.M) if match[1] else [match[4]]
        found.update({n: arguments for n in names})
    return found


PTX_KINDS = {"int": "u32", "i64": "u64", "float": "f32"}


def check_launch_ptx(kernel, entry):
    """Argument kinds and number, in the PTX itself."""
    want = ["u64" if kind.endswith("*") else PTX_KINDS[kind] for _, kind in entry["args"]]
    for half in HALVES:
        text = (HERE / "ptx" / f"{entry['module']}_{half}.ptx").read_text()
        match = re.search(rf"\.entry {kernel}_{half}\((.*?)\)", text, re.S)
        got = re.findall(r"\.param \.(\w+)", match[1]) if match else None
        if got != want:
            raise Failed(f"launch.json: {kernel}_{half} takes {want}, its PTX {got}")


def check_launch(tools, write):
    path = HERE / "launch.json"
    launch = json.loads(path.read_text())
    table = {}
    for line in run([build_emulation(), "--launch-table"]).splitlines():
        kernel, block, shared = line.split()
        table[kernel] = {"block": int(block), "shared": int(shared)}
    split = {name for name, size, _ in modules() if size}
    kernels = {
        kernel: {"module": kernel if name in split else name, "args": args, **table[kernel]}
        for name in sources()
        for kernel, args in signatures(name).items()
    }
    if write:
        launch["kernels"] = {k: {**v, "grid": launch["kernels"].get(k, {}).get("grid")} for k, v in sorted(kernels.items())}
        path.write_text(dump_launch(launch))
    for kernel, entry in kernels.items():
        have = dict(launch["kernels"].get(kernel, {}))
        if not have.pop("grid", None):
            raise Failed(f"launch.json has no grid for {kernel}")
        if have != entry:
            raise Failed(f"launch.json: {kernel} is {have}, the source says {entry}: run kernels/check.py --write launch")
        check_launch_ptx(kernel, entry)
    if set(launch["kernels"]) != set(kernels):
        raise Failed(f"launch.json names kernels that are not there: {sorted(set(launch['kernels']) - set(kernels))}")
    print(f"ok   launch.json: {len(kernels)} kernels")


def dump_launch(launch):
    """One kernel a line."""
    lines = [f'    {json.dumps(k)}: {json.dumps(v)}' for k, v in launch["kernels"].items()]
    head = {k: v for k, v in launch.items() if k != "kernels"}
    return json.dumps(head, indent=2)[:-2] + ',\n  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"


FLAGS = ["-std=c++17", "-O2", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer", "-ffp-contract=off", "-DTP_EMULATE",
         "-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip


def build_emulation():
    out = HERE.parent / "target" / "emulate"
    out.mkdir(parents=True, exist_ok=True)
    inputs = [*HERE.glob("*.cu"), *HERE.glob("*.cuh"), *HERE.glob("emu/*")]
    program = out / "emulate"
    if program.exists() and program.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
        return program
    units = [(HERE / "emu/kernels.cpp", out / "kernels_bf16.o", []), (HERE / "emu/kernels.cpp", out / "kernels_f16.o", ["-DTP_F16"])]
    units += [(p, out / f"{p.stem}.o", []) for p in sorted(HERE.glob("emu/*.cpp")) if p.stem not in ("kernels", "engine")]
    units += [(HERE / "emu/engine.cpp", out / "engine.o", ["-fno-sanitize=address"])]
    compiler = os.environ.get("CXX", "g++")
    in_parallel(lambda u: run([compiler, *FLAGS, *u[2], "-c", u[0], "-o", u[1]]), units)
    run([compiler, *FLAGS, *[u[1] for u in units], "-o", program])
    return program


def check_emulate(_tools, _write):
    program = build_emulation()
    runs = [["--seed", "1"], ["--controls"], ["--seed", "1", "--truncate"]]
    tests, controls, truncated = in_parallel(lambda arguments: run([program, *arguments]), runs)
    print(tests, end="")
    print(f"ok   {len(truncated.splitlines())} tests where mma.sync truncates")
    print(f"ok   {controls.splitlines()[-1]}")


def check_driver(_tools, _write):
    report = run([HERE / "emu/driver/build.sh", HERE.parent / "target" / "emulated-driver", "--selftest"])
    print(f"ok   emulated driver: {len(re.findall('^ok', report, re.M))} cases")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=os.environ.get("TENSORPAGER_NVCC_VENV", HERE.parent / "target" / "nvcc-venv"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS])
    arguments = parser.parse_args()
    checks = arguments.checks or CHECKS
    try:
        tools = None if set(checks) <= {"emulate", "driver"} else Tools(arguments.venv)
        for check in checks:
            start = time.monotonic()
            globals()[f"check_{check}"](tools, arguments.write)
            print(f"     {check}: {time.monotonic() - start:.0f} s", flush=True)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

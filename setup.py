"""Builds the native library of senet_kernels; all that is declarative is in pyproject.toml.

``SENET_KERNELS_BUILD`` decides what is built:
    ``auto`` (default)  the CPU kernels where torch and a C++ compiler are found, and the CUDA
                        kernels where nvcc is found too (no GPU needed). What cannot be built is
                        left out and installation succeeds: the package then has Triton and PyTorch.
    ``python``          nothing native.
    ``cpu``             the CPU kernels, or an error.
    ``cuda``            the CPU and the CUDA kernels, or an error.
``SENET_KERNELS_CXXFLAGS`` is appended to C++ compile and link flags.
``SENET_KERNELS_SANITIZE=address,undefined`` builds the CPU kernels for these sanitizers, which then
must be loaded before anything else: ``make sanitize`` builds and runs such a library.
``SENET_KERNELS_WERROR=1`` turns C++ warnings on and into errors.
``CXX``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS`` are as for every PyTorch extension.

All goes into one library, ``senet_kernels/_native.abi3.so``. It is no Python module: the package
loads it with ``torch.ops.load_library``. Only ``csrc/registration.cpp``, ``csrc/c_shims.cpp`` and
the two ``host.cpp`` include torch headers, and of these the stable ABI alone, so one build serves
torch 2.11 and later and every Python.
``senet_kernels/_build.json`` beside it records what was built, and why the rest was not.
"""

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

try:
    from setuptools.command.build import build as _build
except ImportError:  # before setuptools 62.4
    from distutils.command.build import build as _build

# What each mode insists on.
MODES = {"auto": (), "python": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}
MODE = os.environ.get("SENET_KERNELS_BUILD") or "auto"

ROOT = Path(__file__).resolve().parent
# Ninja runs in ROOT and sees relative paths, so no path of this machine gets into the library.
# pip uses another temporary folder each time; this one stays, so a rebuild finds its objects.
SANITIZE = os.environ.get("SENET_KERNELS_SANITIZE", "")
OBJECTS = Path("build", "-".join(["native", *SANITIZE.split(",")]) if SANITIZE else "native")
LIBRARY = OBJECTS / "_native.so"
# Compiled by nvcc. It hands a .cpp on to the C++ compiler, and says where CUDA's headers are.
CUDA_SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/*.cu"))
CUDA_SOURCES += [Path("csrc/cuda/device.cpp")] if CUDA_SOURCES else []
# Later GPUs compile the PTX at their first launch; name them to spare them that.
CUDA_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX"

# No -ffast-math: NaN and Inf must come out as they do in PyTorch.
CXX_FLAGS = ["-std=c++20", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
# Of -O3, what these kernels gain by: all of it takes half as long again to compile, for no more
# speed. clang has both in -O2, and says that it does not know the options.
CXX_FLAGS += ["-fpeel-loops", "-funswitch-loops", "-Wno-ignored-optimization-argument"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# Else chance decides where a hot loop begins, and with it up to a fifth of a kernel's time.
CXX_FLAGS += ["-falign-functions=64", "-falign-loops=64"]
if SANITIZE:
    # Later options win. Names in reports, and an end at the first: a test cannot pass by.
    CXX_FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    CXX_FLAGS.append("-DSENET_FEW_CASES=1")  # or it compiles for a quarter of an hour
# Restricts torch's headers to the stable ABI as of 2.11: any other use fails to compile.
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# csrc/cpu/kernels.cpp is compiled once for each of these, into a namespace of its own; which one
# runs is decided at run time. In ascending order, which matters (see `write_ninja_file`).
if platform.machine() == "aarch64":
    TORCH_FLAGS.append("-DSENET_ARM64=1")
    ISA_FLAGS = {
        "neon": ["-DSENET_ISA=neon"],
        "neon_bf16": ["-DSENET_ISA=neon_bf16", "-march=armv8.2-a+bf16"],
    }
else:
    ISA_FLAGS = {"baseline": ["-DSENET_ISA=baseline"]}
if platform.machine() == "x86_64":
    TORCH_FLAGS.append("-DSENET_X86=1")
    ISA_FLAGS["baseline"].append("-DSENET_FEW_CASES=1")  # almost every processor has AVX2
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    ISA_FLAGS["avx2"] = ["-DSENET_ISA=avx2", *avx2]
    # gcc 12 finds uninitialised variables in its own AVX-512 header (GCC bug 105593); ours are
    # checked in the other variants. The third flag is for clang, which does not know the second.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
    ISA_FLAGS["avx512"] = ["-DSENET_ISA=avx512", *avx2, *avx512, *quiet]


class BuildError(Exception):
    """Something cannot be built; the message says why."""


def say(message: str) -> None:
    print(f"senet_kernels: {message}", flush=True)


def find_cxx() -> list[str]:
    """The C++ compiler as the beginning of a command; empty where there is none."""
    if os.environ.get("CXX"):  # explicit: no other one takes its place
        candidates = [shlex.split(os.environ["CXX"])]
    else:
        candidates = [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if command and shutil.which(command[0])), [])


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):  # in an environment whose bin/ need not be on PATH
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else []


def find_nvcc() -> str | None:
    """CUDA_HOME's, else that on PATH, else that of the nvidia-cuda-nvcc wheel."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(f"{home}/bin/nvcc")
    wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    in_wheel = [str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvcc")]
    return shutil.which("nvcc") or next(iter(sorted(in_wheel)), None)


def torch_version() -> str | None:
    """That of the torch that the build sees, None without one. From its own file: distributions of
    torch may have other names, and importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    return str(runpy.run_path(str(Path(torch.origin).parent / "version.py"))["__version__"])


def why_no_cpu() -> str | None:
    """What stands in the way of the CPU kernels, and so of the whole library, as far as a look
    around can tell."""
    if MODE == "python":
        return "SENET_KERNELS_BUILD=python"
    if sys.platform != "linux":
        return f"native kernels are built on Linux only, and this is {sys.platform}"
    version = torch_version()
    if version is None:
        return (
            "the build does not see torch; install torch first, "
            "then this package with pip install --no-build-isolation"
        )
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        return f"torch {version} is older than 2.11"
    if not find_cxx():
        wanted = os.environ.get("CXX") or "c++, g++, clang++"
        return f"no C++ compiler found (looked for: {wanted}); set CXX to name one"
    if not find_ninja():
        return "ninja not found; pip install ninja"
    return None


def why_no_cuda() -> str | None:
    if MODE in ("python", "cpu"):
        return f"SENET_KERNELS_BUILD={MODE}"
    if SANITIZE:
        return f"SENET_KERNELS_SANITIZE={SANITIZE}"
    if not CUDA_SOURCES:
        return "this version has no CUDA kernels (csrc/cuda/*.cu)"
    if not find_nvcc():
        return "nvcc not found; set CUDA_HOME or PATH, or pip install nvidia-cuda-nvcc"
    return why_no_cpu()


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", output)
    return found[1] if found else "0.0"


def cuda_compile_flags(nvcc: str) -> list[str]:
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    if int(nvcc_version(nvcc).split(".")[0]) >= 13:
        # A third of the size. Every driver that runs CUDA 13 unpacks it, older ones do not.
        flags.append("--compress-mode=size")
    for arch in CUDA_ARCHITECTURES.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; expected 9.0 or 9.0+PTX, say")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_link_flags(nvcc: str) -> list[str]:
    """The CUDA runtime, linked statically: the library also loads where there is no CUDA."""
    # Only nvcc itself knows where its libraries are when it is a wrapper or came in a wheel.
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    output = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"^#\$ LIBRARIES=(.*)$", output, re.MULTILINE)
    folders = shlex.split(found[1]) if found else []
    # The one in a wheel names lib64, but has them in lib.
    folders.append(f"-L{Path(nvcc).resolve().parent.parent / 'lib'}")
    return [*folders, "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


def write_ninja_file(cxx: list[str], nvcc: str | None) -> Path:
    """Describe the build to ninja, which runs it in parallel and again only where needed."""
    from torch.utils.cpp_extension import include_paths, library_paths

    def quote(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    extra = shlex.split(os.environ.get("SENET_KERNELS_CXXFLAGS", ""))
    extra += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
    warnings = ["-Wall", "-Wextra", "-Werror"]
    cxx_flags = CXX_FLAGS + (warnings if os.environ.get("SENET_KERNELS_WERROR") == "1" else [])
    # As system headers, so that warnings concern our own code alone.
    torch_flags = TORCH_FLAGS + [f"-isystem{path}" for path in include_paths()]
    link_flags = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-Wl,-z,defs"]

    # (rule, source, object, flags), in the order in which they are linked. An inline function of a
    # standard header that several objects contain is taken from the first of them: it must be the
    # one compiled for the least instruction set, or a plain CPU would meet AVX-512 instructions.
    units = [("cxx", Path("csrc/registration.cpp"), "registration", torch_flags)]
    units.append(("cxx", Path("csrc/c_shims.cpp"), "c_shims", torch_flags))
    units.append(("cxx", Path("csrc/cpu/host.cpp"), "cpu_host", torch_flags))
    for isa, flags in ISA_FLAGS.items():
        units.append(("cxx", Path("csrc/cpu/kernels.cpp"), f"cpu_{isa}", flags))
    rules = f"""\
builddir = {OBJECTS}
rule cxx
  command = {quote(cxx + cxx_flags)} $flags {quote(extra)} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
"""
    if nvcc:
        torch_flags.append("-DSENET_CUDA=1")
        units.append(("cxx", Path("csrc/cuda/host.cpp"), "cuda_host", torch_flags))
        units.append(("cxx", Path("csrc/cuda/plan.cpp"), "cuda_plan", []))
        link_flags += cuda_link_flags(nvcc)
        units += [("nvcc", source, f"cuda_{source.stem}", []) for source in CUDA_SOURCES]
        host = cxx[-1]  # the last word of "ccache g++"
        command = [nvcc, *cuda_compile_flags(nvcc), "-ccbin", host]
        rules += f"""\
rule nvcc
  command = {quote(command)} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
"""
    rules += f"""\
rule link
  command = {quote(cxx)} -shared $in -o $out {quote(link_flags + extra)}
"""
    objects = ""
    for rule, source, name, flags in units:
        rules += f"build {OBJECTS / name}.o: {rule} {source}\n  flags = {quote(flags)}\n"
        objects += f" {OBJECTS / name}.o"
    rules += f"build {LIBRARY}: link{objects}\n"

    file = OBJECTS / "build.ninja"
    (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / file).write_text(rules)
    return file


def write_codes() -> None:
    """The table of pointwise functions as C++ knows it: its names and codes."""
    table = (ROOT / "senet_kernels" / "pointwise.py").read_text()
    row = r'^    "(\w+)": Pointwise\((\d+), (True|False), (True|False),'
    rows = re.findall(row, table, re.MULTILINE)
    lines = [
        "// Written by setup.py from the table in senet_kernels/pointwise.py.",
        "#pragma once",
        "",
        "namespace senet {",
        "",
        "enum class Fn : int {",
        *(f"  {name} = {code}," for name, code, *_ in rows),
        "};",
        f"constexpr Fn kLastFn = Fn::{max(rows, key=lambda row: int(row[1]))[0]};",
        "",
        "struct FnName {",
        "  const char* name;",
        "  Fn fn;",
        "  bool is_activation, is_gate;",
        "};",
        "constexpr FnName kFnNames[] = {",
        *(f'    {{"{n}", Fn::{n}, {a.lower()}, {g.lower()}}},' for n, _, a, g in rows),
        "};",
        "",
        "}  // namespace senet",
        "",
    ]
    header, text = ROOT / "csrc" / "pointwise_codes.h", "\n".join(lines)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def compile_library(cuda: bool) -> str:
    """Build LIBRARY; returns the compiler's version."""
    cxx = find_cxx()
    write_codes()
    try:
        version = subprocess.check_output([*cxx, "--version"], text=True).partition("\n")[0]
        file = write_ninja_file(cxx, find_nvcc() if cuda else None)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        raise BuildError(str(error)) from error
    command = [*find_ninja(), "-f", str(file)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    environment = os.environ | {"LC_ALL": "C"}  # messages that any terminal and JSON can show
    pipe, stdout = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=stdout, text=True, errors="replace"
    ) as process:
        output = [""]
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line.strip())
    if process.returncode:
        # The terminal has seen everything; the first error is worth recording.
        pattern = "error:|undefined reference"
        error = next((line for line in output if re.search(pattern, line)), output[-1])
        raise BuildError(f"compilation failed: {error}")
    return version


class build(_build):
    # build_ext runs even where there is nothing to compile: it also writes _build.json, and takes
    # away the library that an earlier build in place left.
    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else predicate)
        for name, predicate in _build.sub_commands
    ]


class build_ext(_build_ext):
    """Compiles the library with ninja, and puts it and the record of the build into the package."""

    products: tuple[str, ...] = ()

    def run(self) -> None:
        if MODE not in MODES:
            raise SystemExit(
                "senet_kernels: SENET_KERNELS_BUILD must be one of "
                f"{', '.join(MODES)}, not {MODE!r}"
            )
        reasons: dict[str, str] = {}  # for what is left out

        def leave_out(part: str, reason: str) -> None:
            if part in MODES[MODE]:
                raise SystemExit(
                    f"senet_kernels: SENET_KERNELS_BUILD={MODE}, "
                    f"but the {part} kernels cannot be built: {reason}"
                )
            say(f"no {part} kernels: {reason}")
            reasons[part] = reason

        for part, reason in (("cpu", why_no_cpu()), ("cuda", why_no_cuda())):
            if reason:
                leave_out(part, reason)
        compiler = None
        while compiler is None and "cpu" not in reasons:
            cuda = "cuda" not in reasons
            say(f"building the cpu kernels for {', '.join(ISA_FLAGS)}")
            if cuda:
                say(f"building the cuda kernels for {CUDA_ARCHITECTURES}")
            try:
                compiler = compile_library(cuda)
            except BuildError as error:
                # The CPU kernels do not depend on the CUDA kernels: try once more without these.
                leave_out("cuda" if cuda else "cpu", str(error))

        record: dict[str, object] = {"requested": MODE}
        if compiler:
            record["isas"] = list(ISA_FLAGS)
            record["compiler"] = compiler
            record["torch"] = torch_version()
            record["cxxflags"] = os.environ.get("SENET_KERNELS_CXXFLAGS", "")
        else:
            record["reason"] = reasons["cpu"]
        if "cuda" in reasons:
            record["cuda_reason"] = reasons["cuda"]
        else:
            record["cuda"] = CUDA_ARCHITECTURES
            record["nvcc"] = nvcc_version(find_nvcc() or "nvcc")
        self.deliver(bool(compiler), record)

    def deliver(self, library: bool, record: dict[str, object]) -> None:
        # In place for editable installs and `build_ext --inplace`.
        package = ROOT / "senet_kernels" if self.inplace else Path(self.build_lib, "senet_kernels")
        package.mkdir(parents=True, exist_ok=True)
        # Never overwritten, but replaced: a running process may have the old one mapped.
        for stale in package.glob("_native*.so"):
            stale.unlink()
        self.products = ("senet_kernels/_build.json",)
        if library:
            name = self.get_ext_filename(EXTENSION.name)
            shutil.copy2(ROOT / LIBRARY, package / Path(name).name)
            self.products += (name,)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, name)) for name in self.products]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), self.products, strict=True)) if self.inplace else {}


class WithoutMetadata(setuptools.Distribution):
    """For a setuptools that cannot read pyproject.toml, and does not: builds the library in place,
    and makes no package. `pip install --no-build-isolation` takes the setuptools that is there."""

    def parse_config_files(self, *_args: object, **_kwargs: object) -> None:
        pass

    def parse_command_line(self) -> bool | None:
        proceed = super().parse_command_line()
        if proceed and not {"build_ext", "clean"}.issuperset(self.commands):
            self.refuse(" ".join(self.commands))
        return proceed

    def handle_display_options(self, option_order: list[tuple[str, object]]) -> int | None:
        metadata = {option[0] for option in self.display_options} - {"help-commands"}
        for name, value in option_order:
            if value and name in metadata:
                self.refuse(f"--{name}")
        return super().handle_display_options(option_order)

    def refuse(self, what: str) -> None:
        raise SystemExit(
            f"senet_kernels: setuptools {setuptools.__version__} is older than 77, which {what} "
            "needs for pyproject.toml; pip install --upgrade setuptools. What is there can build "
            "the library in place: python setup.py build_ext --inplace"
        )


OLD_SETUPTOOLS = int(setuptools.__version__.split(".")[0]) < 77
# For the names and tags of what setuptools makes; the sources are build_ext's business.
EXTENSION = Extension("senet_kernels._native", sources=[], py_limited_api=True)
# Free-threaded Pythons have no limited API, and setuptools refuses the option there.
LIMITED_API = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
setup(
    ext_modules=[EXTENSION] if MODES.get(MODE) or not why_no_cpu() else [],
    cmdclass={"build": build, "build_ext": build_ext},
    options={"bdist_wheel": LIMITED_API},
    distclass=WithoutMetadata if OLD_SETUPTOOLS else setuptools.Distribution,
)

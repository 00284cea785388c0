"""What this machine can do: one line per thing that flabc could use, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from flabc.frozen import Frozen
from flabc.runtime.measure.environment import cpu_features, cpu_name

from . import huge_pages

Status = Literal["ok", "missing", "problem"]

#: The packages of each extra that decide whether it works.
EXTRAS = {
    "cpu": ("onnxruntime",),
    "compress": ("torch", "transformers", "safetensors", "gguf", "accelerate", "peft"),
    "export": ("onnx", "onnx-ir", "onnxscript", "ml-dtypes"),
    "report": ("matplotlib", "scipy"),
    "serve": ("fastapi", "uvicorn", "prometheus-client"),
    "openvino": ("openvino",),
    "gpu": ("onnxruntime-gpu", "nvidia-ml-py", "cuda-bindings"),
    "tensorrt": ("tensorrt", "polygraphy", "cuda-bindings"),
}

#: The version of NVIDIA's kernel driver, where there is one.
DRIVER = Path("/proc/driver/nvidia/version")

#: Puts another build of a package in the place of the one that is there.
REINSTALL = "pip install --force-reinstall"

#: C compilers, one of which Triton needs to start what it compiled.
COMPILERS = ("cc", "gcc", "clang")

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Finding(Frozen):
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything; never raises, imports nothing heavy but onnxruntime, and torch where there is a GPU."""
    alike = [
        _python(),
        _processor(),
        _memory(),
        _huge_pages(),
        *_extras(),
        _clash(),
        _tried("execution providers", _providers, "onnxruntime"),
        _cuda(),
        _tried("energy, GPU (NVML)", _nvml, "nvidia-ml-py"),
        _rapl(),
    ]
    if not DRIVER.is_file():
        return alike
    on_gpu = _tried("onnxruntime on the GPU", _gpu_onnxruntime, "onnxruntime-gpu")
    return [*alike, _tried("torch on the GPU", _gpu_torch, "torch"), _fusing(), on_gpu]


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tried(name: str, probe: Callable[[str], Finding], package: str) -> Finding:
    """What a probe finds that imports a package. A broken one may fail in any way: half removed, without a library."""
    try:
        return probe(name)
    except Exception as error:
        detail = f"{package} is broken: {type(error).__name__}: {error}"
        return Finding(name=name, status="problem", detail=detail, fix=f"{REINSTALL} {package}")


def _python() -> Finding:
    return Finding(name="python", status="ok", detail=sys.version.split()[0])


def _processor() -> Finding:
    features = ", ".join(cpu_features()) or "no known features"
    return Finding(name="processor", status="ok", detail=f"{cpu_name()}, {psutil.cpu_count()} cores, {features}")


def _memory() -> Finding:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    detail = (
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, disk {disk.free / 2**30:.0f} GiB free"
    )
    return Finding(name="memory", status="ok", detail=detail)


def _huge_pages() -> Finding:
    """Whether weights are read without looking up every 4 KiB."""
    name = "huge pages"
    if huge_pages.allowed():
        return Finding(name=name, status="ok", detail="weights are gathered in pages of 2 MiB")
    fix = f"echo madvise > {huge_pages.SETTING}"
    return Finding(name=name, status="missing", detail="the system gives none", fix=fix)


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        found = {package: version_of(package) for package in packages}
        missing = [package for package, version in found.items() if version is None]
        if missing:
            fix = f"pip install 'flabc[{extra}]'"
            yield Finding(name=f"extra {extra}", status="missing", detail=f"no {', '.join(missing)}", fix=fix)
        else:
            detail = ", ".join(f"{package} {version}" for package, version in found.items())
            yield Finding(name=f"extra {extra}", status="ok", detail=detail)


def _clash() -> Finding:
    both = version_of("onnxruntime") is not None and version_of("onnxruntime-gpu") is not None
    if not both:
        return Finding(name="clashing packages", status="ok", detail="none")
    return Finding(
        name="clashing packages",
        status="problem",
        detail="onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
        fix="pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you need",
    )


def _providers(name: str) -> Finding:
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding(name=name, status="missing", detail="no onnxruntime", fix="pip install 'flabc[cpu]'")
    import onnxruntime

    return Finding(name=name, status="ok", detail=", ".join(onnxruntime.get_available_providers()))


def _cuda() -> Finding:
    if not DRIVER.is_file():
        return Finding(name="cuda", status="missing", detail="no NVIDIA driver")
    return Finding(name="cuda", status="ok", detail=DRIVER.read_text(encoding="utf-8").splitlines()[0])


def _gpu_torch(name: str) -> Finding:
    """What ``torch-static``, ``flabc bench --shape`` and ``perf/gpu_suite.py`` need."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        return Finding(name=name, status="missing", detail=str(error), fix="pip install 'flabc[compress]'")
    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is built without CUDA"
        return Finding(name=name, status="problem", detail=detail, fix=f"{REINSTALL} torch, from an index with CUDA")
    if not torch.cuda.is_available():
        detail = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and sees no device"
        return Finding(
            name=name, status="problem", detail=detail, fix="Update the driver, or see CUDA_VISIBLE_DEVICES."
        )
    device = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return Finding(name=name, status="ok", detail=f"{device}: torch-static, bench --shape, perf/gpu_suite.py")


def _fusing() -> Finding:
    """What ``torch.compile`` needs, by which small kernels become few."""
    name = "small kernels fused"
    if importlib.util.find_spec("triton") is None:
        return Finding(name=name, status="missing", detail="no triton", fix="pip install triton")
    found = [compiler for compiler in COMPILERS if shutil.which(compiler)]
    if not found:
        return Finding(name=name, status="missing", detail="no C compiler, which Triton needs", fix="Install gcc.")
    return Finding(name=name, status="ok", detail=f"triton {version_of('triton')}, {found[0]}")


def _gpu_onnxruntime(name: str) -> Finding:
    """What runs engines on the GPU."""
    fix = "pip uninstall -y onnxruntime && pip install 'flabc[gpu]'"
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding(name=name, status="missing", detail="no onnxruntime", fix=fix)
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return Finding(name=name, status="missing", detail="this onnxruntime has no CUDA provider", fix=fix)
    return Finding(name=name, status="ok", detail=f"onnxruntime-gpu {version_of('onnxruntime-gpu')}")


def _nvml(name: str) -> Finding:
    if importlib.util.find_spec("pynvml") is None:
        return Finding(name=name, status="missing", detail="no nvidia-ml-py", fix="pip install 'flabc[gpu]'")
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding(name=name, status="missing", detail=str(error))
    count = pynvml.nvmlDeviceGetCount()
    pynvml.nvmlShutdown()
    return Finding(name=name, status="ok", detail=f"{count} devices")


def _rapl() -> Finding:
    name = "energy, processor (RAPL)"
    if not RAPL.exists():
        return Finding(name=name, status="missing", detail="the system shows no counter")
    try:
        RAPL.read_text(encoding="utf-8")
    except OSError as error:
        return Finding(name=name, status="missing", detail=str(error), fix=f"Make {RAPL} readable.")
    return Finding(name=name, status="ok", detail=str(RAPL))

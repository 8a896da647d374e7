"""A small harness that compares ways to compute the same thing, fairly.

A benchmark is a module `bench_<name>.py` with `main(options)`, which builds its cases and calls `run(name, cases,
options)`. A case holds contenders: functions without arguments that do the whole job and return its result. The first
contender is ours.

Time. All contenders of a case run in one process with a fixed number of threads. After a warm-up, each round takes one
sample of every contender, in an order drawn anew for each round, so that a slow spell of the machine hits all alike. A
sample repeats the function until it has lasted at least 20 ms. Reported are the median and the interquartile range; the
ratio is the median over rounds of (contender / ours) within one round: above 1 we are faster, below 1 the peer is.

Accuracy. The error of a result is the largest relative error in Euclidean norm over its tensors, against a reference
that the case computes in another way.

Memory. Peak memory of one call beyond what was held before it, inputs excluded. On a GPU the allocator counts it. On a
CPU each contender runs in a fresh process, which executes the same benchmark up to this contender, calls it once (so
that lazily loaded code does not count), returns free memory to the system, resets the peak that Linux keeps of the
process's resident memory, calls it again and reads the growth. Resident memory is what the user pays for: it counts
scratch space of LAPACK, and pages of 4 KiB, so that anything below about 1 MiB is noise. Without Linux the
growth of `ru_maxrss` over both calls is read instead, which is an upper bound.
"""

import ctypes
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.02
PACKAGES = (
    *("torch", "numpy", "torch-difflayers", "torchdeq", "torchopt", "cvxpy", "cvxpylayers", "moreau", "scipy", "POT"),
    *("scikit-learn", "deepinv", "pyproximal", "qpth", "torchjd", "clarabel", "highspy", "geomloss", "pyscnn"),
    *("torch-sla", "theseus-ai", "boat-torch", "betty-ml", "higher"),
)
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# what stands in the names of contenders that are ours, and of those that do less than the whole job
OURS = ("difflayers", "the same", "KernelSinkhorn", "implicit, ", "4 experts", "8 experts")
LESS = ("without gradient", "forward alone", "forward only", "least: ", "canonical form given")

Result = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Options:
    """What the command line chooses.

    `memory_of` names a case and a contender: then nothing is timed, and that contender's peak memory is printed.
    """

    device: str = "cpu"
    threads: int = 1
    repetitions: int = 9
    results: Path = ROOT / "benchmarks" / "results"
    memory_of: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.repetitions < 5:
            raise ValueError(f"repetitions: expected at least 5, got {self.repetitions}")


@dataclass(frozen=True)
class Contender:
    """One way to do the job: `fn()` does all of it and returns the result.

    `reference` is what it should return, where that is less than the others compute. `settings`, asked after the first
    call, tells what was chosen for it, such as the tolerance it needs.
    """

    name: str
    fn: Callable[[], Result]
    reference: Result | None = None
    settings: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Case:
    """Contenders for one problem, ours first, and the result they should reach.

    A contender whose error exceeds `target` did another job: it cannot win. `memory=False` spares the processes that
    measure memory, where another case of the same kind tells the same. A function for `reference` is asked only where
    something is compared with it: not by those processes.
    """

    name: str
    contenders: Sequence[Contender]
    reference: Result | Callable[[], Result]
    memory: bool = True
    target: float = math.inf


class AsLooseAs:
    """A job with the loosest tolerance of `ladder` (loose to tight) whose result has an error of at most `target`.

    Contenders measure their errors differently, so the same tolerance does not mean the same accuracy. The choice is
    made at the first call; where nothing reaches the target, the most accurate job is kept and `settings` says so.
    """

    def __init__(
        self,
        build: Callable[[Any], Callable[[], Result]],
        ladder: Sequence[Any],
        reference: Result,
        target: float,
        label: str = "tol",
    ) -> None:
        self.build, self.ladder, self.reference, self.target, self.label = build, ladder, reference, target, label
        self.job: Callable[[], Result] | None = None
        self.chosen = ""

    def __call__(self) -> Result:
        if self.job is None:
            self._choose()
        assert self.job is not None
        return self.job()

    def settings(self) -> str:
        return self.chosen

    def _choose(self) -> None:
        best = math.inf
        for tolerance in self.ladder:
            job = self.build(tolerance)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = relative_error(job(), self.reference)
            if self.job is None or error < best:
                self.job, best = job, error
                small = isinstance(tolerance, float) and tolerance < 0.1
                self.chosen = f"{self.label} " + (f"{tolerance:.0e}" if small else f"{tolerance}")
            if error <= self.target:
                return
        self.chosen += f", does not reach {self.target:.0e}"


@dataclass
class Row:
    """What was measured of one contender in one case."""

    case: str
    contender: str
    ours: bool
    error: float
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    target: float = math.inf
    settings: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """What a reader should not miss; variants of ours are no peers."""
        if self.error > self.target:
            return " (too inaccurate)"
        return " (peer wins)" if self.ratio < 1 and not self.contender.startswith(OURS) else ""

    def as_dict(self) -> dict[str, Any]:
        median, spread = median_and_spread(self.seconds)
        return {
            "case": self.case,
            "contender": self.contender,
            "ours": self.ours,
            "median_seconds": median,
            "iqr_seconds": spread,
            "ratio_to_ours": self.ratio,
            "ratio_iqr": median_and_spread(self.ratios)[1],
            "relative_error": self.error,
            "target": self.target if math.isfinite(self.target) else None,
            "settings": self.settings,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }


# -------------------------------------------------------------------------------------------------------- accuracy


def relative_error(result: Result, reference: Result) -> float:
    """The largest relative error over the tensors of a result; NaN counts as infinite."""
    results, references = ([x] if isinstance(x, Tensor) else list(x) for x in (result, reference))
    worst = 0.0
    for got, expected in zip(results, references, strict=True):
        if got.shape != expected.shape:
            raise ValueError(f"result: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
        error = float((got.detach().double() - expected.double()).norm() / expected.double().norm())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


# ------------------------------------------------------------------------------------------------------------ time


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def seconds(fn: Callable[[], Result], repeats: int, device: str) -> float:
    """Mean time of one call over `repeats` calls."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(case: Case, options: Options) -> list[Row]:
    """Times all contenders of a case in interleaved rounds."""
    rows, repeats = [], []
    expected = case.reference() if callable(case.reference) else case.reference
    for position, contender in enumerate(case.contenders):
        reference = expected if contender.reference is None else contender.reference
        error = relative_error(contender.fn(), reference)
        row = Row(case.name, contender.name, position == 0, error, target=case.target, settings=contender.settings())
        rows.append(row)
        once = seconds(contender.fn, 1, options.device)
        if once < SAMPLE_SECONDS:
            once = min(once, *(seconds(contender.fn, 1, options.device) for _ in range(2)))
        repeats.append(max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    order = list(range(len(rows)))
    shuffle = random.Random(0).shuffle
    for _ in range(options.repetitions):
        shuffle(order)
        for k in order:
            rows[k].seconds.append(seconds(case.contenders[k].fn, repeats[k], options.device))
        for row in rows:
            row.ratios.append(row.seconds[-1] / rows[0].seconds[-1])
    return rows


# ---------------------------------------------------------------------------------------------------------- memory


def peak_memory(fn: Callable[[], Result], device: str) -> int:
    """Peak memory of one call in bytes, beyond what was held before it. On a CPU, call it in a fresh process."""
    if device.startswith("cuda"):
        fn()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        unit = 1 if platform.system() == "Darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fn()
        fn()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: blocks above 64 KiB are then mapped, and unmapped when they are freed
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    fn()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before = status_bytes("VmRSS")
    fn()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(key: str) -> int:
    """A size that Linux reports of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak_memory_elsewhere(name: str, row: Row, options: Options) -> int:
    """Peak memory of a contender, measured by a fresh process."""
    command = [sys.executable, "-m", "benchmarks", name, "--memory-of", row.case, row.contender]
    command += ["--device", options.device, "--threads", str(options.threads)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {row.contender} in {row.case} failed:\n{run.stderr}")
    return int(run.stdout.split()[-1])


# ---------------------------------------------------------------------------------------------------------- report


def environment(options: Options) -> dict[str, Any]:
    """What a reader needs to know to compare numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu_model()
    return {
        "versions": versions,
        "device": device,
        "threads": options.threads,
        "repetitions": options.repetitions,
        "sample_seconds_at_least": SAMPLE_SECONDS,
    }


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Where a peer wins stands first, worst for us on top; then the rest, case by case."""
    lost = sorted((row for row in rows if "peer wins" in row.verdict), key=lambda row: row.ratio)
    rest = [row for row in rows if row not in lost]
    head = ("case", "contender", "time / ours", "median", "IQR", "relative error", "peak memory", "settings")
    body = []
    for row in lost + rest:
        median, spread = median_and_spread(row.seconds)
        ratio = ("ours" if row.ours else f"{row.ratio:.2f}") + row.verdict
        peak = "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
        times = (f"{1e3 * median:.3f} ms", f"{1e3 * spread:.3f} ms")
        body.append((row.case, row.contender, ratio, *times, f"{row.error:.1e}", peak, row.settings))
    widths = [max(len(line[k]) for line in (head, *body)) for k in range(len(head))]

    def show(line: Sequence[str]) -> str:
        words = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[3:-1], widths[3:-1], strict=True)]
        return "  ".join([*words, *numbers, line[-1]]).rstrip()

    return "\n".join([show(head), show(["-" * width for width in widths]), *map(show, body)])


def run(name: str, cases: Sequence[Case], options: Options, *, memory: bool = True) -> list[Row]:
    """Measures all cases, prints a table and writes `<results>/<name>.json`."""
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        chosen = {(case.name, c.name): c for case in cases for c in case.contenders}[tuple(options.memory_of)]
        print(peak_memory(chosen.fn, options.device))
        return []
    rows = []
    for case in cases:
        print(f"{name}: {case.name} ...", file=sys.stderr, flush=True)
        measured = measure(case, options)
        for row in measured if memory and case.memory else []:
            row.peak_bytes = peak_memory_elsewhere(name, row, options)
        rows += measured
    about = environment(options)
    print(f"\n{name} ({about['device']}, {options.threads} thread(s), torch {about['versions']['torch']})\n")
    print(table(rows), end="\n\n", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    report = {"name": name, **about, "rows": [row.as_dict() for row in rows]}
    (options.results / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    return rows

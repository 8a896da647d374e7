"""Several processes on this machine, for tests of torch.distributed with gloo.

A worker is a module with ``CASES`` and ``ERRORS``, dicts from names to functions of what its ``place(world)`` returns:
None for the answer of a single process, else a group or mesh of the processes that have just met. ``found =
spawned(...)`` runs all cases in groups of 1, 2 and 3 processes, and without one; a case that raises is recorded as its
error.

One interpreter imports the worker, finds what a single process finds, and forks.

    python -m tests.processes MODULE FOLDER WORLD ...
"""

import datetime
import importlib
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # a process that waits for another longer than this gives up
ROOT = Path(__file__).parents[1]
Outcomes = dict[int, list[dict[str, Any]]]


def outcomes(worker: Any, world: int) -> dict[str, Any]:
    """What every case returns, or how it fails."""
    place, begin = worker.place(world), time.monotonic()
    out: dict[str, Any] = {}
    for name, case in (worker.CASES | worker.ERRORS).items():
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out[name] = case(place)
            if said:
                out[f"{name}, warnings"] = [str(w.message) for w in said]
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out | {"seconds": time.monotonic() - begin}


def member(worker: Any, rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What one process of a group finds."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{world}"), world)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    # not destroyed, since the process ends with this: in torch 2.6 that may wait, with the interpreter's lock, for a
    # thread of gloo which needs it to drop a tensor
    return outcomes(worker, world)


def spawned(module: str, folder: Path, worlds: Sequence[int] = (1, 2, 3)) -> Outcomes:
    """For each size of the group what its processes found; 0: one process without a group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.processes", module, str(folder), *map(str, worlds)]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    try:
        _, said = running.communicate(timeout=4 * SECONDS)
        assert running.returncode == 0, said.decode()
    finally:
        if running.poll() is None:
            os.killpg(running.pid, 9)
            running.wait()
    return {w: [torch.load(folder / f"{w}.{rank}.pt") for rank in range(max(w, 1))] for w in (0, *worlds)}


def main() -> None:
    """Computes what one process finds, forks all groups at once, and waits for them."""
    module, folder, worlds = sys.argv[1], Path(sys.argv[2]), [int(w) for w in sys.argv[3:]]
    torch.set_num_threads(1)
    worker = importlib.import_module(module)
    torch.save(outcomes(worker, 0), folder / "0.0.pt")
    children = []
    for world in worlds:
        for rank in range(world):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    torch.save(member(worker, rank, world, folder), folder / f"{world}.{rank}.pt")
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))


if __name__ == "__main__":
    main()

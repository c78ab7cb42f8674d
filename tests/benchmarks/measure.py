"""Times and peaks of memory of things done in turn, in one process."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def keep_memory() -> None:
    """Makes glibc's allocator keep what is freed, as the one for CUDA does.

    Otherwise blocks of 32 MB and more are fetched from the system anew each time: page faults take several times as
    long as a copy, or not, by chance, and hide what is measured.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for any size
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@dataclass
class Measure:
    """How to measure on a device.

    On one CPU thread it is processor time that counts: on a shared machine the wall clock counts others' work, too.
    """

    device: str = "cpu"
    seconds: float = 3.0
    _before: int = 0

    def now(self) -> float:
        """The time, in seconds, when all that was asked of the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()

    def medians(self, tasks: dict[str, Callable[[], object]]) -> dict[str, float]:
        """The median time of each task, all of them in turn for as long as ``seconds``, at least five times.

        On a GPU a time is that of twenty calls in a row, or it would be that of waiting for the first one.
        """
        calls = 20 if self.device == "cuda" else 1
        times: dict[str, list[float]] = {name: [] for name in tasks}
        end = time.perf_counter() + self.seconds
        for task in tasks.values():
            task()
        while time.perf_counter() < end or len(times[next(iter(tasks))]) < 5:
            for name, task in tasks.items():
                start = self.now()
                for _ in range(calls):
                    task()
                times[name].append((self.now() - start) / calls)
        return {name: statistics.median(each) for name, each in times.items()}

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Appends the largest number of bytes held at a time, beyond those held at the start.

        After a call of :meth:`from_here` inside, beyond those held then. On the CPU, memory from before the start is
        not seen to be freed.
        """
        result: list[int] = []
        if self.device == "cuda":
            self.from_here()
            yield result
            result.append(torch.cuda.max_memory_allocated() - self._before)
            return
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with quiet():
            profile.__enter__()
        yield result
        with quiet():
            profile.__exit__(None, None, None)
        held = start = largest = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == FROM_HERE:
                start = largest = held
            elif event.name() == "[memory]":
                held += event.nbytes()
                largest = max(largest, held)
        result.append(largest - start)

    def from_here(self) -> None:
        """What is held now is what the peak is counted from."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            with torch.profiler.record_function(FROM_HERE):
                pass


FROM_HERE = "the peak is counted from here"


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error, not from C++ either: the profiler tells when it starts, and that there is no GPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass
class Section:
    """A table, and what it says about the targets.

    Attributes:
        title: of the table.
        columns: names of the columns.
        rows: of text.
        notes: lines below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: str = ""

    def add(self, *cells: object) -> None:
        """Appends a row, and shows it at once: a table takes minutes."""
        self.rows.append([str(cell) for cell in cells])
        print(*self.rows[-1], sep=" | ", file=sys.stderr, flush=True)

"""What `from lightning_manifold_mixup import *` adds to `import lightning`, in fresh processes."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys

from .measure import Measure, Section

TIMED = """
import time, lightning
start = time.process_time()
from lightning_manifold_mixup import *
print(time.process_time() - start)
"""


def run(measure: Measure, times: int = 7) -> Section:
    section = Section("Import", ["module", "ms of its own", "with what it imports"], [])
    runs = [float(python("-c", TIMED).stdout) for _ in range(times)]
    section.notes = (
        f"Added to `import lightning`, median of {times}: {statistics.median(runs) * 1e3:.0f} ms; target: 100 ms."
    )
    trace = python(
        "-X", "importtime", "-c", "import lightning; print('>>'); from lightning_manifold_mixup import *"
    ).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)", trace)
    start = max(i for i, line in enumerate(lines) if line[2] == "lightning") + 1
    for own, total, name in sorted(lines[start:], key=lambda line: -int(line[1]))[:12]:
        section.add(name, f"{int(own) / 1e3:.1f}", f"{int(total) / 1e3:.1f}")
    return section


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)

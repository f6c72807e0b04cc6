"""Wall time and peak memory of a block of code."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures a block: `with Meter(device) as meter: ...`, then meter.seconds and meter.peak_memory (bytes).

    On CUDA the peak is what torch allocated on that device. On the CPU it is the resident memory of the whole
    process, including libraries and models. Only Linux can restart that peak for each block; elsewhere, and where
    the system forbids it, it is the peak since the process started. Do not nest meters: the inner one resets the
    peak of the outer one.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        """Prepares a meter for the memory of a device."""
        self.device = torch.device(device)
        self.seconds, self.peak_memory = 0.0, 0

    def __enter__(self) -> Meter:
        reset_peak_memory(self.device)
        self._began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.monotonic() - self._began
        self.peak_memory = peak_memory(self.device)


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Restarts the peak from the memory now in use, where the system supports it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text("5")  # VmHWM := VmRSS, see proc_pid_clear_refs(5)
    except OSError:
        return


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Peak memory in bytes since the last reset: of torch on a CUDA device, else of the whole process.

    0 where the system does not report it. (psutil reports the present memory, but the peak only on Windows.)
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

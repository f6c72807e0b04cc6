"""The example of the theorem, run as a reader would run it: its two columns agree."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_sdi_is_ddim.py"
# Rounding, then what is stated to be approximate: the start of a walk above zero noise, and sampling error.
TOLERANCES = {"exact inversion": 1e-4, "not zero": 1e-4, "mean gradient": 5e-3, "standard deviation": 5e-3}


def test_expected_and_computed_agree():
    assert len(EXAMPLE.read_text().splitlines()) <= 90
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(.*?) +(-?\d\S*) +(-?\d\S*)$", run.stdout, re.MULTILINE)
    assert len(rows) == 8
    for what, expected, computed in rows:
        tolerance = next((value for key, value in TOLERANCES.items() if key in what), 2e-6)
        assert abs(float(expected) - float(computed)) <= tolerance, what

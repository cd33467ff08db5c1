"""Writes the files that are made from others: the chart's copy of the CRD, and ``manifests/install.yaml`` from the chart.

``python charts/render.py``; with ``--check`` it writes nothing, names what is out of date, and exits 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from helm_python import Chart

ROOT = Path(__file__).parents[1]
NAME = "celery-workerpool"
NAMESPACE = f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAME}\n"


def install(chart_directory: Path, crd: str) -> str:
    """Everything that ``kubectl apply`` needs, with the chart's default values, in the order in which it is applied."""
    with Chart.load(chart_directory) as chart:
        rendered = chart.render(name=NAME, namespace=NAME)
    # Backwards through the alphabet: the service account and its rights come before the Deployment that needs them.
    documents = [text for path, text in sorted(rendered.items(), reverse=True) if path.endswith(".yaml")]
    header = f"# Generated from charts/{NAME} by charts/render.py: change it there.\n"
    return header + "---\n".join(part.strip().removeprefix("---\n") + "\n" for part in [crd, NAMESPACE, *documents])


def main(root: Path, *, check: bool) -> int:
    """Write or check; the files follow from one another, so the order matters."""
    crd = (root / "crds" / "workerpool.yaml").read_text()
    chart = root / "charts" / NAME
    stale = bring(chart / "crds" / "workerpool.yaml", crd, check=check)
    stale += bring(root / "manifests" / "install.yaml", install(chart, crd), check=check)
    return tell(root, stale, check=check)


def tell(root: Path, stale: list[Path], *, check: bool) -> int:
    """Name what was written, or is out of date; the exit status."""
    for path in stale:
        print(f"{path.relative_to(root)} {'is out of date: make generate' if check else 'written'}")  # noqa: T201
    return int(check and bool(stale))


def bring(path: Path, content: str, *, check: bool) -> list[Path]:
    """Give a file that content, unless it is only to be checked; the file, if it had another."""
    if path.exists() and path.read_text() == content:
        return []
    if not check:
        path.write_text(content)
    return [path]


def arguments(about: str | None) -> argparse.Namespace:
    """``--check``, or nothing."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if something is out of date")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(ROOT, check=arguments(__doc__).check))

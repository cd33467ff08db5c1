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
    stale = _bring(chart / "crds" / "workerpool.yaml", crd, check=check)
    stale += _bring(root / "manifests" / "install.yaml", install(chart, crd), check=check)
    for path in stale:
        print(f"{path.relative_to(root)} {'is out of date: make generate' if check else 'written'}")  # noqa: T201
    return int(check and bool(stale))


def _bring(path: Path, content: str, *, check: bool) -> list[Path]:
    if path.exists() and path.read_text() == content:
        return []
    if not check:
        path.write_text(content)
    return [path]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if something is out of date")
    sys.exit(main(ROOT, check=parser.parse_args().check))

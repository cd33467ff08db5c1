"""Writes the files that are made from others.

The version of the chart and of the images follows from ``pyproject.toml``, the chart's copy of the CRD from ``crds/``, its
README from ``values.yaml``, and ``manifests/install.yaml`` from the chart. ``python charts/render.py``; with ``--check`` it
writes nothing, names what is out of date, and exits 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[1]
NAME = "celery-workerpool"
NAMESPACE = f"""\
apiVersion: v1
kind: Namespace
metadata:
  name: {NAME}
  labels: {{pod-security.kubernetes.io/enforce: restricted}}
"""

_APPLY_FIRST = ("CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")


def versioned(chart: str, version: str) -> str:
    """``Chart.yaml`` with the distribution's version as its own and as that of the image."""
    return re.sub(r"^(version|appVersion): .*$", rf"\1: {version}", chart, flags=re.MULTILINE)


def labelled(dockerfile: str, version: str) -> str:
    """A Dockerfile whose image is labelled with the distribution's version unless the builder says otherwise."""
    return re.sub(r"^ARG VERSION=.*$", f"ARG VERSION={version}", dockerfile, flags=re.MULTILINE)


def readme(chart: str, values: str) -> str:
    """The chart's README: every value with its default and the comment that stands above it in ``values.yaml``."""
    about = yaml.safe_load(chart)
    rows = [f"| `{name}` | `{default}` | {comment} |" for name, default, comment in _values(values)]
    return "\n".join(
        [
            "<!-- Generated from Chart.yaml and values.yaml by charts/render.py: change it there. -->",
            f"# {about['name']}",
            "",
            f"{about['description']}. Version {about['version']}, for Kubernetes {about['kubeVersion'].removesuffix('-0')}.",
            "",
            "Install, upgrade, uninstall, and what it may do: [docs/how-to/install.md](../../docs/how-to/install.md).",
            "",
            "| value | default | |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _values(text: str) -> Iterator[tuple[str, str, str]]:
    lines = text.splitlines()

    def below(node: yaml.MappingNode, given: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            name, first = f"{prefix}{key.value}", key.start_mark.line
            start = first
            while start and lines[start - 1].lstrip().startswith("#"):
                start -= 1
            if start < first:
                comment = " ".join(line.strip().removeprefix("#").strip() for line in lines[start:first])
                yield name, json.dumps(given[key.value]), comment
            elif isinstance(value, yaml.MappingNode):
                yield from below(value, given[key.value], f"{name}.")
            else:
                raise ValueError(f"values.yaml: {name} has no comment above it that says what it is")

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return below(root, yaml.safe_load(text), "")


def install(chart_directory: Path) -> str:
    """Everything that ``kubectl apply`` needs, with the chart's default values, in the order in which it is applied."""
    with Chart.load(chart_directory) as chart:
        rendered = chart.render(name=NAME, namespace=NAME)
    texts = [part.strip() for path, text in sorted(rendered.items()) if path.endswith(".yaml") for part in text.split("\n---\n")]
    objects = [(yaml.safe_load(text), text.removeprefix("---\n")) for text in texts if text]
    kept = [(found["kind"], text) for found, text in objects if not _hook(found)]
    kept.sort(key=lambda each: _APPLY_FIRST.index(each[0]) if each[0] in _APPLY_FIRST else len(_APPLY_FIRST))
    header = f"# Generated from charts/{NAME} by charts/render.py: change it there.\n"
    return header + "---\n".join([NAMESPACE, *(f"{text}\n" for _, text in kept)])


def _hook(found: dict[str, Any]) -> bool:
    return "helm.sh/hook" in found["metadata"].get("annotations", {})


def main(root: Path, *, check: bool) -> int:
    """Write or check; the files follow from one another, so the order matters."""
    chart = root / "charts" / NAME
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    stale = bring(chart / "Chart.yaml", versioned((chart / "Chart.yaml").read_text(), version), check=check)
    for dockerfile in (root / "Dockerfile", root / "examples" / "media" / "Dockerfile"):
        stale += bring(dockerfile, labelled(dockerfile.read_text(), version), check=check)
    stale += bring(chart / "files" / "workerpool.yaml", (root / "crds" / "workerpool.yaml").read_text(), check=check)
    described = readme((chart / "Chart.yaml").read_text(), (chart / "values.yaml").read_text())
    stale += bring(chart / "README.md", described, check=check)
    stale += bring(root / "manifests" / "install.yaml", install(chart), check=check)
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

"""A real Kubernetes control plane on loopback: etcd, kube-apiserver and kube-controller-manager; no nodes, no root.

``python -m e2e.cluster.control_plane`` runs one in the foreground until Ctrl-C and prints its ``KUBECONFIG=`` line.
"""

from __future__ import annotations

import base64
import http.client
import json
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from e2e.cluster import binaries
from e2e.cluster.pki import Authority, new_key
from e2e.cluster.ports import reserve_port

READY_SECONDS = 60.0
_LOG_LINES = 20
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}
"""What pods ask of the API server, and who asks."""
_LOOPBACK = "127.0.0.1"


class ControlPlaneFailed(RuntimeError):
    """A process of the control plane ended or did not get ready in time; the message holds the tail of its log."""


class ControlPlane:
    """A context manager; while it is entered the control plane runs, and nothing of it outlives this process.

    Args:
        binaries_directory: where its programs are.
        address: where nodes and pods reach the API server; no node can join while it is the loopback address.

    Attributes:
        directory: where all of its files are.
        kubeconfig: the path of an administrator's kubeconfig that holds all it needs.
        url: the address of the API server.
    """

    def __init__(self, binaries_directory: Path, address: str = _LOOPBACK) -> None:
        self._binaries = binaries_directory
        self._address = address
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="celery-workerpool-cluster-"))
        self._etcd, self._etcd_peers, self._api, self._controllers = (reserve_port() for _ in range(4))
        self.url = f"https://{self._address}:{self._api}"
        self.kubeconfig = self.directory / "kubeconfig"
        watchdog = [sys.executable, "-IS", str(Path(__file__).with_name("watchdog.py")), str(self.directory)]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        try:
            self._issue_certificates()
            self.restart_etcd()
            self.restart_api_server()
            self._start_controller_manager()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        # One clean-up for every end: the watchdog's. It holds its standard output open until all is gone.
        self._watchdog.communicate()

    def restart_api_server(self) -> None:
        """Stop the API server if it runs, start it, and wait until it is ready. Address and certificates stay the same."""
        self.stop_api_server()
        self.start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd}",
            f"--bind-address={'127.0.0.1' if self._address == _LOOPBACK else '0.0.0.0'}",
            f"--advertise-address={self._address}",
            f"--secure-port={self._api}",
            f"--tls-cert-file={self.directory}/server.crt",
            f"--tls-private-key-file={self.directory}/server.key",
            f"--client-ca-file={self.directory}/ca.crt",
            f"--service-account-key-file={self.directory}/service-accounts.key",
            f"--service-account-signing-key-file={self.directory}/service-accounts.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            f"--audit-policy-file={self.directory}/audit.json",
            f"--audit-log-path={self.directory}/audit.log",
            # The Service "kubernetes" may not point at a loopback address, and no pod is there to ask for it.
            *(["--endpoint-reconciler-type=none"] if self._address == _LOOPBACK else []),
        )
        self._wait("kube-apiserver", self._api, "/readyz")

    def stop(self, name: str) -> None:
        """Kill one process, if it runs."""
        if process := self._processes.pop(name, None):
            process.kill()
            process.wait()

    def signal(self, name: str, what: signal.Signals) -> None:
        """Send a signal to one process."""
        self._processes[name].send_signal(what)

    def stop_api_server(self) -> None:
        """Kill the API server: an outage until :meth:`restart_api_server`."""
        self.stop("kube-apiserver")

    def restart_etcd(self) -> None:
        """Stop etcd if it runs, and start it over what it has stored."""
        self.stop("etcd")
        client, peers = (f"http://127.0.0.1:{port}" for port in (self._etcd, self._etcd_peers))
        self.start(
            "etcd",
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",
        )

    def _start_controller_manager(self) -> None:
        self.start(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--authentication-kubeconfig={self.kubeconfig}",
            f"--authorization-kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self.directory}/service-accounts.key",
            f"--root-ca-file={self.directory}/ca.crt",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._controllers}",
            f"--tls-cert-file={self.directory}/server.crt",
            f"--tls-private-key-file={self.directory}/server.key",
        )
        self._wait("kube-controller-manager", self._controllers, "/healthz")

    def start(self, name: str, *flags: str, program: str = "") -> None:
        """Start a process that ends with this one; its program is called as it is, unless said otherwise."""
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [self._binaries / (program or name), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                process_group=self._watchdog.pid,
            )

    def _wait(self, name: str, port: int, path: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        trust = ssl.create_default_context(cafile=self.directory / "ca.crt")
        while not _answers(port, path, trust):
            self.check()
            if time.monotonic() > deadline:
                raise ControlPlaneFailed(self._obituary(name, f"was not ready after {READY_SECONDS:.0f} s"))
            time.sleep(0.1)

    def check(self) -> None:
        """Raise ``ControlPlaneFailed`` if a process has ended that nobody stopped."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ControlPlaneFailed(self._obituary(name, f"ended with code {process.returncode}"))

    def _obituary(self, name: str, what: str) -> str:
        tail = "\n".join(self._log(name).read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return f"{name} {what}; the end of its log:\n{tail}"

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _issue_certificates(self) -> None:
        authority = Authority()
        hosts = ("127.0.0.1", self._address, "10.0.0.1", "localhost", "kubernetes.default.svc")
        server = authority.issue("control-plane", hosts=hosts)
        admin = authority.issue("admin", organisation="system:masters")
        files = {
            "ca.crt": authority.certificate,
            "server.crt": server.certificate,
            "server.key": server.key,
            "service-accounts.key": new_key(),
            "audit.json": json.dumps(_AUDIT).encode(),
            "kubeconfig": _kubeconfig(self.url, authority.certificate, admin.certificate, admin.key),
        }
        for name, content in files.items():
            (self.directory / name).write_bytes(content)


def _kubeconfig(url: str, authority: bytes, certificate: bytes, key: bytes) -> bytes:
    def data(content: bytes) -> str:
        return base64.b64encode(content).decode()

    user = {"client-certificate-data": data(certificate), "client-key-data": data(key)}
    # JSON is YAML.
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority-data": data(authority)}}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
    ).encode()


def _answers(port: int, path: str, trust: ssl.SSLContext) -> bool:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=trust)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> int:
    """Run a control plane until Ctrl-C."""
    try:
        directory = binaries.ensure(lambda line: print(line, file=sys.stderr, flush=True), binaries.CONTROL_PLANE)
        with ControlPlane(directory) as plane:
            print(f"KUBECONFIG={plane.kubeconfig}", flush=True)
            while True:
                time.sleep(1)  # not pause(): it would sleep on where the signal came just before it
    except (binaries.BinariesMissing, ControlPlaneFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A certificate authority for one control plane that lives for one test session."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = timedelta(days=7)
_CERTIFICATES_ONLY = x509.KeyUsage(
    key_cert_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates with a key that is never written down."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("celery-workerpool-test-ca")
        self.certificate = self._sign(self._name, self._key.public_key(), authority=True)

    def issue(self, name: str, *, organisation: str | None = None, hosts: Iterable[str] = ()) -> Identity:
        """Issue a certificate for clients and servers; to Kubernetes ``name`` is the user and ``organisation`` the group."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Identity(self._sign(_name(name, organisation), key.public_key(), hosts=hosts), _key_pem(key))

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool = False, hosts: Iterable[str] = ()
    ) -> bytes:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            subject_name=subject,
            issuer_name=self._name,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(minutes=5),
            not_valid_after=now + _LIFE,
        )
        for extension in self._extensions(key, authority, [_host(host) for host in hosts]):
            critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _extensions(
        self, key: ec.EllipticCurvePublicKey, authority: bool, hosts: list[x509.GeneralName]
    ) -> Iterator[x509.ExtensionType]:
        # What Python 3.13 and later insist on.
        yield x509.SubjectKeyIdentifier.from_public_key(key)
        yield x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        yield x509.BasicConstraints(ca=authority, path_length=None)
        if authority:
            yield _CERTIFICATES_ONLY
        else:
            yield x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        if hosts:
            yield x509.SubjectAlternativeName(hosts)


def new_key() -> bytes:
    """Return a fresh private key as PEM."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def _name(common: str, organisation: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organisation is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    return x509.Name(attributes)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    # Not PKCS8: the API server reads the public half of its service account key from this format only.
    private_format = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(serialization.Encoding.PEM, private_format, serialization.NoEncryption())

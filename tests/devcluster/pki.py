"""A throw-away certificate authority, and kubeconfigs signed by it."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAYS = 30


class Authority:
    """Signs certificates into one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubedistill-dev")])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / "ca.crt"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, file: str, common_name: str, organization: str = "", addresses: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        """A certificate for client and server use; (certificate, key) paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if organization:
            parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        names: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(a)) if a[0].isdigit() else x509.DNSName(a)
            for a in addresses
        ]
        builder = self._builder(x509.Name(parts), key).add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            ),
            critical=False,
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        certificate_path = self.folder / f"{file}.crt"
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return certificate_path, write_key(key, self.folder / f"{file}.key")

    def kubeconfig(self, file: str, server: str, common_name: str, organization: str = "") -> Path:
        """A kubeconfig with a client certificate of its own."""
        certificate, key = self.issue(file, common_name, organization)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "dev",
            "clusters": [
                {
                    "name": "dev",
                    "cluster": {"server": server, "certificate-authority": str(self.path)},
                }
            ],
            "users": [
                {
                    "name": "dev",
                    "user": {"client-certificate": str(certificate), "client-key": str(key)},
                }
            ],
            "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "dev"}}],
        }
        path = self.folder / f"{file}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=_DAYS))
        )


def write_key(key: ec.EllipticCurvePrivateKey, path: Path) -> Path:
    """Write a private key as PEM, readable to its owner only."""
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    return path


def service_account_key(path: Path) -> Path:
    """The key that signs service-account tokens."""
    return write_key(ec.generate_private_key(ec.SECP256R1()), path)

"""Certificates for servers that are tested over TLS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Certificates(NamedTuple):
    """Files in PEM."""

    authority: Path
    server: Path
    """The certificate of 127.0.0.1."""
    key: Path
    both: Path
    """The server's key and certificate in one."""


def make_certificates(folder: Path) -> Certificates:
    """Make an authority that nobody knows, and let it say who 127.0.0.1 is."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate("authority", authority_key, "authority", authority_key)
    server = _certificate("127.0.0.1", key, "authority", authority_key)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files = Certificates(*(folder / name for name in ("authority.pem", "server.pem", "key.pem", "both.pem")))
    for path, content in zip(files, (authority, server, secret, secret + server), strict=True):
        path.write_bytes(content)
        path.chmod(0o600)
    return files


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
) -> bytes:
    now = datetime.now(UTC)
    its_own = key is signer
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=its_own, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if its_own:  # Python 3.13 insists
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = certificate.add_extension(usage, critical=True)
    else:
        alternatives = x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))])
        certificate = certificate.add_extension(alternatives, critical=False)
    return certificate.sign(signer, SHA256()).public_bytes(Encoding.PEM)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

"""TLS on gRPC: the files a server is given, checked before the launch, and how a client speaks to it.

    server   --tls-cert --tls-key [--tls-client-ca], of a fleet's gateway, too: with the last one, only clients whose
             certificate it signed get in
    client   ClientTls(ca=..., cert=..., key=...)

``serve`` asks its own server too: it trusts the server's certificate itself, and presents it where clients need one.
"""

from __future__ import annotations

import argparse
import datetime
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpc_client

from hstu_trt.contract.errors import ConfigError

_OTHERS = stat.S_IRWXO
# gRPC waits ever longer, up to two minutes, before it connects again; a server that was restarted is back within 5 s.
CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """How a client proves and checks who talks. All files are PEM."""

    ca: Path
    """Certificates that are trusted to sign the server's, or the server's own."""
    cert: Path | None = None
    key: Path | None = None
    """The client's own, where the server asks for one."""
    server_name: str | None = None
    """The name that the server's certificate must hold; None: the host of the URL."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a client's certificate and its key go together: --tls-cert FILE --tls-key FILE")

    def connection(self) -> dict[str, Any]:
        """Arguments of ``tritonclient``'s client. Raises ConfigError for a file that cannot be read."""
        import grpc

        cert, key = (None if path is None else _read(path, "client's TLS file") for path in (self.cert, self.key))
        credentials = grpc.ssl_channel_credentials(_read(self.ca, "--tls-ca"), key, cert)
        named = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        return {"creds": credentials, "channel_args": [*CHANNEL_ARGS, *named]}


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """A server's certificate and key, and whose clients it takes. All files are PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """None: every client is taken."""
    server_name: str
    """One of the names in the certificate."""

    @classmethod
    def checked(cls, cert: Path, key: Path, client_ca: Path | None = None, *, asks_itself: bool = True) -> ServerTls:
        """Reads the files as the server will. Raises ConfigError for what it would fail at, or must not be given.

        asks_itself: somebody presents the server's own certificate to it (``own_client``).
        """
        cert, key = cert.resolve(), key.resolve()
        certificate = _certificates(cert, "--tls-cert")[0]
        _check_key(key, certificate)
        _check_dates(cert, certificate)
        if client_ca is not None:
            client_ca = client_ca.resolve()
            if asks_itself:
                _check_presentable(cert, certificate)
            _certificates(client_ca, "--tls-client-ca")
        return cls(cert=cert, key=key, client_ca=client_ca, server_name=_name_in(cert, certificate))

    def flags(self) -> tuple[str, ...]:
        """Triton's command line: paths, never contents."""
        shared = (f"--grpc-server-cert={self.cert}", f"--grpc-server-key={self.key}")
        if self.client_ca is None:
            return ("--grpc-use-ssl=true", *shared)
        # The mutual form implies the other, and keeps its root certificate only without it.
        return ("--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca}", *shared)

    def own_client(self) -> ClientTls:
        """How ``serve`` itself asks the server, by whatever address."""
        pair = {"cert": self.cert, "key": self.key} if self.client_ca else {}
        return ClientTls(ca=self.cert, server_name=self.server_name, **pair)


def connect(url: str, tls: ClientTls | None = None) -> Any:
    """A client of ``host:port``, which answers with its first call at the earliest."""
    return grpc_client.InferenceServerClient(
        url, **({"channel_args": CHANNEL_ARGS} if tls is None else tls.connection())
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve``, and of the gateway of ``fleet``."""
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="TLS on gRPC: the server's certificate chain")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key, for no one else to read")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="PEM", help="take only clients with a certificate signed by this one"
    )


def server_tls(args: argparse.Namespace, *, asks_itself: bool = True) -> ServerTls | None:
    """What the options of ``serve`` or ``fleet`` say; None without TLS. Raises ConfigError."""
    if args.tls_cert is None and args.tls_key is None:
        if args.tls_client_ca is not None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    if args.tls_cert is None or args.tls_key is None:
        raise ConfigError("--tls-cert and --tls-key go together")
    return ServerTls.checked(args.tls_cert, args.tls_key, args.tls_client_ca, asks_itself=asks_itself)


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """The options of programs that ask a server."""
    parser.add_argument("--tls-ca", type=Path, metavar="PEM", help="speak TLS, to servers that this certificate signed")
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="the client's certificate, under mutual TLS")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate (default: the URL's host)")


def client_tls(args: argparse.Namespace) -> ClientTls | None:
    """What the options say; None without TLS. Raises ConfigError."""
    if args.tls_ca is None:
        if args.tls_cert or args.tls_key or args.tls_name:
            raise ConfigError("--tls-cert, --tls-key and --tls-name need --tls-ca")
        return None
    return ClientTls(ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key, server_name=args.tls_name)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None


def _certificates(path: Path, what: str) -> list[Any]:
    """The certificates of a PEM file, at least one."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path, what))
    except ValueError as error:
        raise ConfigError(f"{what} {path} holds no PEM certificate: {error}") from None


def _check_key(path: Path, certificate: Any) -> None:
    from cryptography.hazmat.primitives import serialization

    content = _read(path, "--tls-key")
    if path.stat().st_mode & _OTHERS:
        raise ConfigError(f"--tls-key {path} is open to every user of this machine: chmod o= {path}")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--tls-key {path} is no private key that a server can open alone: {error}") from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"--tls-key {path} is not the key of the first certificate in --tls-cert")


def _check_dates(path: Path, certificate: Any) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= now <= end:
        raise ConfigError(f"--tls-cert {path} is valid from {begin} to {end}, and now it is {now:%Y-%m-%d %H:%M} UTC")


def _check_presentable(path: Path, certificate: Any) -> None:
    """``serve`` and the probe are clients too: they present the server's certificate, which must say that it may."""
    from cryptography import x509

    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # for any use
    if x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        raise ConfigError(
            f"--tls-cert {path} is for servers only, but under --tls-client-ca the checks that serve itself makes "
            "present it as a client: issue it with the usages serverAuth and clientAuth, signed by the clients' CA"
        )


def _name_in(path: Path, certificate: Any) -> str:
    """A DNS name or an address of the certificate: clients look at no other field."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = []
    for name in names:
        if isinstance(name, (x509.DNSName, x509.IPAddress)):
            return str(name.value)
    raise ConfigError(f"--tls-cert {path} has no subjectAltName with a DNS name or an address, which clients check")

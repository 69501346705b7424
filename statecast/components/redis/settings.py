"""How to reach a Redis server: the metadata fields that a state store and a broker on Redis share."""

import ssl
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from statecast.components.address import Address
from statecast.components.metadata import MetadataReader

_DEFAULT_PORT = 6379
_DEFAULT_SENTINEL_PORT = 26379
_DIAL_TIMEOUT = timedelta(seconds=5)
_READ_TIMEOUT = timedelta(seconds=3)

# dapr components-contrib common/component/redis/settings.go
_NOT_SUPPORTED = (
    "redisMaxRetries",
    "maxRetries",
    "redisMinRetryInterval",
    "redisMaxRetryInterval",
    "maxRetryBackoff",
    "writeTimeout",
    "poolSize",
    "minIdleConns",
    "poolTimeout",
    "maxConnAge",
    "idleTimeout",
    "idleCheckFrequency",
    "useEntraID",
    "useAzureAD",
    "useOIDC",
    "oidcTokenEndpoint",
    "oidcClientID",
    "oidcClientAssertionCert",
    "oidcClientAssertionKey",
    "oidcResource",
    "oidcAudience",
    "oidcScopes",
    "oidcKid",
    "oidcCACert",
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What AUTH is given; without a password there is no AUTH."""

    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Sentinel:
    """Where to ask for the address of the master, and by which name, which messages have as `shown_master`."""

    addresses: tuple[Address, ...]
    master: str = field(repr=False)
    shown_master: str
    credentials: Credentials


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """`address` is the server's own; with `sentinel` the server is the one that the sentinels name at each connect."""

    address: Address
    database: int = 0
    credentials: Credentials = Credentials()
    tls: ssl.SSLContext | None = None
    sentinel: Sentinel | None = None
    dial_timeout: timedelta = _DIAL_TIMEOUT
    read_timeout: timedelta = _READ_TIMEOUT


def read_settings(fields: MetadataReader) -> RedisSettings:
    """Read the connection's fields and warn about those that have no effect. Raises ComponentError."""
    fields.unsupported(*_NOT_SUPPORTED)
    if fields.choice("redisType", ("node", "cluster"), default="node") == "cluster":
        raise fields.error(
            "redisType",
            "must be node: a commit's state keys and event streams would need one hash slot of a cluster",
        )
    sentinel = _read_sentinel(fields)
    return RedisSettings(
        address=_read_addresses(fields, _DEFAULT_PORT, at_most=1)[0] if sentinel is None else sentinel.addresses[0],
        database=fields.integer("redisDB", default=0, minimum=0),
        credentials=Credentials(fields.text("redisUsername"), fields.text("redisPassword")),
        tls=_read_tls(fields),
        sentinel=sentinel,
        dial_timeout=_read_timeout(fields, "dialTimeout", _DIAL_TIMEOUT),
        read_timeout=_read_timeout(fields, "readTimeout", _READ_TIMEOUT),
    )


def _read_addresses(fields: MetadataReader, default_port: int, at_most: int | None = None) -> tuple[Address, ...]:
    port = fields.integer("redisPort", default=0, minimum=0, maximum=65535)
    addresses = fields.addresses("redisHost", default_port=port or default_port, default="localhost")
    if at_most is not None and len(addresses) > at_most:
        raise fields.error("redisHost", "takes one host; several are for failover: true")
    if port and any(address.port != port for address in addresses):
        raise fields.error("redisPort", "differs from the port in redisHost")
    return addresses


def _read_sentinel(fields: MetadataReader) -> Sentinel | None:
    credentials = Credentials(fields.text("sentinelUsername"), fields.text("sentinelPassword"))
    master = fields.text("sentinelMasterName")
    if not fields.boolean("failover"):
        return None
    if master is None:
        raise fields.error("sentinelMasterName", "is required with failover: true")
    shown_master = fields.stand_in("sentinelMasterName") or repr(master)
    return Sentinel(_read_addresses(fields, _DEFAULT_SENTINEL_PORT), master, shown_master, credentials)


def _read_tls(fields: MetadataReader) -> ssl.SSLContext | None:
    is_unverified = fields.boolean("insecureSkipTLSVerify")
    certificate, key = fields.text("clientCert"), fields.text("clientKey")
    if not fields.boolean("enableTLS"):
        return None
    context = ssl.create_default_context()
    if is_unverified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if (certificate is None) != (key is None):
        raise fields.error("clientCert", "and clientKey belong together")
    if certificate is not None and key is not None:
        try:
            _load_certificate(context, certificate, key)
        except (ssl.SSLError, OSError):
            raise fields.error("clientKey", "and clientCert must be a matching pair in PEM, not encrypted") from None
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    # OpenSSL's wrapper takes files only.
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder, "client.pem")
        pem.touch(mode=0o600)
        pem.write_text(f"{key.strip()}\n{certificate.strip()}\n")
        # Without a password given, OpenSSL asks the terminal for that of an encrypted key.
        context.load_cert_chain(pem, password=lambda: b"")


def _read_timeout(fields: MetadataReader, name: Literal["dialTimeout", "readTimeout"], default: timedelta) -> timedelta:
    # Zero is the driver's default in Dapr and a negative one is no timeout; a server that hangs must end in one.
    timeout = fields.duration(name, default=default, bare="milliseconds")
    return timeout if timeout > timedelta() else default

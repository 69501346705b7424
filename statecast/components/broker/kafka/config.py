"""The metadata of `pubsub.kafka`, read into one value."""

import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

from aiokafka import codec

from statecast.components.address import Address
from statecast.components.manifest import Component
from statecast.components.metadata import BROKER_FIELDS, MetadataReader

DEFAULT_MESSAGE_BYTES = 1024 * 1024

_DEFAULT_PORT = 9092
_SHORTEST = timedelta(milliseconds=1)

_AUTH_TYPES = ("none", "password", "mtls", "certificate", "oidc", "oidc_private_key_jwt", "awsiam")
_LOGIN_FIELDS = ("saslUsername", "saslPassword", "saslMechanism")
# Dapr's names, and Kafka's own.
_MECHANISMS = {
    "PLAIN": "PLAIN",
    "SHA-256": "SCRAM-SHA-256",
    "SHA-512": "SCRAM-SHA-512",
    "SCRAM-SHA-256": "SCRAM-SHA-256",
    "SCRAM-SHA-512": "SCRAM-SHA-512",
}

_COMPRESSIONS = {"gzip": codec.has_gzip, "snappy": codec.has_snappy, "lz4": codec.has_lz4, "zstd": codec.has_zstd}

# dapr components-contrib common/component/kafka/metadata.go, auth.go
_UNSUPPORTED = (
    *("clientCert", "clientKey", "version", "channelBufferSize", "consumeRetryEnabled", "consumeRetryInterval"),
    *("clientConnectionTopicMetadataRefreshInterval", "clientConnectionKeepAliveInterval"),
    *("dialTimeout", "readTimeout", "writeTimeout", "metadataTimeout", "producerRetryMax"),
    *("consumerGroupRebalanceStrategy", "escapeHeaders", "excludeHeaderMetaRegex"),
    *("oidcTokenEndpoint", "oidcClientID", "oidcClientSecret", "oidcScopes", "oidcExtensions"),
    *("oidcClientAssertionCert", "oidcClientAssertionKey", "oidcResource", "oidcAudience", "oidcKid"),
    *("awsRegion", "awsAccessKey", "awsSecretKey", "awsSessionToken", "awsIamRoleArn", "awsStsSessionName"),
    *("region", "accessKey", "secretKey", "sessionToken", "assumeRoleArn", "sessionName"),
    *("schemaRegistryURL", "schemaRegistryAPIKey", "schemaRegistryAPISecret", "schemaCachingEnabled"),
    *("schemaLatestVersionCacheTTL", "useAvroJSON"),
    *("backOffPolicy", "backOffDuration", "backOffInitialInterval", "backOffMaxInterval", "backOffMultiplier"),
    *("backOffRandomizationFactor", "backOffMaxElapsedTime", "backOffMaxRetries"),
)


class InitialOffset(StrEnum):
    """Where a group starts that has never committed: named as the driver's `auto_offset_reset`."""

    NEWEST = "latest"
    OLDEST = "earliest"


@dataclass(frozen=True, slots=True)
class Credentials:
    """`shown_username` is how messages name the user."""

    mechanism: str
    username: str = field(repr=False)
    password: str = field(repr=False)
    shown_username: str


@dataclass(frozen=True, slots=True)
class KafkaConfig:
    """`group` None: the one that a subscription names. `compression` None: none."""

    brokers: tuple[Address, ...]
    client_id: str
    group: str | None
    initial_offset: InitialOffset
    max_message_bytes: int
    compression: str | None
    session_timeout: timedelta
    heartbeat_interval: timedelta
    fetch_min_bytes: int
    fetch_bytes: int
    credentials: Credentials | None
    tls: bool
    skip_verify: bool
    ca_certificate: str | None

    def connection_options(self) -> dict[str, Any]:
        """Name what every client of the driver is given to connect. Reads the system's certificates for TLS."""
        options: dict[str, Any] = {
            "bootstrap_servers": [broker.text for broker in self.brokers],
            "client_id": self.client_id,
            "security_protocol": ("SASL_" if self.credentials else "") + ("SSL" if self.tls else "PLAINTEXT"),
            "ssl_context": self._ssl_context() if self.tls else None,
        }
        if self.credentials is not None:
            options["sasl_mechanism"] = self.credentials.mechanism
            options["sasl_plain_username"] = self.credentials.username
            options["sasl_plain_password"] = self.credentials.password
        # An acknowledgement that takes longer than this is asked for again on a new connection.
        options["request_timeout_ms"] = 10_000
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca_certificate)
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def parse_config(component: Component, app_id: str) -> KafkaConfig:
    """Read the metadata. Raises ComponentError."""
    reader = MetadataReader(component, BROKER_FIELDS)
    credentials = _credentials(reader)
    config = KafkaConfig(
        brokers=reader.addresses("brokers", default_port=_DEFAULT_PORT),
        client_id=reader.text("clientID", default=app_id) or app_id,
        group=reader.text("consumerGroup", default=reader.trimmed_text("consumerID")),
        initial_offset=_initial_offset(reader),
        max_message_bytes=reader.integer("maxMessageBytes", default=0, minimum=0) or DEFAULT_MESSAGE_BYTES,
        compression=_compression(reader),
        session_timeout=reader.duration("sessionTimeout", default=timedelta(seconds=10), minimum=_SHORTEST),
        heartbeat_interval=reader.duration("heartbeatInterval", default=timedelta(seconds=3), minimum=_SHORTEST),
        fetch_min_bytes=reader.integer("consumerFetchMin", default=1, minimum=1),
        fetch_bytes=reader.integer("consumerFetchDefault", default=1024 * 1024, minimum=1),
        credentials=credentials,
        # Without authentication there is no TLS either: dapr components-contrib common/component/kafka/kafka.go Init
        tls=not reader.boolean("disableTls") and credentials is not None,
        skip_verify=reader.boolean("skipVerify"),
        ca_certificate=_ca_certificate(reader),
    )
    if config.heartbeat_interval >= config.session_timeout:
        raise reader.error("heartbeatInterval", "must be shorter than sessionTimeout")
    if reader.choice("producerRequiredAcks", ["all", "local", "none"], default="all") != "all":
        raise reader.error("producerRequiredAcks", "must be all: with less, what is acknowledged can be lost")
    reader.unsupported(*_UNSUPPORTED)
    reader.finish()
    return config


def _credentials(reader: MetadataReader) -> Credentials | None:
    username, password = reader.text("saslUsername"), reader.text("saslPassword")
    mechanism = _MECHANISMS[reader.choice("saslMechanism", _MECHANISMS, default="PLAIN")]
    if _auth_type(reader) == "none":
        return None
    if username is None:
        raise reader.error("saslUsername", "is required with authType password")
    if password is None:
        raise reader.error("saslPassword", "is required with authType password")
    return Credentials(mechanism, username, password, reader.stand_in("saslUsername") or repr(username))


def _auth_type(reader: MetadataReader) -> str:
    is_required = reader.boolean("authRequired")
    kind = reader.choice("authType", _AUTH_TYPES, default="")
    if not kind:
        return _default_auth_type(reader, is_required=is_required)
    if kind not in ("none", "password"):
        raise reader.error("authType", "takes none or password in this version")
    return kind


def _default_auth_type(reader: MetadataReader, *, is_required: bool) -> str:
    """Tell what no authType means; it must not be a weaker login than the other fields ask for."""
    # dapr components-contrib common/component/kafka/metadata.go upgradeMetadata
    if is_required and reader.text("saslPassword") is None:
        raise reader.error("authRequired", "without saslPassword means authType mtls, which is not supported yet")
    if is_required:
        return "password"
    if reader.text("authRequired") is None and any(map(reader.is_given, _LOGIN_FIELDS)):
        raise reader.error("authType", f"is required beside {', '.join(_LOGIN_FIELDS)}: none or password")
    return "none"


def _initial_offset(reader: MetadataReader) -> InitialOffset:
    name = reader.choice("initialOffset", ["newest", "oldest"], default="newest")
    return InitialOffset.OLDEST if name == "oldest" else InitialOffset.NEWEST


def _compression(reader: MetadataReader) -> str | None:
    name = reader.choice("compression", ["none", "gzip", "snappy", "lz4", "zstd"], default="none")
    if name == "none":
        return None
    if not _COMPRESSIONS[name]():
        raise reader.error("compression", f"needs a package of its own: pip install 'aiokafka[{name}]'")
    return name


def _ca_certificate(reader: MetadataReader) -> str | None:
    text = reader.text("caCert")
    if text is None:
        return None
    try:
        ssl.create_default_context(cadata=text)
    except (ssl.SSLError, ValueError, TypeError):  # TypeError: there are signs in it beyond ASCII
        raise reader.error("caCert", "takes a certificate in PEM", shows_value=False) from None
    return text

"""The metadata of a `pubsub.kafka` component."""

import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from statecast.clock import SystemClock
from statecast.components.address import Address
from statecast.components.broker.broker import Message, Unreachable
from statecast.components.broker.kafka.broker import KafkaBroker
from statecast.components.broker.kafka.config import KafkaConfig, parse_config
from statecast.components.manifest import Component
from statecast.errors import ComponentError
from tests.components.certificates import make_certificate

LOGIN = {"authType": "password", "saslUsername": "clerk", "saslPassword": "s3cr3t"}


def read(*, brokers: str = "a:1", **metadata: str) -> KafkaConfig:
    return parse_config(Component("pubsub", "pubsub.kafka", metadata={"brokers": brokers, **metadata}), "orders")


def mechanism_of(**metadata: str) -> str | None:
    credentials = read(**metadata).credentials
    return None if credentials is None else credentials.mechanism


def tls_of(**metadata: str) -> ssl.SSLContext:
    context = read(**metadata).connection_options()["ssl_context"]
    assert isinstance(context, ssl.SSLContext)
    return context


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"brokers": ""}, "brokers is required"),
        ({"brokers": " , "}, "brokers takes host or host:port"),
        ({"brokers": "127.0.0.1:abc"}, "brokers takes host or host:port"),
        ({"brokers": "127.0.0.1:99999"}, "brokers takes host or host:port"),
        ({"brokers": "kafka://127.0.0.1:9092"}, "brokers takes host or host:port"),
        ({"initialOffset": "first"}, "initialOffset takes one of newest, oldest"),
        ({"authType": "mtls"}, "authType takes none or password"),
        ({"authType": "password"}, "saslUsername is required"),
        ({"authType": "password", "saslUsername": "clerk"}, "saslPassword is required"),
        ({**LOGIN, "saslMechanism": "GSSAPI"}, "saslMechanism takes one of PLAIN, SHA-256, SHA-512, SCRAM-SHA-256"),
        ({"producerRequiredAcks": "local"}, "producerRequiredAcks must be all"),
        ({"heartbeatInterval": "20s"}, "heartbeatInterval must be shorter than sessionTimeout"),
        ({"caCert": "/etc/ca.pem"}, "caCert takes a certificate in PEM"),
        ({"caCert": "é"}, "caCert takes a certificate in PEM"),
        ({"compression": "brotli"}, "compression takes one of none, gzip"),
    ],
)
def test_metadata_that_cannot_work_is_an_error_that_names_the_field(metadata: dict[str, str], complaint: str) -> None:
    with pytest.raises(ComponentError, match=complaint):
        read(**metadata)


def test_brokers_have_kafkas_port_unless_they_say_another() -> None:
    assert read(brokers="one, two:1, ::1").brokers == (Address("one", 9092), Address("two", 1), Address("::1", 9092))


def test_bare_intervals_are_in_seconds_as_dapr_reads_them() -> None:
    config = read(sessionTimeout="30", heartbeatInterval="5")

    assert (config.session_timeout, config.heartbeat_interval) == (timedelta(seconds=30), timedelta(seconds=5))


def test_a_consumer_id_is_the_group_where_none_is_given() -> None:
    assert read(consumerGroup="g", consumerID="c").group == "g"
    assert read(consumerID=" c ").group == "c"
    assert read(consumerID="  ").group is None


# The login


def test_without_a_word_of_a_login_there_is_none() -> None:
    assert mechanism_of() is None
    assert mechanism_of(authType="none", saslUsername="clerk") is None


@pytest.mark.parametrize("metadata", [{"saslUsername": "clerk"}, {"saslPassword": ""}, {"saslMechanism": "SHA-256"}])
def test_fields_of_a_login_without_its_type_are_an_error(metadata: dict[str, str]) -> None:
    with pytest.raises(ComponentError, match="authType is required beside saslUsername, saslPassword"):
        read(**metadata)


@pytest.mark.parametrize(
    ("word", "mechanism"),
    [
        ("", "PLAIN"),
        ("plain", "PLAIN"),
        ("SHA-256", "SCRAM-SHA-256"),
        ("sha-512", "SCRAM-SHA-512"),
        ("SCRAM-SHA-256", "SCRAM-SHA-256"),
        ("SCRAM-SHA-512", "SCRAM-SHA-512"),
    ],
)
def test_mechanisms_have_daprs_names_and_kafkas(word: str, mechanism: str) -> None:
    assert mechanism_of(**LOGIN, saslMechanism=word) == mechanism


def test_auth_required_is_what_it_was_in_dapr() -> None:
    assert mechanism_of(authRequired="true", saslUsername="clerk", saslPassword="s3cr3t") == "PLAIN"
    assert mechanism_of(authRequired="false", saslUsername="clerk", saslPassword="s3cr3t") is None
    assert mechanism_of(authRequired="true", authType="none") is None
    with pytest.raises(ComponentError, match="authRequired without saslPassword means authType mtls"):
        read(authRequired="true", saslUsername="clerk")


# TLS


def test_tls_comes_with_a_login_unless_it_is_turned_off() -> None:
    assert read(**LOGIN).connection_options()["security_protocol"] == "SASL_SSL"
    assert read(**LOGIN, disableTls="true").connection_options()["security_protocol"] == "SASL_PLAINTEXT"
    assert read(authType="none").connection_options()["security_protocol"] == "PLAINTEXT"


def test_the_server_is_verified_unless_told_otherwise() -> None:
    verifying, trusting = tls_of(**LOGIN), tls_of(**LOGIN, skipVerify="true")

    assert (verifying.verify_mode, verifying.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (trusting.verify_mode, trusting.check_hostname) == (ssl.CERT_NONE, False)


def test_only_the_authority_that_is_given_is_trusted(tmp_path: Path) -> None:
    context = tls_of(**LOGIN, caCert=make_certificate(tmp_path).certificate)

    assert [dict(each)["subject"] for each in context.get_ca_certs()] == [((("commonName", "127.0.0.1"),),)]


# Secrets


async def test_no_secret_is_in_a_reason_or_a_repr() -> None:
    metadata = {**LOGIN, "saslUsername": "s3cr3t-user", "brokers": "127.0.0.1:1", "disableTls": "true"}
    secret_fields = frozenset({"saslusername", "saslpassword", "brokers"})
    component = Component("pubsub", "pubsub.kafka", metadata=metadata, secret_fields=secret_fields)

    async with KafkaBroker(component, app_id="orders", clock=SystemClock()) as broker:
        (outcome,) = await broker.publish([Message("t", b"1")], timedelta(seconds=10))

    assert isinstance(outcome, Unreachable)
    assert "as <saslUsername> by PLAIN: ConnectionRefusedError at <brokers>" in outcome.reason
    config = repr(parse_config(component, "orders"))
    assert "s3cr3t" not in config
    assert "127.0.0.1" not in config

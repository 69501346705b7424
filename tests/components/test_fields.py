"""Every metadata field that Dapr has for one of our types is read, or warned about by its name."""

import pytest

from statecast import Runtime
from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.registry import BUILT_IN, STATE_CATEGORY

# dapr components-contrib common/component/redis/settings.go
REDIS = """
    redisHost redisPort redisUsername redisPassword redisDB redisType enableTLS insecureSkipTLSVerify clientCert
    clientKey failover sentinelMasterName sentinelUsername sentinelPassword dialTimeout readTimeout
"""
NOT_YET_REDIS = """
    redisMaxRetries maxRetries redisMinRetryInterval redisMaxRetryInterval maxRetryBackoff writeTimeout poolSize
    minIdleConns poolTimeout maxConnAge idleTimeout idleCheckFrequency useEntraID useAzureAD useOIDC oidcTokenEndpoint
    oidcClientID oidcClientAssertionCert oidcClientAssertionKey oidcResource oidcAudience oidcScopes oidcKid oidcCACert
"""

# dapr pkg/components/state, pkg/outbox, pkg/runtime/pubsub/outbox.go
STATE = """
    keyPrefix ttlInSeconds outboxPublishPubsub outboxPublishTopic outboxPubsub outboxDiscardWhenMissingState
"""

READ = {
    "state.in-memory": STATE,
    "state.redis": STATE + REDIS,
    # dapr components-contrib common/authentication/postgresql/metadata.go, state/postgresql/v2/metadata.go
    "state.postgresql": STATE
    + """
        connectionString url host hostaddr port database user password sslRootCert timeout timeoutInSeconds
        cleanupInterval cleanupIntervalInSeconds metadataTableName tablePrefix maxConns
    """,
    # dapr components-contrib common/authentication/sqlite/metadata.go, state/sqlite/sqlite_dbaccess.go
    "state.sqlite": STATE
    + """
        connectionString url timeout timeoutInSeconds busyTimeout disableWAL tableName metadataTableName
        cleanupInterval cleanupIntervalInSeconds
    """,
    "pubsub.in-memory": "",
    # dapr components-contrib pubsub/redis/metadata.yaml
    "pubsub.redis": REDIS + "consumerID processingTimeout redeliverInterval queueDepth maxLenApprox streamTTL",
    # dapr components-contrib common/component/kafka/metadata.go
    "pubsub.kafka": """
        brokers authType authRequired saslUsername saslPassword saslMechanism caCert skipVerify disableTls consumerGroup
        consumerID clientID initialOffset maxMessageBytes heartbeatInterval sessionTimeout consumerFetchMin
        consumerFetchDefault producerRequiredAcks compression
    """,
}
NOT_YET = {
    "state.redis": NOT_YET_REDIS + "queryIndexes",
    "state.postgresql": """
        connectionMaxIdleTime queryExecMode useAzureAD useAWSIAM awsRegion awsAccessKey awsSecretKey awsSessionToken
        awsIamRoleArn
    """,
    "pubsub.redis": NOT_YET_REDIS + "concurrency",
    "pubsub.kafka": """
        oidcTokenEndpoint oidcClientID oidcClientSecret oidcScopes oidcExtensions oidcClientAssertionCert
        oidcClientAssertionKey oidcResource oidcAudience oidcKid awsRegion region awsAccessKey accessKey awsSecretKey
        secretKey awsSessionToken sessionToken awsIamRoleArn assumeRoleArn awsStsSessionName sessionName clientCert
        clientKey consumeRetryEnabled consumeRetryInterval version channelBufferSize consumerGroupRebalanceStrategy
        clientConnectionTopicMetadataRefreshInterval clientConnectionKeepAliveInterval dialTimeout readTimeout
        writeTimeout metadataTimeout producerRetryMax escapeHeaders excludeHeaderMetaRegex schemaRegistryURL
        schemaRegistryAPIKey schemaRegistryAPISecret schemaCachingEnabled schemaLatestVersionCacheTTL useAvroJSON
        backOffPolicy backOffDuration backOffInitialInterval backOffMaxInterval backOffMultiplier
        backOffRandomizationFactor backOffMaxElapsedTime backOffMaxRetries
    """,
}
REQUIRED = {
    "state.postgresql": {"host": "localhost"},
    "state.sqlite": {"connectionString": ":memory:"},
    "pubsub.kafka": {"brokers": "localhost", "authType": "none"},
}


def each_of(fields: dict[str, str]) -> list[tuple[str, str]]:
    return [(type, name) for type, names in fields.items() for name in names.split()]


def make(type: str, field: str, value: str) -> None:
    metadata = {field: value, **REQUIRED.get(type, {})}
    component = Component("x", type, "v2" if type == "state.postgresql" else "", metadata)
    factory = BUILT_IN.state_store if type.startswith(STATE_CATEGORY) else BUILT_IN.broker
    factory(component, app_id="orders", clock=SystemClock())


@pytest.mark.parametrize(("type", "field"), each_of(READ))
def test_a_field_that_is_read_is_not_warned_about(type: str, field: str, caplog: pytest.LogCaptureFixture) -> None:
    make(type, field, "")

    assert not caplog.records


@pytest.mark.parametrize(("type", "field"), each_of(NOT_YET))
def test_a_field_that_has_no_effect_yet_is_warned_about(
    type: str, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(type, field, "1")

    assert [record.getMessage() for record in caplog.records] == [
        f"component 'x': {field} is not supported yet and has no effect"
    ]


@pytest.mark.parametrize(
    ("type", "field"),
    [
        ("state.in-memory", "actorStateStore"),
        *(("pubsub.in-memory", field) for field in ("allowedTopics", "publishingScopes", "subscriptionScopes")),
        ("pubsub.in-memory", "protectedTopics"),
    ],
)
async def test_a_field_of_the_runtime_that_has_no_effect_yet_is_warned_about(
    type: str, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Runtime.open(Component("x", type, metadata={field: "true"}), app_id="orders", environment={}):
        pass

    assert f"component 'x': {field} is not supported yet and has no effect" in caplog.messages


async def test_what_steers_daprs_way_of_the_outbox_is_accepted_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    outbox = {"outboxPublishPubsub": "bus", "outboxPublishTopic": "t"}
    metadata = {**outbox, "outboxPubsub": "other", "outboxDiscardWhenMissingState": "true"}
    components = [Component("x", "state.in-memory", metadata=metadata), Component("bus", "pubsub.in-memory")]

    async with Runtime.open(components, app_id="orders", environment={}):
        pass

    assert not caplog.records

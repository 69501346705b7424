"""Why there is no connection to Kafka: the driver tells that to its log, and to nobody else."""

import asyncio
import ssl
from typing import Any

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError

from statecast.components.broker.kafka.config import KafkaConfig

_SECONDS = 2.0


async def explain(error: BaseException, config: KafkaConfig) -> str:
    """Tell in words why a client could not connect; where a login may be the reason, try one more, for 2 s at most."""
    if config.credentials is None or not isinstance(error, KafkaConnectionError):
        return text_of(error, config)
    reasons = await _ask_each(config)
    # A broker that answers and refuses tells more than one that is away.
    refusals = [reason for reason in reasons if isinstance(reason, KafkaError | ssl.SSLError)]
    reason = next(iter([*refusals, *reasons]), error)
    login = config.credentials
    return f"as {login.shown_username} by {login.mechanism}: {text_of(reason, config)}"


def text_of(error: BaseException, config: KafkaConfig) -> str:
    stand_in = config.brokers[0].stand_in
    # What the system says, and the driver of a connection, has the address in it.
    if stand_in is not None and isinstance(error, OSError | KafkaConnectionError):
        return f"{type(error).__name__} at {stand_in}"
    return str(error) or type(error).__name__


async def _ask_each(config: KafkaConfig) -> list[Exception]:
    options = config.connection_options()
    hosts = collect_hosts(options.pop("bootstrap_servers"), randomize=False)
    answers = await asyncio.gather(*(_ask(host, port, options) for host, port, _ in hosts))
    return [error for error in answers if error is not None]


async def _ask(host: str, port: int, options: dict[str, Any]) -> Exception | None:
    try:
        async with asyncio.timeout(_SECONDS):
            connection = await create_conn(host, port, **options)
    except (KafkaError, OSError) as error:
        return error
    connection.close()
    return None

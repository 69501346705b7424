"""What Kafka's error codes say: of a message, of a topic, or of neither."""

from aiokafka.errors import (
    BrokerResponseError,
    ClusterAuthorizationFailedError,
    CorruptRecordException,
    InvalidTimestampError,
    InvalidTopicError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnsupportedForMessageFormatError,
    UnsupportedVersionError,
    for_code,
    kafka_errors,
)


class UnsupportedCompressionTypeError(BrokerResponseError):  # type: ignore[misc]  # the driver has no types
    """A code that the driver takes for an unexpected server error, as the next one."""

    errno = 76
    message = "UNSUPPORTED_COMPRESSION_TYPE"
    description = "The requesting client does not support the compression type of given partition."


class InvalidRecordError(BrokerResponseError):  # type: ignore[misc]  # the driver has no types
    """A compacted topic refuses a record without key."""

    errno = 87
    message = "INVALID_RECORD"
    description = "The record failed the validation on the broker."


for unnamed in (UnsupportedCompressionTypeError, InvalidRecordError):
    kafka_errors.setdefault(unnamed.errno, unnamed)

ABOUT_MESSAGE = (MessageSizeTooLargeError, RecordListTooLargeError, CorruptRecordException, InvalidRecordError)

# A record is stamped when it is sent: a clock that the topic does not accept is no fault of the message.
ABOUT_TOPIC = (
    *(TopicAuthorizationFailedError, ClusterAuthorizationFailedError, InvalidTopicError, PolicyViolationError),
    *(InvalidTimestampError, UnsupportedForMessageFormatError, UnsupportedVersionError),
    UnsupportedCompressionTypeError,
)


def describe(code: int) -> str:
    """Tell in words what Kafka answered; the driver has one name for all codes that it does not know."""
    error = for_code(code)
    return f"{error.message} ({code}): {error.description}"

import pytest

from statecast.components.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("redis", Address("redis", 6379)),
        ("my_redis.example.:6380", Address("my_redis.example.", 6380)),
        ("größe.example", Address("größe.example", 6379)),
        (" 127.0.0.1:1 ", Address("127.0.0.1", 1)),
        ("::1", Address("::1", 6379)),
        ("[::1]:6380", Address("::1", 6380)),
        ("[::1]", Address("::1", 6379)),
        ("fe80::1%eth0", Address("fe80::1%eth0", 6379)),
    ],
)
def test_an_address_has_a_port_or_the_default_one(text: str, address: Address) -> None:
    assert parse_address(text, 6379) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ":6379", "redis:", "redis:port", "redis:0", "redis:65536", "redis:-1", "redis:000001", "[::1", "::1]:1"),
        *("redis://:s3cr3t@127.0.0.1:1", ":s3cr3t@127.0.0.1:1", "u@h:1", "h/0", "a b", "a:b:c", "h?x", "\ud83d"),
        *("h" * 64, "a..b", "a\0"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is some library's, and is not for being shown
        parse_address(text, 6379)


def test_drivers_are_given_the_address_and_messages_its_stand_in() -> None:
    address = parse_address("[::1]:1", 6379, "<redisHost>")

    assert address.text == "[::1]:1"
    assert (str(address), repr(address)) == ("<redisHost>", "Address(<redisHost>)")


def test_what_the_system_says_of_a_secret_address_is_left_out() -> None:
    error = ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)")

    assert Address("127.0.0.1", 1).reason(error) == "[Errno 111] Connect call failed ('127.0.0.1', 1)"
    assert Address("127.0.0.1", 1, "<redisHost>").reason(error) == "ConnectionRefusedError"
    assert Address("127.0.0.1", 1, "<redisHost>").reason(ValueError("WRONGPASS")) == "WRONGPASS"

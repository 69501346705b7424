"""Contract suites: pytest classes that prove a backend keeps what its seam's docstrings promise."""

from statecast.components.testing.broker import BrokerContract
from statecast.components.testing.log import OutboxLogContract
from statecast.components.testing.state import SharedStateStoreContract, StateStoreContract

__all__ = ["BrokerContract", "OutboxLogContract", "SharedStateStoreContract", "StateStoreContract"]

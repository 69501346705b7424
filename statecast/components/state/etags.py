"""Drawing etags."""

import os
from random import Random

from statecast.components.state.commit import ETag

_random = Random()
if hasattr(os, "register_at_fork"):
    # Two processes that fork from one must not draw the same.
    os.register_at_fork(after_in_child=_random.seed)


def new_etag() -> ETag:
    """Draw a random UUID (RFC 9562 §5.4) as text, as Dapr does; `str(uuid.uuid4())` takes twice as long."""
    digits = f"{_random.getrandbits(128):032x}"
    return ETag(f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}")

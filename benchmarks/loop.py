"""`run`: uvloop's where it is installed, as that of a real app, else asyncio's."""

try:
    from uvloop import run as run
except ImportError:
    from asyncio import run as run  # type: ignore[assignment]

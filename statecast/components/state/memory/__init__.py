from statecast.components.state.memory.state import MemoryStateStore

__all__ = ["MemoryStateStore"]

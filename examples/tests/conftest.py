pytest_plugins = ["statecast.testing.fixtures"]

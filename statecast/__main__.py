"""`python -m statecast` is the command line."""

from statecast.runtime.cli import main

if __name__ == "__main__":
    main()

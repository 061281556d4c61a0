"""`python -m nexus_core`, the same as `nexus`."""

from nexus_core.cli import main

if __name__ == "__main__":
    main()

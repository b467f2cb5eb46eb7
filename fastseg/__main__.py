"""`python -m fastseg`: the command line, for launchers such as torchrun."""

from fastseg.cli import main

if __name__ == "__main__":
    main()

"""`python -m spikeloom`, as `torchrun -m spikeloom` needs it."""

from spikeloom.cli import main

if __name__ == "__main__":
    main()

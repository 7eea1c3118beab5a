"""``python -m hpm`` and ``torchrun -m hpm``: the same as the command ``hpm``."""

from hpm.cli import main

if __name__ == "__main__":
    main()

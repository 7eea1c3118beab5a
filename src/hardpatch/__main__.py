"""``python -m hardpatch`` and ``torchrun -m hardpatch``: the same as the command ``hardpatch``."""

from hardpatch.cli import main

if __name__ == "__main__":
    main()

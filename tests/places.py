"""Where the tests find what is not theirs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The project."""
SHARED = ROOT.parent / "shared"
"""Images and reference numbers beside the project; tests that need them skip where they are absent."""

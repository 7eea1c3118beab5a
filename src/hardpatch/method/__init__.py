"""Hard Patches Mining itself: torch and timm only, no config, no data, no files."""

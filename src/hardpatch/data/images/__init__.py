"""One image: from bytes to pixels to crops."""

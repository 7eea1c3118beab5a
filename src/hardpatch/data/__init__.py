"""Where images come from, how they are decoded, cut and ordered."""

"""Features and difficulty of every image of a source, as a table. See :mod:`hardpatch.embed.embed`."""

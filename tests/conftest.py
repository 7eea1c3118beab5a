"""Shape types are enforced in every test."""

from jaxtyping import install_import_hook

install_import_hook("hpm", "beartype.beartype")

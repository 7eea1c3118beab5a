"""Shape types are enforced in every test, and torch uses one thread where tests compare bits."""

from jaxtyping import install_import_hook

install_import_hook("hpm", "beartype.beartype").install()

"""Shape and type annotations of hpm are enforced in every test."""

from jaxtyping import install_import_hook

install_import_hook("hpm", "shape_checking.typechecker")

"""Shape and type annotations of hardpatch are enforced in every test."""

from jaxtyping import install_import_hook

install_import_hook("hardpatch", "shape_checking.typechecker")

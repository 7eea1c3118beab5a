"""``hardpatch evaluate NAME``: every row of the table of evaluations by the same lines."""

from __future__ import annotations

from importlib import import_module

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_section, show
from hardpatch.config.evaluations import EVALUATIONS


def evaluate(name: str, arguments: list[str]) -> None:
    """Measure, print, keep, and say what to do next.

    Args:
        name: Of the evaluation.
        arguments: The words after it.
    """
    row = EVALUATIONS[name]
    config, as_json = parse(row.config, f"evaluate {name}", arguments)

    from hardpatch.evaluate.result import keep
    from hardpatch.runtime.distributed import is_main_of_environment

    module = import_module(row.module)
    result = module.run(config)
    if not is_main_of_environment():
        return
    figures = result.figures()
    print_section(module.describe(figures))
    keep(result, config)
    show("\n".join(result.what_next(config)))
    if as_json:
        print_json(figures)

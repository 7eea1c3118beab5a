"""``hardpatch data check``."""

from __future__ import annotations

from collections.abc import Sequence

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table, show
from hardpatch.runtime.text import quoted

_SHOWN = 20
"""Lines of a long list that are printed."""


def source_first(arguments: list[str]) -> list[str]:
    """``--data SRC`` may be written for the positional SRC."""
    for number, word in enumerate(arguments):
        if word == "--data" and number + 1 < len(arguments):
            return [arguments[number + 1], *arguments[:number], *arguments[number + 2 :]]
        if word.startswith("--data="):
            return [word.removeprefix("--data="), *arguments[:number], *arguments[number + 1 :]]
    return arguments


def data_check(arguments: list[str]) -> None:
    """``hardpatch data check``."""
    from hardpatch.config.commands import CheckConfig

    config, as_json = parse(CheckConfig, "data check", source_first(arguments))

    from hardpatch.data.tools.check import check

    result, data = check.run(config), config.data
    print_table(("", "files"), _counts(result))
    for title, counts in (
        ("part", result.parts),
        ("class", dict(list(result.classes.items())[:10])),
        ("format", result.formats),
        ("channels", result.channels),
        ("depth", result.depths),
        ("size", dict(list(result.sizes.items())[:10])),
    ):
        if counts:
            show()
            print_table((title, "images"), [(name, f"{count:,}") for name, count in counts.items()])
            if title == "class" and len(result.classes) > len(counts):
                show(f"... and {len(result.classes) - len(counts):,} more (--json has all)")
    if result.loaded:
        show()
        rows = [(name, *(f"{value:,.0f}" for value in spread.values())) for name, spread in
                (("width", result.width), ("height", result.height))]  # fmt: skip
        print_table(("pixels", "lowest", "median", "highest"), rows)
    if result.value_range:
        low, high = result.value_range
        show(f"\nvalues of images that are not 8-bit: {low:g} to {high:g}")
        if result.advice:
            show(f"mind:  {result.advice}")
    if result.damaged:
        show()
        print_table(
            ("damaged", "reason"), [(_below(data, name), _short(reason)) for name, reason in result.damaged[:_SHOWN]]
        )
        _more(result.damaged)
    _print_groups("the same bytes", result.duplicates, data)
    _print_groups("look the same", result.near_duplicates, data)
    if result.skipped:
        show()
        print_table(("skipped: no ending of an image",), [(_below(data, name),) for name in result.skipped[:_SHOWN]])
        _more(result.skipped)
    show()
    for line in _next_steps(config, result):
        show(line)
    if as_json:
        print_json(check.as_json(result))


def _counts(result) -> list[tuple[str, str]]:  # type: ignore[no-untyped-def]  # importing its type imports torch
    """The figures on top."""
    share = f" ({len(result.damaged) / max(1, result.loaded + len(result.damaged)):.1%})" if result.damaged else ""
    counts = {
        "all": result.files,
        "loaded": result.loaded,
        "damaged": f"{len(result.damaged):,}{share}",
        "skipped": len(result.skipped),
        "with alpha": result.alpha,
        "with pixels without data": result.without_data,
        "set upright": result.turned,
        "first frame or page only": result.animated,
        "of one value all over": len(result.constant),
        "copies of another file": sum(len(group) - 1 for group in result.duplicates),
        "near duplicates": sum(len(group) - 1 for group in result.near_duplicates),
    }
    always = ("all", "loaded", "damaged", "skipped", "copies of another file", "near duplicates")
    return [
        (name, f"{count:,}" if isinstance(count, int) else count)
        for name, count in counts.items()
        if count or name in always
    ]


def _print_groups(title: str, groups: Sequence[Sequence[str]], data: str) -> None:
    if groups:
        rows = []
        for group in groups[:_SHOWN]:
            first, *others = (_below(data, name) for name in group[:4])
            more = f" and {len(group) - 4:,} more" if len(group) > 4 else ""
            rows.append((f"{len(group):,}", first, ", ".join(others) + more))
        show()
        print_table((title, "first", "others"), rows)
        _more(groups)


def _below(data: str, name: str) -> str:
    """A file's name below the folder that was given."""
    return name.removeprefix(data.rstrip("/") + "/")


def _more(items: Sequence[object]) -> None:
    if len(items) > _SHOWN:
        show(f"... and {len(items) - _SHOWN:,} more (--json has all)")


def _short(reason: str, most: int = 100) -> str:
    return reason if len(reason) <= most else reason[: most - 1] + "…"


def _next_steps(config, result) -> list[str]:  # type: ignore[no-untyped-def]
    """What to do with what was found."""
    from pathlib import Path

    data, lines = config.data, []
    if config.out:
        out = Path(config.out)
        lines.append(f"look:  {out / 'contact_sheet.png'}, {out / 'images.csv'}")
    good = next((file for name in ("good.txt", "good.csv") if (file := Path(config.out) / name).is_file()), None)
    if config.out and good and (result.damaged or result.duplicates):
        data = str(good)
        lines.append(f"{good} lists the files that load, one of each kind of copy")
    if not result.loaded:
        return [*lines, "nothing can be learnt from: no file could be read"]
    if len(set(result.depths) - {"1-bit", "2-bit", "4-bit", "8-bit"}) > 1:
        lines.append("images of several depths would share one value range: better make a run of each")
    channels = {int(name): count for name, count in result.channels.items()}
    most = 3 if set(channels) <= {1, 3} else max(channels, key=lambda number: (channels[number], number))
    flags = "" if most == 3 else f"--channels {most} "
    if not set(channels) <= {1, 3} and len(channels) > 1:
        lines.append(f"the images have different numbers of channels ({', '.join(result.channels)}); "
                     "a run reads them all as --channels, and leaves those out that do not fit")  # fmt: skip
    lines.append(f"next:  hardpatch pretrain --data {quoted(data)} {flags}--out runs/first")
    return lines


def data_stats(arguments: list[str]) -> None:
    """``hardpatch data stats``."""
    from hardpatch.config.commands import StatsConfig

    config, as_json = parse(StatsConfig, "data stats", source_first(arguments))

    from hardpatch.data.tools import stats

    result = stats.run(config)
    rows = [
        (str(number), f"{mean:.6f}", f"{std:.6f}") for number, (mean, std) in enumerate(zip(result.mean, result.std))
    ]
    print_table(("channel", "mean", "std"), rows)
    left_out = f"; {len(result.damaged):,} damaged left out" if result.damaged else ""
    show(f"\n{result.images:,} images{left_out}; values in 0..1")
    for name, reason in result.damaged[:_SHOWN]:
        show(f"  {_below(config.data, name)}: {_short(reason)}")
    _more(result.damaged)
    show(f"next:  hardpatch pretrain {stats.flags(config, result)} --out runs/first")
    if as_json:
        print_json(result._asdict() | {"damaged": [{"path": name, "reason": why} for name, why in result.damaged]})


def data_pack(arguments: list[str]) -> None:
    """``hardpatch data pack``."""
    from hardpatch.config.commands import PackConfig

    config, as_json = parse(PackConfig, "data pack", source_first(arguments))

    from hardpatch.data.tools import pack
    from hardpatch.runtime.signals import stopped_by_signals

    with stopped_by_signals():
        result = pack.run(config)
    print_table(
        ("", ""),
        [
            ("images", f"{result.images:,}"),
            ("as they were", f"{result.as_they_were:,}"),
            ("damaged, left out", f"{len(result.damaged):,}"),
            ("shards", f"{len(result.shards):,}"),
            ("MB", f"{result.bytes / 1e6:,.1f}"),
            ("labels", "yes" if result.labelled else "no"),
        ],
    )
    for damage in result.damaged[:_SHOWN]:
        show(f"  {_below(config.data, damage.name)}: {_short(damage.reason)}")
    if len(result.damaged) > _SHOWN:
        show(f"... and {len(result.damaged) - _SHOWN:,} more; {result.out}/index.json lists them all")
    flags = "" if result.channels == 3 else f" --channels {result.channels}"
    flags += "" if config.no_data is None else f" --no-data {config.no_data:g}"
    show(f"next:  hardpatch pretrain --data {quoted(result.out + '/*.tar')}{flags} --out runs/first")
    if as_json:
        print_json(pack.as_json(result))

"""``hardpatch convert``, ``hardpatch export``."""

from __future__ import annotations

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table, show
from hardpatch.runtime.text import quoted


def convert(arguments: list[str]) -> None:
    """``hardpatch convert``."""
    from hardpatch.config.commands import ConvertConfig

    config, as_json = parse(ConvertConfig, "convert", arguments)

    from hardpatch.weights import convert

    result = convert.run(config)
    rows = [
        ("holds", ", ".join(result.parts)),
        ("teacher", result.teacher or "none"),
        ("encoder", f"{result.encoder}, {result.encoder_heads} heads"),
        ("image size", f"{result.image_size[0]}x{result.image_size[1]}, patches of {result.patch_size}"),
        ("tensors", str(result.tensors)),
    ]
    if result.decoder_heads is not None:
        rows.insert(3, ("decoders", f"{result.decoder_heads} heads"))
    if result.left_aside:
        rows.append(("left aside", ", ".join(result.left_aside)))
    print_table((result.to, result.kind), rows)
    if result.kind == "checkpoint":
        show(
            f"\nnext:  hardpatch visualize --checkpoint {quoted(result.to)} --images shapes:8 --out hard.png    "
            "# or your own images\n"
            f"use:   --init-from {quoted(result.to)} in hardpatch pretrain"
        )
    elif result.kind == "encoder":
        show(
            "\nuse:   import hardpatch\n"
            f'       backbone = hardpatch.load_encoder("{result.to}")    # a plain timm model'
        )
        show("       features = backbone.forward_features(images)")
    else:
        show(f'\nuse:   import torch\n       state = torch.load("{result.to}", weights_only=True)["model"]')
        show("       model.load_state_dict(state)    # build it with the heads above: the file does not say them")
    if as_json:
        print_json(result._asdict())


def export(arguments: list[str]) -> None:
    """``hardpatch export``."""
    from hardpatch.config.commands import ExportConfig

    config, as_json = parse(ExportConfig, "export", arguments)

    from hardpatch.export import export as command

    result = command.run(config)
    print_table(
        (result.out, result.format),
        [
            ("parameters", f"{result.parameters:,}"),
            ("size", f"{result.bytes / 1e6:,.1f} MB"),
            (
                "puts out",
                {
                    "tokens": "all tokens",
                    "class": "class token",
                    "mean": "mean of the patches",
                    "scores": "scores of the classes",
                }[result.output],
            ),
            ("checked", f"loaded back; features differ by at most {result.max_difference:.1e}"),
            ("model card", f"{result.card}  (data and licence are yours to fill in)"),
        ],
    )
    show("\nuse:   " + "\n       ".join(result.usage))
    if as_json:
        print_json(result._asdict())

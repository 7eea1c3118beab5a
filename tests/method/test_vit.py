"""The encoder is the stock timm model, and patches are where they are said to be."""

import math
import re

import pytest
import timm
import torch

from hardpatch.method.vit import (
    class_attention,
    create_encoder,
    encode,
    encode_with_attention,
    fix_positions,
    grid_size,
    initialise,
    patch_size,
    patchify,
    project,
    sincos_positions,
    take,
    unpatchify,
)
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)
SMALL = {"width": 32, "depth": 2, "heads": 2}
# Class token; registers alone; distillation token; timm's own test models; norm before the blocks; class token and
# registers; no prefix token at all; RMS norm.
MODELS = [
    "vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256", "deit_tiny_distilled_patch16_224",
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "aimv2_large_patch14_224",
]  # fmt: skip
MAP_POOLED = ("test_vit3", "vit_base_patch16_siglip_224")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(name="vit_tiny_patch16_224", *, rows=3, columns=2, channels=3):
    patch = 14 if "patch14" in name else 16
    torch.manual_seed(0)
    return create_encoder(name, image_size=(rows * patch, columns * patch), channels=channels, **SMALL).eval()


def images_for(vit, batch=2):
    height, width = vit.patch_embed.img_size
    channels = vit.patch_embed.proj.in_channels
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_encode_equals_timm(name):
    vit = tiny(name)
    images = images_for(vit)
    expected = vit.forward_features(images)
    prefix, patches = expected.tensor_split([vit.num_prefix_tokens], dim=1)
    assert grid_size(vit) == (3, 2)
    assert patches.shape[1] == 6
    torch.testing.assert_close(encode(vit, images), expected)
    in_order = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(encode(vit, images, in_order), expected)
    order = torch.stack([torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([5, 4, 3, 2, 1, 0])])
    permuted = encode(vit, images, order)
    torch.testing.assert_close(permuted, torch.cat([prefix, take(patches, order)], dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_encoding_some_patches_equals_the_blocks_on_these_tokens(name):
    vit = tiny(name)
    images, visible = images_for(vit), torch.tensor([[0, 4], [2, 5]])
    all_tokens, actual = vit._pos_embed(vit.patch_embed(images)), encode(vit, images, visible)
    for b in range(2):
        chosen = [*range(vit.num_prefix_tokens), *(vit.num_prefix_tokens + n for n in visible[b].tolist())]
        expected = vit.norm(vit.blocks(vit.norm_pre(all_tokens[b : b + 1, chosen])))
        torch.testing.assert_close(actual[b : b + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("patch", "channels"), [((8, 8), 3), ((4, 6), 1), ((2, 3), 13)])
def test_projecting_some_patches_equals_the_convolution_of_whole_images(patch, channels, precision):
    """In float32 but for rounding: any order of n sums stays within n half units in the last place of sum |w x|."""
    convolution = torch.nn.Conv2d(channels, 16, kernel_size=patch, stride=patch)
    images = torch.randn(3, channels, 4 * patch[0], 5 * patch[1])
    some = torch.stack([torch.randperm(20)[:7] for _ in range(6)])  # two views of each image
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        whole = take(convolution(images).flatten(2).transpose(1, 2), some)
        alone = project(convolution, take(patchify(images, patch), some))
    assert alone.dtype == whole.dtype == precision
    if precision == torch.float32:
        magnitude = take(
            torch.nn.functional.conv2d(images.abs(), convolution.weight.abs(), convolution.bias.abs(), stride=patch)
            .flatten(2).transpose(1, 2), some
        )  # fmt: skip
        summands = channels * patch[0] * patch[1] + 1
        assert ((alone - whole).abs() <= 2 * summands * 2**-24 * magnitude).all()
    else:
        torch.testing.assert_close(alone, whole, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("grid", [(1, 4), (5, 2), (3, 3)])
def test_any_number_of_channels_and_any_grid(grid, channels):
    vit = tiny(rows=grid[0], columns=grid[1], channels=channels)
    assert grid_size(vit) == grid
    assert patch_size(vit) == (16, 16)
    assert encode(vit, images_for(vit)).shape == (2, 1 + grid[0] * grid[1], 32)
    torch.testing.assert_close(vit.pos_embed[0, 1:], sincos_positions(grid, 32))


@pytest.mark.parametrize(
    ("grid", "patch", "channels"), [((2, 3), (4, 4), 3), ((3, 1), (2, 5), 1), ((1, 2), (3, 2), 13)]
)
def test_patchify_equals_a_loop_with_channels_last(grid, patch, channels):
    images = torch.randn(2, channels, grid[0] * patch[0], grid[1] * patch[1])
    patches = patchify(images, patch)
    assert patches.shape == (2, grid[0] * grid[1], patch[0] * patch[1] * channels)
    for b, row, column in torch.cartesian_prod(*map(torch.arange, (2, *grid))).tolist():
        expected = [
            images[b, c, row * patch[0] + y, column * patch[1] + x].item()
            for y in range(patch[0]) for x in range(patch[1]) for c in range(channels)
        ]  # fmt: skip
        assert patches[b, row * grid[1] + column].tolist() == expected
    assert torch.equal(unpatchify(patches, patch, grid), images)


def test_positions_name_their_place():
    """The first half of a position depends on the column alone, the second on the row alone; all differ."""
    table = sincos_positions((3, 5), 16).reshape(3, 5, 16)
    assert torch.equal(table[:, :, :8], table[:1, :, :8].expand(3, -1, -1))
    assert torch.equal(table[:, :, 8:], table[:, :1, 8:].expand(-1, 5, -1))
    assert len(torch.unique(table.flatten(0, 1), dim=0)) == 15


@pytest.mark.parametrize("name", MODELS)
def test_position_table_is_sincos_and_frozen(name):
    vit = tiny(name)
    assert not vit.pos_embed.requires_grad
    extra = vit.pos_embed.shape[1] - 6
    assert not vit.pos_embed[0, :extra].any()
    torch.testing.assert_close(vit.pos_embed[0, extra:], sincos_positions((3, 2), 32))
    free = [n for n, p in vit.named_parameters() if not p.requires_grad and not n.startswith("attn_pool.")]
    assert free == ["pos_embed"]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_initialised_by_us_or_by_timm(name):
    vit = tiny(name)
    assert [n for n, p in vit.named_parameters() if not torch.isfinite(p).all()] == []
    for parameter in vit.parameters():
        parameter.data.fill_(torch.nan)
    initialise(vit)
    fix_positions(vit)
    ours_not = [n for n, p in vit.named_parameters() if p.isnan().any()]
    timms = re.compile(r"(norm\w*|q_norm|k_norm)\.(weight|bias)|ls[12]\.gamma|patch_embed\.proj\.bias|dist_token"
                       r"|attn_pool\.latent")  # fmt: skip
    assert [n for n in ours_not if not re.search(timms.pattern + "$", n)] == []


WITH_CLASS_ATTENTION = [
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "test_vit", "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_CLASS_ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_beside_attention_are_the_very_same(name, dtype):
    vit = tiny(name)
    images = images_for(vit)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        tokens, attention = encode_with_attention(vit, images)
        assert torch.equal(tokens, encode(vit, images))
        assert torch.equal(attention, class_attention(vit, images))
    assert attention.shape == (2, 6)


def test_initialisation_is_that_of_mae():
    torch.manual_seed(0)
    vit = create_encoder("vit_tiny_patch16_224", image_size=(32, 32), width=128, depth=1, heads=2)
    weights = {
        "patch_embed.proj": (3 * 16 * 16, 128),
        "blocks.0.attn.qkv": (128, 384),
        "blocks.0.mlp.fc1": (128, 512),
    }
    for name, (fan_in, fan_out) in weights.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < vit.get_submodule(name).weight.abs().max() <= bound
    assert not any(p.any() for n, p in vit.named_parameters() if n.endswith(("qkv.bias", "fc1.bias", "fc2.bias")))
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_encoder_is_a_stock_model_whose_weights_timm_loads():
    vit = tiny(rows=2, columns=2)
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, fc_norm=False, embed_dim=32, depth=2, num_heads=2
    )
    assert type(vit) is type(stock)
    stock.load_state_dict(vit.state_dict(), strict=True)
    torch.testing.assert_close(stock.eval().forward_features(images_for(vit)), encode(vit, images_for(vit)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch61_224", {}, "no model named 'vit_tiny_patch61_224'; did you mean vit_tiny_patch16_224"),
        ("", {}, "no model named ''"),
        ("resnet18", {}, "resnet18"),
        ("swin_tiny_patch4_window7_224", {}, "swin_tiny_patch4_window7_224"),
        ("eva02_tiny_patch14_224", {}, "eva02_tiny_patch14_224"),
        ("vit_small_patch16_dinov3", {}, "vit_small_patch16_dinov3"),
        ("vit_relpos_small_patch16_224", SMALL, "must be a timm VisionTransformer.*VisionTransformerRelPos"),
        (
            "vit_tiny_patch16_224",
            {"image_size": (32, 40)},
            "image_size: .*divisible by the patch size 16x16, got 32x40",
        ),
        (
            "vit_tiny_patch16_224",
            {"image_size": (8, 32)},
            "image_size: .*divisible by the patch size 16x16, got 8x32",
        ),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 7},
            "image_size: .*divisible by the patch size 7x7, got 32x32",
        ),
        ("vit_tiny_patch16_224", {"width": 30}, "width.*divisible by 4, got 30"),
        (
            "vit_tiny_patch16_224",
            {"width": 32, "heads": 3},
            "'embed_dim': 32, 'num_heads': 3.*divisible by num_heads",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name, options, message):
    with pytest.raises(InputError, match=message):
        create_encoder(name, **{"image_size": (32, 32), **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224.no_such_weights", {}),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}),
        ("vitamin_small_224", {}),
    ],
)
def test_unknown_weights_and_convolutional_stems_are_refused(name, options):
    """A convolutional stem would let visible patches see hidden ones."""
    with pytest.raises(InputError, match="encoder: "):
        create_encoder(name, image_size=(32, 32), **options)


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_gets_a_gradient(name):
    """DDP stops at the second step otherwise."""
    vit = tiny(name)
    encode(vit, images_for(vit)).square().sum().backward()
    assert [n for n, p in vit.named_parameters() if p.requires_grad and p.grad is None] == []

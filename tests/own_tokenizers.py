"""Tokenizers as a user might bring them, good and bad."""

import torch


class Brightness(torch.nn.Module):
    """16 levels of brightness of each 8-pixel patch."""

    vocabulary = 16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        mean = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1) * self.weight
        return (mean.sigmoid() * 16).clamp(0, 15).int()


def brightness():
    return Brightness()


class Drawn:
    """A callable that is no module, with a random state of its own."""

    vocabulary = 5

    def __init__(self):
        self.offset = int(torch.randint(1000, ()))

    def __call__(self, images):
        return (patch_numbers(images) + self.offset) % 5


def drawn():
    return Drawn()


def patch_numbers(images):
    return torch.arange(images.shape[2] * images.shape[3] // 64).repeat(len(images), 1)


def returns(value, vocabulary=4):
    class Fixed:
        def __call__(self, images):
            return value(images)

    Fixed.vocabulary = vocabulary
    return Fixed()


def nameless():
    return lambda images: images


def no_callable():
    return 3


def fails():
    raise RuntimeError("no such codebook")


def wrong_vocabulary():
    return returns(patch_numbers, vocabulary="many")


def wrong_shape():
    return returns(lambda images: torch.zeros(len(images), 3, dtype=torch.long))


def wrong_dtype():
    return returns(lambda images: patch_numbers(images) / 7)


def wrong_range():
    return returns(patch_numbers)


def negative():
    return returns(lambda images: -patch_numbers(images), vocabulary=100)


def no_tensor():
    return returns(lambda images: "tokens")


def breaks():
    return returns(lambda images: images.no_such_method())


not_a_function = 3

"""Name the victims, and the settings of their training: from nothing, or from an extractor that has learned."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXTRACTOR", "TRAININGS", "VICTIMS", "Training", "Transfer"]

VICTIMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet9": ("resnet9", ()),
    "resnet9-64": ("resnet9", (64,)),
    "resnet18": ("resnet18", ()),
    "vgg19": ("vgg19", ()),
    "densenet121": ("densenet121", ()),
    "mobilenet-v2": ("mobilenet_v2", ()),
    "unet": ("unet", ()),
    "unet-128": ("unet", (128,)),
}
"""Networks for colour images of about 32 x 32, by name: a function of `victims.networks`, its arguments after classes.
They are named here, and not imported, so that a help text needs no torch."""


@dataclass(frozen=True)
class Training:
    """Training of a victim by SGD with momentum 0.9, crops and flips.

    `lr` is the highest learning rate of one cycle, in whose share `warmup` it rises; None is a constant learning rate.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: float | None
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Transfer(Training):
    """Training of a victim on a few images, from an extractor whose last linear layer is made anew.

    With `head_only` that layer alone is trained, and the features stay those of evaluation mode.
    """

    head_only: bool = False


TRAININGS: dict[str, Training] = {
    # tuned for a ResNet-9 on 4,000 images: 69 % where 80 epochs of "paper" are out of reach
    "short": Training(10, 64, 0.2, 0.2),
    "modern": Training(30, 128, 0.2, 0.2, label_smoothing=0.1),
    # ECLIPSE, Implementation details; it does not name its weight decay
    "paper": Training(80, 128, 0.1, None),
    # of a ResNet-9 on 400 images of the sample; with a higher rate fine-tuning learns them by heart and tests worse
    "transfer-linear": Transfer(40, 32, 0.5, 0.2, head_only=True),
    "transfer-fine-tune": Transfer(20, 32, 0.02, 0.2),
}

EXTRACTOR = TRAININGS["short"]

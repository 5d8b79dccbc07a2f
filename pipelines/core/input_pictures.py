"""Pictures that a call is given, to tensors: what users have in hand, brought to what the networks take."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import PIL_INTERPOLATION
from PIL import ExifTags, Image
from torch import Tensor

from latentdiff.interchange.picture_files import shallow, to_rgb, upright

logger = logging.getLogger(__name__)

Pictures: TypeAlias = Any
"""A PIL image, an array (B, H, W, C), (H, W, C) or (H, W), a tensor (B, C, H, W) or (C, H, W), or a list of one of
these kinds. Whole numbers are uint8, 0 to 255, or uint16, 0 to 65535; numbers of floating point lie in [0, 1] or
[-1, 1]. C is 3, 1 (grey), or 4 (with opacity, put on white); but a tensor of floating point with as many channels as
the model's latents is taken for scaled latents."""

ResizeMode = Literal["crop", "default", "fill"]
"""How a picture gets to a size of another shape: cut centrally; stretched, as diffusers' calls do; or whole, with its
edges drawn out (PIL images only)."""

FAR = 1.5
"""How many times larger or smaller than in training a side or the area of a picture is far from it."""

KINDS = "a PIL image, an array (B, H, W, C), a tensor (B, C, H, W) or a list of them"
MOST = 2.0  # decoded pictures that were not clipped are a little outside [-1, 1]
MOST_POSITIVE = 1.1  # resized ones a little outside [0, 1]


def upright_rgb(image: Any) -> Any:
    """A PIL image, or each of a list, as RGB: turned as its camera says, on white where it is transparent.

    Grey of more than eight bits is scaled to eight. Other things are given back as they are.
    """
    if isinstance(image, (list, tuple)):
        return [upright_rgb(one) for one in image]
    return to_rgb(upright(image)) if isinstance(image, Image.Image) else image


def upright_pair(image: Pictures, mask: Pictures) -> tuple[Pictures, Pictures]:
    """A picture as `upright_rgb` gives it, and its mask turned to fit, grey of at most eight bits.

    A mask with an orientation of its own (EXIF) is turned as that says. Others are turned as their picture is, as if
    drawn on the pixels in its file, if their shape is that of these pixels, or if shapes do not tell (the picture is
    square, mirrored or upside down). They stay as they are if their shape is that of the upright picture.

    Raises:
        TypeError, ValueError: an array cannot be a mask.
    """
    pictures, masks = as_list(image), as_list(mask)
    if are_images(mask):
        masks = [shallow(one) for one in masks]
    elif masks and isinstance(masks[0], (np.ndarray, Tensor)):
        masks = list(mask_values(mask))
    if len(masks) == 1 and are_images(image) and len({(one.size, orientation_of(one)) for one in pictures}) > 1:
        masks = masks * len(pictures)
    if pictures and any(orientation_of(one) for one in [*pictures, *masks]):
        masks = [upright_mask(one, pictures[min(i, len(pictures) - 1)]) for i, one in enumerate(masks)]
    return upright_rgb(image), masks[0] if len(masks) == 1 else masks


def as_list(value: Any) -> list[Any]:
    """Of one picture or of several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def orientation_of(picture: Any) -> int | None:
    """From 1 (upright) to 8, as EXIF counts them; None where nothing says it."""
    found = picture.getexif().get(ExifTags.Base.Orientation) if isinstance(picture, Image.Image) else None
    return found if found in range(1, 9) else None


def upright_mask(mask: Any, picture: Any) -> Any:
    """See `upright_pair`. `mask`: a PIL image or a tensor (1, H, W)."""
    orientation = orientation_of(picture) or 1
    if orientation_of(mask) is not None:
        return upright(mask)
    if orientation == 1 or not isinstance(mask, Image.Image | Tensor):
        return mask
    width, height = mask.size if isinstance(mask, Image.Image) else (mask.shape[-1], mask.shape[-2])
    shape, stored = math.log(width / height), math.log(picture.width / picture.height)
    away, away_upright = abs(shape - stored), abs(shape - (-stored if orientation > 4 else stored))
    unclear = math.isclose(away, away_upright, abs_tol=1e-9)
    if away_upright < away and not unclear:
        return mask
    logger.warning(
        "The picture's EXIF turns it (orientation %d), and the mask is turned with it: %s",
        *(orientation, "their shapes do not tell what it was drawn on" if unclear else "by its shape"),
    )
    if isinstance(mask, Tensor):
        return turned_tensor(mask, orientation)
    mask = mask.copy()
    mask.getexif()[ExifTags.Base.Orientation] = orientation
    return upright(mask)


def turned_tensor(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels (..., H, W) as they are upright."""
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
    return (pixels.transpose(-2, -1) if orientation > 4 else pixels).flip(flips.get(orientation, ()))


@dataclass(frozen=True)
class Placement:
    """Where pictures, and masks on them, come to lie at the size to draw at."""

    height: int
    width: int
    sizes: Sequence[tuple[int, int]]
    """Height and width of each picture as it was given."""
    mode: ResizeMode = "crop"
    enlarged: float | None = None
    """How many times, in the mode "crop"; None: no more than covers the size."""
    crop: tuple[int, int, int, int] | None = None
    """Left, upper, right and lower of the only part to show, in the pictures' pixels."""

    def box(self, number: int, height: int, width: int) -> tuple[float, float, float, float]:
        """Left, upper, right and lower of what is shown of a picture, or of a mask on it, of this height and width."""
        if self.mode != "crop":
            return 0, 0, width, height
        own = self.sizes[min(number, len(self.sizes) - 1)]
        scale = self.enlarged or max(self.height / own[0], self.width / own[1])
        kept = [min(side, target / scale) for side, target in zip(own, (self.height, self.width), strict=True)]
        first = [math.floor((side - part) / 2) for side, part in zip(own, kept, strict=True)]  # whole: nothing blurs
        down, across = height / own[0], width / own[1]
        lower, right = min(height, (first[0] + kept[0]) * down), min(width, (first[1] + kept[1]) * across)
        return first[1] * across, first[0] * down, right, lower


def place(
    processor: VaeImageProcessor,
    image: Pictures,
    height: int | None = None,
    width: int | None = None,
    trained: tuple[int, int] | None = None,
    mode: ResizeMode = "crop",
) -> Placement:
    """The rule for the size at which given pictures are drawn. It keeps their shape.

    Without `height` and `width` a picture keeps its size, cut to multiples of the autoencoder's factor; if that is far
    from `trained` (see `is_far`), it is brought to the area of that. If one of the two is given, the other follows. If
    both are, the picture is brought to that size as `mode` says. Tensors were made for a model and keep their size.

    Raises:
        TypeError: not a picture.
        ValueError: it is missing; or several differ in size, so that there is no size for all.
    """
    if image is None:
        raise ValueError("image is missing; give a picture")
    pictures, factor = as_list(image), processor.config.vae_scale_factor
    if not pictures:
        raise TypeError(f"image must be {KINDS}, not an empty list")
    sizes = [size_of(processor, one) for one in pictures]
    if height is not None and width is not None:
        return Placement(height, width, sizes, mode)
    if len(set(sizes)) > 1:
        found = ["{1} x {0}".format(*size) for size in sorted(set(sizes))]
        raise ValueError(
            f"the pictures given as image differ in size, {found[0]} and {found[1]}; give one at a time, or height "
            f"and width for all"
        )
    own = sizes[0]
    if height is not None:
        scale = height / own[0]
    elif width is not None:
        scale = width / own[1]
    else:
        far = trained is not None and not isinstance(pictures[0], Tensor) and is_far(own, trained)
        kept = not far and min(own) >= factor
        return Placement(*size_near(own, factor, trained if far else None), sizes, mode, 1.0 if kept else None)
    near = [max(1, round(side * scale / factor)) * factor for side in own]
    return Placement(near[0] if height is None else height, near[1] if width is None else width, sizes, mode)


def size_near(own: tuple[int, int], factor: int, trained: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width at which a picture of this size is drawn if nobody says another; see `place`."""
    if trained is None or not is_far(own, trained):
        return max(1, own[0] // factor) * factor, max(1, own[1] // factor) * factor
    scale = (math.prod(trained) / math.prod(own)) ** 0.5
    return max(1, round(own[0] * scale / factor)) * factor, max(1, round(own[1] * scale / factor)) * factor


def is_far(size: tuple[int, int], trained: tuple[int, int]) -> bool:
    """Whether a side or the area is more than `FAR` times larger or smaller than in training."""
    ratios = (size[0] / trained[0], size[1] / trained[1], math.prod(size) / math.prod(trained))
    return any(max(ratio, 1 / ratio) > FAR for ratio in ratios)


def size_of(processor: VaeImageProcessor, picture: Any) -> tuple[int, int]:
    """Height and width of a PIL image, upright, of an array, a tensor or latents. Raises TypeError for others."""
    if isinstance(picture, Image.Image):
        turned = (orientation_of(picture) or 1) > 4
        return (picture.width, picture.height) if turned else (picture.height, picture.width)
    values, from_arrays = stacked("image", picture)
    taken = not from_arrays and values.is_floating_point() and are_latents(values, processor.config.vae_latent_channels)
    factor = processor.config.vae_scale_factor if taken else 1
    return values.shape[-2] * factor, values.shape[-1] * factor


def to_pixels(processor: VaeImageProcessor, image: Pictures, placement: Placement | None = None) -> Tensor:
    """Pictures as (P, 3, H, W), values in [-1, 1], at the size and with the part that `placement` says.

    With ``do_normalize=False`` in the processor's config values stay as they are.
    What has the latents' channels is taken for scaled latents and given back as it is, (P, C, h, w).

    Args:
        placement: by default what `place` says without a trained size.

    Raises:
        TypeError: not a picture.
        ValueError: NaN or infinite values, or others that a picture cannot have; or another number of channels.
    """
    placement = placement or place(processor, image)
    if are_images(image):
        return preprocessed(processor, [upright_rgb(one) for one in as_list(image)], placement)
    pixels = picture_values(image, processor.config.vae_latent_channels)
    if are_latents(pixels, processor.config.vae_latent_channels):
        return pixels
    pixels = resized(pixels, placement)
    return signed(pixels) if processor.config.do_normalize else pixels


def to_mask(processor: VaeImageProcessor, mask: Pictures, placement: Placement | None = None) -> Tensor:
    """Masks as (P, 1, H, W), 1 where to paint (what was at least half white) and 0 elsewhere.

    They lie on the whole of their pictures, whatever their own size, and are cut with them.

    Raises:
        TypeError: not a mask.
        ValueError: it is missing, or has more than one channel, or values that are no grey.
    """
    if mask is None:
        raise ValueError("mask_image is missing; give one that is white where to paint and black elsewhere")
    if are_images(mask):
        masks = [shallow(one) for one in as_list(mask)]
        return preprocessed(processor, masks, placement or place(processor, masks))
    values = mask_values(mask)
    return (resized(values, placement or place(processor, values)) >= 0.5).float()


def are_images(value: Any) -> bool:
    """Whether this is a PIL image or a list of them."""
    images = as_list(value)
    return bool(images) and all(isinstance(one, Image.Image) for one in images)


def preprocessed(processor: VaeImageProcessor, images: Sequence[Image.Image], placement: Placement) -> Tensor:
    """Upright PIL images as the processor makes tensors of them."""
    size, resample = (placement.width, placement.height), PIL_INTERPOLATION[processor.config.resample]
    brought = list(images)
    if placement.mode == "crop":
        boxes = [placement.box(i, one.height, one.width) for i, one in enumerate(images)]
        brought = [one.resize(size, resample, box=box) for one, box in zip(images, boxes, strict=True)]
    mode = "fill" if placement.mode == "fill" else "default"
    return processor.preprocess(
        brought, placement.height, placement.width, resize_mode=mode, crops_coords=placement.crop
    )


def resized(pixels: Tensor, placement: Placement) -> Tensor:
    """(P, C, H, W) as `placement` says; nearest neighbour, as in diffusers. Raises ValueError for the mode "fill"."""
    if placement.mode == "fill":
        raise ValueError("resize_mode='fill' is for PIL images; arrays and tensors are cut ('crop') or stretched")
    left, upper, right, lower = (round(side) for side in placement.box(0, *pixels.shape[-2:]))
    shown = pixels[..., upper : max(lower, upper + 1), left : max(right, left + 1)]
    return F.interpolate(shown, size=(placement.height, placement.width))


def signed(pixels: Tensor) -> Tensor:
    """Values in [0, 1] -> in [-1, 1], which is what they are if one is below 0."""
    return pixels if pixels.min() < 0 else 2.0 * pixels - 1.0


def picture_values(image: Any, latent_channels: int = 3) -> Tensor:
    """Arrays or tensors as (P, 3, H, W), values in [0, 1] or [-1, 1]; or as (P, C, h, w), if they are latents.

    Raises:
        TypeError, ValueError: see `to_pixels`.
    """
    values, from_arrays = stacked("image", image)
    channels = values.shape[1]
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError("image has values that are not finite")
    if are_latents(values, latent_channels) and values.is_floating_point() and not from_arrays:
        return values
    if values.dtype in (torch.uint8, torch.uint16):
        values = values.float() / torch.iinfo(values.dtype).max
    elif not values.is_floating_point():
        raise TypeError(f"image has values of {values.dtype}; give uint8 (0 to 255), or floating point (0 to 1)")
    least, most = float(values.min()), float(values.max())
    if max(-least, most) > (MOST if least < 0 else MOST_POSITIVE) or (channels == 4 and least < 0):
        raise ValueError(
            f"image has values from {least:g} to {most:g}; those of floating point must lie in [0, 1] or [-1, 1] (with "
            f"opacity in [0, 1]), whole ones are given as uint8"
        )
    if channels == 4:
        opacity = values[:, 3:]
        return values[:, :3] * opacity + (1 - opacity)
    if channels not in (1, 3):
        raise ValueError(
            f"image has {channels} channels; a picture has 3, and latents of this model have {latent_channels}"
        )
    return values.expand(-1, 3, -1, -1)


def mask_values(mask: Any) -> Tensor:
    """Arrays or tensors as (P, 1, H, W), values in [0, 1].

    Truth values and whole numbers of 0 and 1 are taken as they are, other whole numbers as 0 to 255 or 0 to 65535.

    Raises:
        TypeError, ValueError: see `to_mask`.
    """
    values = stacked("mask_image", mask)[0]
    if values.shape[1] != 1:
        raise ValueError(f"mask_image has {values.shape[1]} channels; give one with a single channel")
    deep, fractional = values.dtype == torch.uint16, values.is_floating_point()
    values = values if fractional else values.float()
    least, most = float(values.min()), float(values.max())
    if most > 1 and (not fractional or bool((values == values.round()).all())):
        values = values / (255 if most <= 255 and not deep else 65535)
    if not (least >= 0 and float(values.max()) <= 1):  # NaN neither
        raise ValueError(
            f"mask_image has values from {least:g} to {most:g}; give truth values, 0 to 1, or whole numbers 0 to 255"
        )
    return values


def stacked(name: str, value: Any) -> tuple[Tensor, bool]:
    """Arrays or tensors as one tensor (P, C, H, W) of their type, and whether they were arrays.

    Raises:
        TypeError: they are something else, or of other dimensions.
        ValueError: they differ in size.
    """
    items = as_list(value)
    arrays = bool(items) and all(isinstance(one, np.ndarray) for one in items)
    if not items or not (arrays or all(isinstance(one, Tensor) for one in items)):
        found = next((one for one in items if not isinstance(one, (np.ndarray, Tensor))), value)
        raise TypeError(f"{name} must be {KINDS}, not {type(found).__name__}")
    parts = [four_dimensions(name, one) for one in items]
    sizes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"the pictures given as {name} differ in shape, {sizes[0]} and {sizes[1]}; give one at a time")
    return torch.cat(parts), arrays


def four_dimensions(name: str, item: Any) -> Tensor:
    """One array or tensor as (P, C, H, W). Raises TypeError if it has no dimensions of a picture."""
    if item.size == 0 if isinstance(item, np.ndarray) else item.numel() == 0:
        raise TypeError(f"{name} must be {KINDS}, not an empty one")
    shape = tuple(item.shape)
    if isinstance(item, np.ndarray):
        try:
            item = torch.from_numpy(np.require(item, item.dtype.newbyteorder("="), ["C", "W"]))
        except TypeError:
            raise TypeError(f"{name} has values of the type {item.dtype}; give uint8 or floating point") from None
        if item.ndim == 3 and (name == "image" or shape[-1] in (1, 3, 4)):
            item = item[None]  # (1, H, W, C)
        if item.ndim == 4:
            item = item.movedim(-1, 1)
    if name != "image" and item.ndim == 3:  # (1, H, W) or (B, H, W)
        item = item[:, None]
    while item.ndim in (2, 3):
        item = item[None]
    if item.ndim != 4:
        raise TypeError(f"{name} must be {KINDS}, not one of the shape {shape}")
    return item


def are_latents(pixels: Tensor, channels: int) -> bool:
    """Whether `to_pixels` gave back latents; a model of 3 latent channels cannot be given any."""
    return pixels.shape[1] == channels and channels != 3


def check_pictures(name: str, given: int, prompts: int, count: int) -> None:
    """Raises ValueError if `given` pictures are neither one for all, nor one for each prompt or each image."""
    if given not in (1, prompts, count):
        raise ValueError(f"{given} pictures were given as {name} for {prompts} prompts; give one, or one for each")

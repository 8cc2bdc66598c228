"""Convert PIL images and numpy arrays to tensors."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LANCZOS = 1  # PIL.Image.Resampling.LANCZOS
ASPECT_TOLERANCE = 0.02


def to_tensor(name: str, value: Any, height: int, width: int) -> Any:
    """Convert pictures to (batch, 3, height, width) or (batch, frames, 3, height, width).

    name   "image": a picture or a list of them, one for each prompt; or "video": a list of pictures
           or an array of one more axis, or a list of such
    value  PIL images, or uint8 arrays (height, width, 3)

    Values are in [-1, 1]. PIL images are resized with Lanczos filtering, as in diffusers, arrays
    bilinearly with antialiasing; both without cropping, with a warning if the aspect ratio changes.
    Anything else, such as a tensor, is returned unchanged.
    """
    if not _is_pictures(value):
        return value
    found = _stacked(name, value, height, width)
    return found if found.dim() == (4 if name == "image" else 5) else found[None]


def _is_pictures(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_pictures, value))
    return _is_pil(value) or _is_array(value)


def _is_pil(value: Any) -> bool:
    return any(
        f"{kind.__module__}.{kind.__name__}" == "PIL.Image.Image" for kind in type(value).__mro__
    )


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype") and hasattr(value, "shape")


def _stacked(name: str, value: Any, height: int, width: int) -> Tensor:
    if _is_pil(value):
        _warn_of_shape(name, value.height, value.width, height, width)
        picture = value.convert("RGB").resize((width, height), LANCZOS)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return _scaled(pixels.view(height, width, 3))
    if _is_array(value) and value.ndim <= 3:
        if str(value.dtype) != "uint8" or value.ndim != 3 or value.shape[2] != 3:
            raise TypeError(
                f"CogVideoX.generate: {name} must be of arrays (height, width, 3) of uint8, of PIL "
                f"images or a tensor in [-1, 1]; got an array {tuple(value.shape)} of {value.dtype}"
            )
        _warn_of_shape(name, value.shape[0], value.shape[1], height, width)
        pixels = _scaled(torch.from_numpy(value.copy()))
        if pixels.shape[1:] == (height, width):
            return pixels
        return F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]
    parts = [_stacked(name, item, height, width) for item in value]
    if len({part.dim() for part in parts}) != 1 or len({part.shape for part in parts}) != 1:
        raise ValueError(
            f"CogVideoX.generate: {name} must be of videos of one length; got "
            f"{', '.join(str(len(part)) for part in parts)} frames"
        )
    return torch.stack(parts)


def _scaled(pixels: Tensor) -> Tensor:
    """(height, width, 3) uint8 to (3, height, width) in [-1, 1]."""
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _warn_of_shape(name: str, height: int, width: int, wanted: int, wanted_width: int) -> None:
    if abs(height * wanted_width / (width * wanted) - 1) > ASPECT_TOLERANCE:
        warnings.warn(
            f"{name} of {height}x{width} is stretched to {wanted}x{wanted_width}, which has "
            "another shape; crop it first, or give height and width like it",
            stacklevel=6,
        )


def warn_of_range(sources: dict[str, Any]) -> None:
    """Warn of tensors in [0, 1], which are valid but pale in [-1, 1]."""
    for name, source in sources.items():
        if isinstance(source, Tensor) and source.min() >= 0:
            warnings.warn(
                f"{name} has no value below 0, as if it were in [0, 1], and would come out pale "
                f"and gray: values are in [-1, 1], which 2 * {name} - 1 makes of [0, 1]",
                stacklevel=4,
            )

"""Read and write video files as tensors `(batch, frames, channels, height, width)` in [-1, 1].

Files beyond the limits of `container` are rejected by their header, before decoding. PyAV is an
extra, imported when a file is opened: `pip install cogvx[video]`.
"""

from .container import PICTURE_SUFFIXES, SUFFIXES, VideoError, check_fps
from .quality import PSNR, psnr
from .reading import Clip, VideoInfo, open_video, probe, read_image, read_video, stream_video
from .writing import WRITTEN, check_video_output, write_contact_sheet, write_sheet, write_video

__all__ = [
    "Clip",
    "PICTURE_SUFFIXES",
    "PSNR",
    "SUFFIXES",
    "VideoError",
    "VideoInfo",
    "WRITTEN",
    "check_fps",
    "check_video_output",
    "open_video",
    "probe",
    "psnr",
    "read_image",
    "read_video",
    "stream_video",
    "write_contact_sheet",
    "write_sheet",
    "write_video",
]

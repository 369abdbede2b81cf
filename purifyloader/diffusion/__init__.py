"""Diffusion: noise schedules, the denoiser contract and its network, samplers and training objectives."""

from purifyloader.diffusion.blind import BlindDenoiser
from purifyloader.diffusion.denoiser import Denoiser, NetworkDenoiser
from purifyloader.diffusion.plain import PlainUNet, PlainUNetConfig
from purifyloader.diffusion.schedule import ContinuousVP, CosineSchedule, LinearSchedule, ScaledLinearSchedule, Schedule
from purifyloader.diffusion.unet import UNet, UNetConfig

__all__ = ["BlindDenoiser", "ContinuousVP", "CosineSchedule", "Denoiser", "LinearSchedule", "NetworkDenoiser"]
__all__ += ["PlainUNet", "PlainUNetConfig", "ScaledLinearSchedule", "Schedule", "UNet", "UNetConfig"]

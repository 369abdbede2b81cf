"""Training of denoisers: `purifyloader train denoiser`."""

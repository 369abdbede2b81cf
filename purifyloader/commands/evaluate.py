"""Judge a denoiser, as a table, JSON and a picture: `purifyloader denoiser evaluate`."""

from __future__ import annotations

import argparse

from purifyloader.commands import options as shared

_FILES = ("evaluation.json", "evaluation.png")
_COUNT = 500

DESCRIPTION = (
    "Judge a denoiser on clean images that it was not trained on: PSNR over noise, calibration, and what it removes "
    "from poisoned images. Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a shipped denoiser, a checkpoint's folder, or owner/name on the hub")
    shared.add_data(parser, "clean images (cifar10 and cifar100: their test split)")
    shared.add_choice(parser, str(_COUNT))
    shared.add_size(parser)
    words = "noise levels on the 0-255 scale (default: spread over the denoiser's range)"
    add("--sigma-px", type=shared.above_zero, nargs="+", metavar="PX", help=words)
    shared.add_poisons(parser, "--data")
    add("--calls", type=int, default=1, metavar="N", help="network calls an image (default: 1)")
    add("--sampler", choices=shared.SAMPLERS, default="ancestral", help="of several calls (default: ancestral)")
    add("--no-calibration", action="store_true", help="leave out the calibration, half of the network calls")
    shared.add_seed(parser, "the noise and the attacks")
    add("--batch-size", type=int, help="images of a network call (default: by their size, at most 100)")
    shared.add_device(parser)
    shared.add_results(parser, *_FILES)


def run(options: argparse.Namespace) -> int:
    import torch

    from purifyloader import pretrained
    from purifyloader.commands.reporting import calls_bar, clean_images, report
    from purifyloader.core.devices import device_of_process
    from purifyloader.evaluation.evaluating import default_sigmas, evaluate
    from purifyloader.evaluation.inputs import Models
    from purifyloader.evaluation.pictures import examples, picture
    from purifyloader.evaluation.report import table
    from purifyloader.results.folder import check_out

    device = device_of_process(options.device, 0)
    check_out(options.out, _FILES, options.overwrite, "an evaluation")
    denoiser = pretrained.load(options.model).to(device)
    sigmas = default_sigmas(denoiser) if options.sigma_px is None else [px / 255 for px in options.sigma_px]
    denoiser.check_sigma(torch.tensor(sigmas, dtype=torch.float64))  # before images are read
    images, poisoned, data = clean_images(Models(None, denoiser, (options.model,)), options, _COUNT)
    with calls_bar(shared.shows_progress(options)) as progress:
        results = evaluate(
            denoiser,
            images,
            sigmas,
            poisoned=poisoned,
            steps=options.calls,
            sampler=options.sampler,
            calibrate=not options.no_calibration,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=progress,
        )
    results = {**results, "data": data}
    report(
        options,
        results,
        table(results),
        _FILES,
        lambda path: picture(results, path, examples(denoiser, images, sigmas, seed=options.seed)),
    )
    return 0

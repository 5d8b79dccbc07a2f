"""An evaluation as lines for the screen and as Markdown for a model's card."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, standard deviation over subsets",
    "frechet_distance": "Fréchet distance (not FID)",
    "kernel_distance": "kernel distance (not KID)",
    "kernel_distance_std": "kernel distance, standard deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "clip_score_of_real_pictures": "CLIP score of the real pictures",
    "reconstruction_psnr": "autoencoder, PSNR of real pictures, dB",
    "reconstruction_ssim": "autoencoder, SSIM of real pictures",
}


def short_table(report: Mapping[str, Any]) -> list[str]:
    """What was compared, and one line for each figure."""
    rows = [(NAMES[name], f"{value:.4g}") for name, value in report["metrics"].items()]
    width = max(len(name) for name, _ in rows)
    return [
        f"{compared(report)}, features: {report['extractor']['name']}",
        *(f"  {name.ljust(width)}  {value:>10}" for name, value in rows),
        *(f"note: {note}" for note in report["notes"]),
    ]


def compared(report: Mapping[str, Any]) -> str:
    data, drawn = report["data"], report["drawn"]
    return f"{drawn['pictures']:,} drawn pictures, {data['pictures']:,} real ones of {data['name']} ({data['split']})"


def markdown(report: Mapping[str, Any]) -> str:
    """A section of a card."""
    data, drawn, extractor = report["data"], report["drawn"], report["extractor"]
    rows = "\n".join(f"| {NAMES[name]} | {value:.6g} |" for name, value in report["metrics"].items())
    lines = [
        f"Pictures drawn: {drawn['pictures']:,}, {drawn['width']}x{drawn['height']}, seeds from {drawn['seed']}, "
        f"{drawn['num_inference_steps']} steps of {drawn['scheduler']}, guidance {drawn['guidance_scale']:g}, "
        f"{drawn['precision']}.",
        f"Real pictures: {data['pictures']:,} of {data['name']}, split {data['split']}; cropped to the drawn size.",
        f"Features: {extractor['name']}, {extractor['dimensions']} dimensions, weights SHA-256 "
        f"{extractor['weights_sha256'][:16]}; resized by {extractor['resize']}.",
    ]
    if report["clip"]:
        clip = report["clip"]
        lines.append(f"CLIP: {clip['name']}, weights SHA-256 {clip['weights_sha256'][:16]}.")
    lines += [f"Note: {note}." for note in report["notes"]]
    made = f"Measured by {report['made_by']} (`latentdiff evaluate`)."
    bullets = "\n".join(f"- {line}" for line in lines)
    return f"## Evaluation\n\n| what | figure |\n|---|---|\n{rows}\n\n{bullets}\n\n{made}"

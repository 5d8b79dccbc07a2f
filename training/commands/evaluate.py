"""``latentdiff evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.pipelines.commands.options import Device, DeviceOption, Precision, PrecisionOption, load_pipeline
from latentdiff.training.commands.options import HeldOutSplit, ImageColumn, show_progress


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A pipeline folder, a packaged model, or owner/name on the hub.")
    ],
    data: Annotated[str, typer.Option(help="Folder of captioned pictures, *.tar shards, or a dataset's name.")],
    split: HeldOutSplit = "validation",
    count: Annotated[
        int | None, typer.Option(min=2, help="Pictures to draw; by default one for each real picture.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="By default the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn with SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once; changes memory and speed only.")] = 8,
    extractor: Annotated[
        str,
        typer.Option(
            help="Features: inception (FID and KID; in torch hub's cache) or inception:FILE, timm:NAME=FILE, a "
            "transformers model's folder or owner/name, or autoencoder, the packaged encoder. auto: inception if it is "
            "in the cache, else autoencoder."
        ),
    ] = "auto",
    clip: Annotated[
        str | None,
        typer.Option(help="For CLIP score: a transformers CLIP's folder or owner/name, or open_clip:NAME/PRETRAINED."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for samples and evaluation.json; by default MODEL/evaluation.")
    ] = None,
    image_column: ImageColumn = "image",
    caption_column: Annotated[str, typer.Option(help="Of a dataset or table.")] = "text",
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Measure a model: draw from the captions of held-out pictures, and compare.

    latentdiff evaluate runs/mine --data pictures

    Pictures that were drawn already are kept, so a repeated command goes on where it stopped. The figures are shown,
    written to evaluation.json, and put into the model's card.
    """
    from latentdiff.interchange.folders import find_model

    find_model(model)  # what can be told quickly is told before torch is loaded
    show_progress()
    from latentdiff.training.evaluation.evaluate import EvaluationSettings, evaluate_pipeline
    from latentdiff.training.evaluation.textless import textless_kind

    settings = EvaluationSettings(
        model=model,
        data=data,
        split=split,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        extractor=extractor,
        clip=clip,
        output=str(output) if output is not None else None,
        image_column=image_column,
        caption_column=caption_column,
    )
    folder = settings.folder()
    kind = (find_model(model) and textless_kind(model)) or "TextToImagePipeline"
    pipeline = load_pipeline(model, device, precision, None, kind)
    pipeline.set_progress_bar_config(disable=True)
    evaluate_pipeline(pipeline, settings)
    typer.echo(f"The figures are in {folder / 'evaluation.json'}")

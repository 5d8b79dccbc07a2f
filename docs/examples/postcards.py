"""A kind of pipeline as an extension: pictures with a white border."""

from typing import Any

from PIL import ImageOps

from latentdiff.pipelines import TextToImagePipeline
from latentdiff.pipelines.core.sampling import whole
from latentdiff.pipelines.registry import Kind, register


class PostcardPipeline(TextToImagePipeline):
    """Text to image, with a white border."""

    saved_class_name = "PostcardPipeline"

    @whole
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        output = yield from TextToImagePipeline.__call__.__wrapped__(self, *arguments, **options)
        output.images = [ImageOps.expand(ImageOps.crop(image, 2), 2, "white") for image in output.images]
        return output


register(Kind("PostcardPipeline", __name__, ("PostcardPipeline",), "text", single_file=True, converted=True))

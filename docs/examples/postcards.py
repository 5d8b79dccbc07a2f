"""A kind of pipeline as an extension: pictures with a white border."""

from torch import Tensor

from latentdiff.pipelines import TextToImagePipeline
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.registry import Kind, register
from latentdiff.pipelines.tasks.text_to_image import TextCall

BORDER = 2  # pixels


class PostcardCall(TextCall):
    """A call whose pictures get a border before they become what the caller asked for: PIL, NumPy or torch."""

    def choose(self, pixels: Tensor, output: ImagesOutput) -> Tensor:
        pixels = super().choose(pixels, output).clone()  # (B, 3, H, W), black is -1 and white 1
        for edge in (slice(None, BORDER), slice(-BORDER, None)):
            pixels[:, :, edge] = pixels[:, :, :, edge] = 1
        return pixels


class PostcardPipeline(TextToImagePipeline):
    """Text to image, with a white border; ``output_type="latent"`` gives latents, which have none."""

    saved_class_name = "PostcardPipeline"
    call_class = PostcardCall


register(Kind("PostcardPipeline", __name__, ("PostcardPipeline",), "text"))

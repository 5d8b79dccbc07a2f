"""The model behind a server: one set of networks, as all kinds of pipeline that it can be."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from latentdiff.pipelines.batch.draw import (
    SourcePictures,
    call_arguments,
    drawn_of,
    load_adapters,
    refined_arguments,
    settings_of,
    this_machine,
)
from latentdiff.pipelines.batch.effects import idle_options
from latentdiff.pipelines.batch.record import Batch, Drawn, Lora, Settings, UsedFile, record_of
from latentdiff.pipelines.core.input_pictures import size_near
from latentdiff.pipelines.core.remarks import remark_on_guidance, remark_on_size, remark_on_steps
from latentdiff.pipelines.core.sampling import Progress
from latentdiff.pipelines.registry import find_kind, kind_taking
from latentdiff.pipelines.server.jobs import Finished, Job, Preview, Row
from latentdiff.pipelines.server.requests import RequestError
from latentdiff.text.tokens import without_weights

CUT = 120
"""Characters that are shown of what has no place in a prompt."""
TIMES_TRAINED = 4
"""How many times the area of training a picture may have, where nothing else is said."""


@dataclass(frozen=True)
class Refined:
    """What draws the last steps of whole pictures: its name for clients and records, from where on, and its digest."""

    name: str
    denoising_end: float
    digest: Callable[[], str]


class ServedModel:
    """Draws batches of jobs, from words, from pictures and within masks.

    Args:
        name: of the model, for clients and records.
        pipeline: that draws from words.
        digest: of the model; asked for at the first record.
        adapters: ``loras``, ``embeddings`` and ``variant`` of a record, of what is loaded into the pipeline.
        files: of LoRAs, by digest; requests may bring more.
        refined: by the refiner that the pipeline has.
    """

    def __init__(
        self,
        name: str,
        pipeline: Any,
        digest: Callable[[], str],
        adapters: dict[str, Any],
        files: Mapping[str, Path] | None = None,
        refined: Refined | None = None,
    ) -> None:
        self.refined = refined
        self.name, self.digest, self.adapters = name, digest, adapters
        self.pipeline, self.files = pipeline, dict(files or {})
        self._worn: list[Lora] | None = list(adapters.get("loras", []))
        self._worn_in_part: list[str] = []
        self._pipelines: dict[str, Any] = {type(pipeline).__name__: pipeline}

    @property
    def pixels(self) -> int:
        """Of a picture at most, where nobody says how many."""
        width, height = self.own_size
        return TIMES_TRAINED * height * width

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height in pixels, where nobody says others."""
        height, width = self.pipeline.picture_size(None, None)
        return width, height

    @property
    def factor(self) -> int:
        """That sides are multiples of, in pixels."""
        return int(self.pipeline.side_factor)

    def kind_for(self, inputs: SourcePictures) -> str:
        """The class that draws from these pictures. Raises RequestError if there is none."""
        named = [name for name, one in (("image", inputs.image), ("mask_image", inputs.mask)) if one is not None]
        if not named:
            return type(self.pipeline).__name__
        try:
            return kind_taking(named, self.pipeline.saved_class_name, {"mask_image": "mask"}).name
        except ValueError as error:
            where = (
                " (on the page: paint over what is to be drawn anew)" if str(error).endswith("give mask too") else ""
            )
            raise RequestError(f"{error}{where}", "mask" if where else "image") from None

    @property
    def fixed_steps(self) -> int | None:
        """How many steps every picture takes; None: as many as are asked for."""
        found: int | None = getattr(self.pipeline, "fixed_steps", None)
        return found

    @property
    def takes_strength(self) -> bool:
        """Whether a request that has a picture may say how much of it is drawn anew: not so with codes."""
        calls = []
        for pictures in (["image"], ["image", "mask_image"]):
            with suppress(ValueError):  # no kind draws from these
                calls.append(kind_taking(pictures, self.pipeline.saved_class_name).load().__call__)
        return any("strength" in inspect.signature(call).parameters for call in calls)

    def pipeline_of(self, kind: str) -> Any:
        """The pipeline of that class; they share the networks."""
        if kind not in self._pipelines:
            made = find_kind(kind).load().from_pipe(self.pipeline)
            made.set_progress_bar_config(disable=True)
            if self.refined is not None:
                made.refiner = self.pipeline.refiner
            self._pipelines[kind] = made
        return self._pipelines[kind]

    def settings(
        self,
        asked: dict[str, Any],
        inputs: SourcePictures,
        used: dict[str, UsedFile],
        loras: Sequence[Lora] = (),
    ) -> Settings:
        """Raises ValueError for what this model cannot draw; see `settings_of`.

        loras: besides those that it always has.
        """
        pipeline = self.pipeline_of(self.kind_for(inputs))
        worn = [*self.adapters.get("loras", []), *loras]
        asked = {**self.refining(asked, inputs), **used, **self.adapters, "loras": worn}
        settings = settings_of(pipeline, self.name, asked, inputs)
        for name, why in idle_options(pipeline, settings).items():
            raise RequestError(f"{name}: {why}; leave it out", name)
        return settings

    def refining(self, asked: dict[str, Any], inputs: SourcePictures) -> dict[str, Any]:
        """With who draws the last steps. Raises RequestError for where they begin, if nobody does."""
        if self.refined is None or inputs.mask is not None:
            if asked.get("denoising_end") is not None:
                why = (
                    "no refiner draws here"
                    if self.refined is None
                    else "the refiner draws whole pictures, not masked ones"
                )
                raise RequestError(f"denoising_end: {why}; leave it out", "denoising_end")
            return asked
        end = asked.get("denoising_end") or self.refined.denoising_end
        return {**asked, "refiner": self.refined.name, "denoising_end": end}

    def size_from(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that are drawn from a picture of this size, if a request does not say others."""
        pipeline = self.pipeline
        trained = None if pipeline.draws_any_size else pipeline.trained_size
        height, width = size_near((height, width), pipeline.image_processor.config.vae_scale_factor, trained)
        return width, height

    def remarks(self, settings: Settings, prompt: str, inputs: SourcePictures) -> list[str]:
        """What is to be said of a drawing that is possible, but hardly as it was meant, and of what is cut off."""
        pipeline = self.pipeline_of(self.kind_for(inputs))
        found = [
            remark_on_size(pipeline, settings.height, settings.width),
            remark_on_steps(pipeline, settings.num_inference_steps),
            None if settings.guidance_scale is None else remark_on_guidance(pipeline, settings.guidance_scale),
        ]
        conditioner = pipeline.conditioner(pipeline.device, None, settings.prompt_weights)
        texts = {"prompt": prompt, "negative prompt": settings.negative_prompt or ""}
        for name, cut in zip(texts, conditioner.cut([*texts.values()]), strict=True):
            if cut:
                long = f"The {name} is longer than the {conditioner.length} tokens that the model reads"
                found.append(f"{long}; this is left out: {shorten(cut, CUT, placeholder=' ...')}")
        return [one for one in found if one is not None]

    def wear(self, loras: list[Lora]) -> None:
        """Have these LoRAs loaded and no others, and note of which not all fits.

        Raises:
            ValueError: one does not fit at all; then it has none.
        """
        if loras == self._worn:
            return
        self._worn = None
        self.pipeline.unload_lora_weights()
        try:
            loaded = load_adapters(
                self.pipeline, [one.model_copy(update={"file": str(self.files[one.sha256])}) for one in loras], []
            )
        except BaseException:
            self.pipeline.unload_lora_weights()
            raise
        self._worn = list(loras)
        self._worn_in_part = [
            f"The LoRA {lora.file} fits this model in part only: {len(one.unmatched)} of its "
            f"{len(one.unmatched) + len(one.matched)} weights were left out; was it made for another one?"
            for lora, one in zip(loras, loaded, strict=True)
            if one.unmatched
        ]

    def draw(self, rows: list[Row]) -> None:
        """Draw a batch and tell the listeners of its jobs; it is stopped after the step at which no job is wanted."""
        first = rows[0].job
        self.wear(first.settings.loras)
        for job in {row.job for row in rows}:
            job.remarks += [one for one in self._worn_in_part if one not in job.remarks]
        pipeline = self.pipeline_of(first.kind)
        batch = batch_of(rows)
        arguments = call_arguments(pipeline, first.settings, batch, first.inputs)
        if any(row.job is not first for row in rows):
            arguments |= pictures_of(rows)
        negatives: dict[str, Any] = {}
        if first.settings.negative_prompt is not None:
            negatives = {"negative_prompt": [row.job.settings.negative_prompt for row in rows]}
        arguments |= negatives
        if first.settings.refiner is None:
            output, _ = watched(pipeline.stream(**arguments), rows)
        else:
            left = round(first.settings.num_inference_steps * (1 - (first.settings.denoising_end or 1)))
            output, begun = watched(pipeline.stream(**arguments, output_type="latent"), rows, left=left)
            if output is not None:
                refiner = pipeline.refiner
                rest = {**refined_arguments(refiner, first.settings, batch), **negatives, "image": output.images}
                output, _ = watched(refiner.stream(**rest), rows, begun)
        if output is None:
            return
        digests = {"model_digest": self.digest()}
        if first.settings.refiner is not None and self.refined is not None:
            digests["refiner_digest"] = self.refined.digest()
        machine = this_machine(pipeline)
        for row, drawn in zip(rows, scored(drawn_of(output, 0), rows, pipeline.device), strict=True):
            own = [one for one in rows if one.job is row.job]  # nobody else's prompts are told
            settings = row.job.settings.model_copy(update=digests)
            placed = replace(drawn, place=(0, own.index(row)))
            record = record_of(settings, [batch_of(own)], [placed], machine)
            row.job.listener(Finished(row.number, placed, record))


def batch_of(rows: list[Row]) -> Batch:
    return Batch(prompts=[row.job.prompt for row in rows], seeds=[row.job.seeds[row.number] for row in rows])


def scored(pictures: list[Drawn], rows: list[Row], device: Any) -> list[Drawn]:
    """The pictures, with CLIP scores where their jobs want them."""
    wanted = [i for i, row in enumerate(rows) if row.job.clip is not None and not pictures[i].spoilt]
    if not wanted:
        return pictures
    from latentdiff.pipelines.core.candidates import load_reranker

    captions = [
        without_weights(rows[i].job.prompt) if rows[i].job.settings.prompt_weights else rows[i].job.prompt
        for i in wanted
    ]
    cosines = load_reranker(rows[wanted[0]].job.clip, device).cosines([pictures[i].image for i in wanted], captions)
    scores = dict(zip(wanted, (100 * cosines.clamp(min=0)).tolist(), strict=True))
    return [replace(one, score=scores.get(i)) for i, one in enumerate(pictures)]


def pictures_of(rows: list[Row]) -> dict[str, Any]:
    """What each row starts from, as arguments of a call; nothing where it is words alone."""
    at = {id(row.job): row.job.inputs.at(*size_of(row.job), row.job.settings.cut) for row in rows}
    return {name: [at[id(row.job)][name] for row in rows] for name in at[id(rows[0].job)]}


def size_of(job: Job) -> tuple[int, int]:
    return job.settings.width, job.settings.height


def watched(drawing: Iterator[Progress], rows: list[Row], begun: int = 0, left: int = 0) -> tuple[Any, int]:
    """What a drawing gives at its end, with previews shown to those who want them; None if nobody waits for it.

    Args:
        begun, left: steps that another drawing has before or after it.

    Returns:
        The steps that it had, too.
    """
    with closing(drawing) as progress:  # type: ignore[type-var]
        for one in progress:
            if one.output is not None:
                return one.output, one.total
            if all(row.job.unwanted for row in rows):
                break
            step, total = begun + one.step, begun + one.total + left
            wanting = [i for i, row in enumerate(rows) if shows(row.job, step, total)]
            images = one.preview() if wanting else []
            for i in wanting:
                rows[i].job.listener(Preview(rows[i].number, step, total, images[i]))
    return None, 0


def shows(job: Job, step: int, total: int) -> bool:
    """Whether a job gets a preview after this step: its number of them is spread evenly; the last step has none."""
    shown = min(job.previews, total - 1)
    return not job.unwanted and step in {round((i + 1) * total / (shown + 1)) - 1 for i in range(shown)}

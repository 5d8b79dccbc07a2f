"""Teach the text encoder words that no caption has, on a processor; autoencoder and denoiser stay as they are.

    python -m latentdiff.training.recipes.emoji.synonyms MODEL OUT --bundle BUNDLE --minutes 40

The encoder learns that a caption with such a word means what the same caption with the known word means to the
denoiser: what its cross-attention reads of both must be alike. The states of captions that training knows must stay.
The words come from `synonyms.txt`; what other words of the vocabulary mean is taken from the encoder itself, whose
mean states say which known name a word is nearest to. Only the upper layers learn; what the lower ones make of the
captions is computed once, and the embeddings, the largest file, stay.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff.models.layers import merge_heads, split_heads
from latentdiff.pipelines import TextToImagePipeline

from .burst.clock import Clock, Log, apply_update, averaged, optimizer
from .captions import Concept, read_concepts
from .drawings import read_bundle
from .grammar import article
from .held_out import family
from .synonym_pairs import Pair, Pairs, Swap, Synonyms, is_form, is_validation, read_synonyms

QUERIES = 16  # of each cross-attention, that read the states
READING = 4  # cross-attentions that read them in one update
PADDING = 2  # padding tokens of the captions in training; all of them have nearly the same state
WHOLE = 0.04  # of the captions: as long as prompts are when they are drawn
STATES_VARIANCE = 0.1  # of text states, about


@dataclass(frozen=True)
class Settings:
    """Of one training. Shares are of the pairs: the rest are captions that stay what they are.

    Attributes:
        learning: how many of the encoder's layers learn, from the top.
        pairs: of captions, that are drawn beforehand and learned from again and again.
        nearest: cosine of a word of the vocabulary and a name, from which one stands for the other.
    """

    learning: int = 3
    pairs: int = 24_000
    batch: int = 48
    rate: float = 5e-4
    words: float = 0.28
    vocabulary: float = 0.22
    colours: float = 0.06
    praise: float = 0.04
    nearest: float = 0.5
    states_weight: float = 0.1
    warmup: int = 100
    seed: int = 0


@contextmanager
def fast() -> Iterator[None]:
    """bfloat16 where the processor has it, and plain attention, which learns thrice as fast of few tokens."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
    with half, sdpa_kernel(SDPBackend.MATH):
        yield


class Encoder:
    """A BERT in two parts: layers that stay, and `layers` above them that learn."""

    def __init__(self, tokenizer: Any, bert: Any, learning: int) -> None:
        self.tokenizer, self.bert, self.longest = tokenizer, bert, int(tokenizer.model_max_length)
        self.layers: nn.ModuleList = bert.encoder.layer[-learning:]

    def tokens(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, L), and which of them are no padding (B, L)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer(list(captions), max_length=min(length, self.longest), **options)
        return batch["input_ids"], batch["attention_mask"].bool()

    @torch.no_grad()
    def below(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, L) -> what the layers that stay make of them, (B, L, D)."""
        with fast():
            hidden = self.bert.embeddings(ids)
            return through(self.bert.encoder.layer[: -len(self.layers)], hidden, mask).float()

    def states(self, captions: Sequence[str], length: int) -> Tensor:
        """Text states (B, L, D) of both parts."""
        ids, mask = self.tokens(captions, length)
        with fast():
            return through(self.layers, self.below(ids, mask), mask).float()

    @torch.no_grad()
    def means(self, captions: Sequence[str], length: int = 16) -> Tensor:
        """(N, D): the mean states of the captions' tokens, of length 1, as the sentence encoder was trained."""
        found = []
        for start in range(0, len(captions), 256):
            part = captions[start : start + 256]
            mask = self.tokens(part, length)[1][..., None].float()
            found.append(F.normalize((self.states(part, length) * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)


def through(layers: nn.ModuleList, hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D) through layers of a BERT that do not see where `mask` (B, L) is false."""
    seen = torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None, None]  # (B, 1, 1, L)
    for layer in layers:
        hidden = layer(hidden, seen.expand(-1, -1, mask.shape[1], -1))
    return hidden


class Readers:
    """What the denoiser's cross-attentions read of text states, for queries that drawing makes.

    Args:
        pipeline: whose denoiser reads; it draws `prompts` to find queries.
        longest: L of the states that it reads; of shorter ones the last, padding, counts for all that are missing.
    """

    @torch.no_grad()
    def __init__(self, pipeline: TextToImagePipeline, prompts: Sequence[str], longest: int, seed: int = 0) -> None:
        self.longest = longest
        named = pipeline.unet.named_modules()
        self.attentions = [module for name, module in named if name.endswith("attn2")]
        self.queries = collect_queries(pipeline, self.attentions, prompts, seed)
        states = pipeline.encode_prompt(list(prompts))[0]
        reads = [self.read(states, slice(QUERIES), number) for number in range(len(self.attentions))]
        self.scales = [1 / float(read.var(0).mean().clamp(min=1e-8)) for read in reads]

    def read(self, states: Tensor, chosen: slice | Tensor, number: int) -> Tensor:
        """(B, L, D) -> what attention `number` reads with the `chosen` of its queries, (B, N, D')."""
        weight = torch.zeros(states.shape[1])
        weight[-1] = math.log(self.longest - len(weight) + 1)
        attention, queries = self.attentions[number], self.queries[number][chosen]
        query = split_heads(queries[None].expand(len(states), -1, -1), attention.heads)
        keys, values = attention.keys_values(states)
        return merge_heads(F.scaled_dot_product_attention(query.to(keys), keys, values, weight.to(keys)[None]))

    def distance(self, states: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """(B, L, D) each -> (B,): mean squared difference of what is read; 1 if captions have nothing in common.

        It is of some of the attentions and queries, chosen by `generator`.
        """
        chosen = torch.randint(len(self.queries[0]), (QUERIES,), generator=generator)
        found = []
        with fast():
            for number in torch.randperm(len(self.attentions), generator=generator)[:READING].tolist():
                one, two = (self.read(x, chosen, number) for x in (states, wanted))
                found.append(self.scales[number] * (one - two).float().square().mean((1, 2)) / 2)
        return torch.stack(found).mean(0)

    @torch.no_grad()
    def summary(self, states: Tensor, queries: int = 8) -> Tensor:
        """(B, L, D) -> (B, S), whose squared distances are as `distance` with all attentions and so many queries."""
        parts = [self.read(states, slice(queries), number) for number in range(len(self.attentions))]
        scaled = [(s / part[0].numel()) ** 0.5 * part.flatten(1) for s, part in zip(self.scales, parts, strict=True)]
        return torch.cat(scaled, dim=1)


@torch.no_grad()
def collect_queries(
    pipeline: TextToImagePipeline, attentions: Sequence[Any], prompts: Sequence[str], seed: int, most: int = 2048
) -> list[Tensor]:
    """Of each attention, (N, D') queries that it makes while `prompts` are drawn; N is the same for all."""
    found: dict[int, list[Tensor]] = {number: [] for number in range(len(attentions))}
    hooks = [
        attention.to_q.register_forward_hook(lambda module, args, out, n=number: found[n].append(out.flatten(0, 1)))
        for number, attention in enumerate(attentions)
    ]
    try:
        for start in range(0, len(prompts), 16):
            pipeline(list(prompts[start : start + 16]), seed=seed + start, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.cat(parts) for parts in found.values()]
    most = min(most, *map(len, whole))
    return [queries[torch.randperm(len(queries), generator=generator)[:most]].clone() for queries in whole]


class Lesson:
    """What is taught: pairs of captions, and words kept apart to see what comes of it.

    Args:
        synonyms: other words, by name or colour; see `read_synonyms`.
        concepts: what captions show, by the names that they use (a leading `~` means no article).
        unseen: words that are held out.
        encoder: that is to be taught; it says what other words of its vocabulary are near to.
    """

    def __init__(
        self,
        synonyms: Synonyms,
        concepts: Mapping[str, Concept],
        unseen: Sequence[str],
        encoder: Encoder,
        settings: Settings,
    ) -> None:
        bare = {name.removeprefix("~"): name for name in concepts}
        colours = {colour: words for colour, words in synonyms.items() if colour not in bare}
        swaps = [Swap(word, bare[name]) for name, words in synonyms.items() if name in bare for word in words]
        swaps = [swap for swap in swaps if swap.word.removeprefix("~") not in bare]
        self.kept = [swap for swap in swaps if is_validation(swap.word)]
        self.swaps = [swap for swap in swaps if not is_validation(swap.word)]
        kept = {word for swap in self.kept for word in swap.word.removeprefix("~").split()}
        far = vocabulary_swaps(encoder, list(concepts), unseen, settings.nearest)
        self.far = [swap for swap in far if swap.word not in kept]
        self.pairs, self.concepts, self.settings = Pairs(self.swaps, colours, concepts), concepts, settings

    def draw(self, rng: random.Random, count: int) -> list[Pair]:
        """So many pairs of captions, (what is read, what it means)."""
        s, makers = self.settings, self.pairs
        kinds = {
            makers.word: s.words,
            lambda rng: makers.word(rng, rng.choice(self.far or self.swaps)): s.vocabulary,
            makers.tint: s.colours,
            makers.praise: s.praise,
            makers.same: 1 - s.words - s.vocabulary - s.colours - s.praise,
        }
        return [make(rng) for make in rng.choices(list(kinds), list(kinds.values()), k=count)]


def vocabulary_swaps(encoder: Encoder, names: Sequence[str], unseen: Sequence[str], least: float) -> list[Swap]:
    """Words of the tokenizer that no name has, each for the name that its mean state is nearest to."""
    said = {word for name in names for word in name.removeprefix("~").split()}
    words = [word for word in sorted(encoder.tokenizer.get_vocab()) if word.isalpha() and len(word) > 2]
    words = [word for word in words if word not in said and not any(is_form(word, held) for held in unseen)]
    asked, known = (encoder.means([article(word) for word in some]) for some in (words, names))
    likeness, nearest = (asked @ known.T).max(1)
    rows = zip(words, likeness.tolist(), nearest.tolist(), strict=True)
    return [Swap(word, names[number]) for word, close, number in rows if close >= least]


@dataclass(frozen=True)
class Read:
    """Captions of one length: what learning begins with and what it shall end with.

    Attributes:
        below: (N, L, D) float16, of the layers that stay, of what is read.
        mask: (N, L), which tokens are no padding.
        wanted: (N, L, D) float16, the states of what is meant.
        same: (N,), whether both are one caption.
    """

    below: Tensor
    mask: Tensor
    wanted: Tensor
    same: Tensor

    def __getitem__(self, rows: Tensor) -> "Read":
        return Read(self.below[rows], self.mask[rows], self.wanted[rows], self.same[rows])


@torch.no_grad()
def read_pairs(encoder: Encoder, pairs: Sequence[Pair], rng: random.Random) -> list[Read]:
    """The pairs by their length: that of the longer caption and a little padding."""
    counts = [max(len(ids) for ids in encoder.tokenizer(list(pair))["input_ids"]) + PADDING for pair in pairs]
    groups: dict[int, list[Pair]] = defaultdict(list)
    for count, pair in zip(counts, pairs, strict=True):
        groups[encoder.longest if rng.random() < WHOLE else min(count, encoder.longest)].append(pair)
    found = []
    for length, group in sorted(groups.items()):
        parts = [group[start : start + 128] for start in range(0, len(group), 128)]
        tokens = [encoder.tokens([read for read, _ in part], length) for part in parts]
        below = torch.cat([encoder.below(*some).half() for some in tokens])
        wanted = torch.cat([encoder.states([meant for _, meant in part], length).half() for part in parts])
        same = torch.tensor([read == meant for read, meant in group])
        found.append(Read(below, torch.cat([mask for _, mask in tokens]), wanted, same))
    return found


class Exam:
    """The share of words kept apart that the denoiser reads as what they stand for, not as any other known name."""

    def __init__(self, encoder: Encoder, readers: Readers, lesson: Lesson, length: int = 14) -> None:
        self.readers, self.swaps, self.length = readers, lesson.kept, length
        self.families = {name: family(concept.hexcode) for name, concept in lesson.concepts.items()}
        self.known = self.summaries(encoder, list(lesson.concepts))

    @torch.no_grad()
    def summaries(self, encoder: Encoder, names: Sequence[str]) -> Tensor:
        captions = [article(name) for name in names]
        parts = [captions[start : start + 64] for start in range(0, len(captions), 64)]
        return torch.cat([self.readers.summary(encoder.states(part, self.length)) for part in parts])

    def __call__(self, encoder: Encoder) -> float:
        names, asked = list(self.families), self.summaries(encoder, [swap.word for swap in self.swaps])
        nearest = [self.families[names[number]] for number in torch.cdist(asked, self.known).argmin(1).tolist()]
        return sum(self.families[s.name] == one for s, one in zip(self.swaps, nearest, strict=True)) / len(nearest)


def teach(
    pipeline: TextToImagePipeline,
    lesson: Lesson,
    log: Log,
    minutes: float,
    updates: int | None = None,
    begin: dict[str, Tensor] | None = None,
) -> None:
    """Train the pipeline's text encoder in place, for so many updates at most, to averaged weights; `begin` has weights
    of the encoder to go on from, while the pipeline's own tell what captions mean."""
    settings, bert = lesson.settings, pipeline.text_encoder.requires_grad_(False)
    encoder = Encoder(pipeline.tokenizer, bert, settings.learning)
    rng, generator = random.Random(settings.seed), torch.Generator().manual_seed(settings.seed)
    names = rng.sample(list(lesson.concepts), min(64, len(lesson.concepts)))
    readers = Readers(pipeline, [article(name) for name in names], encoder.longest)
    groups = read_pairs(encoder, lesson.draw(rng, settings.pairs), rng)
    exam = Exam(encoder, readers, lesson)
    log(pairs=settings.pairs, kept=exam(encoder))
    if begin is not None:
        bert.load_state_dict(begin)
    layers = encoder.layers.requires_grad_(True)
    adam, average = optimizer(layers, settings.rate, 0.01), EMAModel(layers.parameters(), 0.998, foreach=True)
    clock, errors, told = Clock(minutes * 60, settings.rate, settings.warmup, fall=0.7), dict[str, float](), 0.0
    while not clock.over and clock.updates != updates:
        group = rng.choices(groups, [len(one.same) for one in groups])[0]
        part = group[torch.randint(len(group.same), (settings.batch,), generator=generator)]
        with fast():
            states = through(layers, part.below.float(), part.mask).float()
        wanted = part.wanted.float()
        error = readers.distance(states, wanted, generator)
        loss = error + settings.states_weight * (states - wanted).square().mean((1, 2)) / STATES_VARIANCE
        apply_update(loss.mean(), layers, adam, clock)
        average.step(layers.parameters())
        for name, some in (("same", error[part.same]), ("other", error[~part.same])):
            mean = float(some.detach().mean()) if len(some) else errors.get(name, 0.0)
            errors[name] = 0.99 * errors.get(name, mean) + 0.01 * mean
        if clock.share - told >= 0.1:
            told = clock.share
            with averaged(layers, average):
                log(updates=clock.updates, **errors, kept=exam(encoder))
    average.copy_to(layers.parameters())
    log(updates=clock.updates, **errors, kept=exam(encoder))


def between(old: Mapping[str, Tensor], new: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
    """Weights that lie `part` of the way from the old ones to the new: known words lose less than others gain.

    Robust fine-tuning of zero-shot models (Wortsman et al. 2022), Eq. 1.
    """
    return {name: torch.lerp(old[name], w, part) if w.is_floating_point() else w for name, w in new.items()}


def run(options: argparse.Namespace) -> None:
    settings = Settings(seed=options.seed, rate=options.rate, learning=options.layers)
    concepts = {name: job.concept for job in read_bundle(options.bundle) for name in job.concept.names}
    unseen = [name for concept in read_concepts().values() for name in concept.unseen]
    load = partial(TextToImagePipeline.from_pretrained, torch_dtype=torch.float32)
    pipeline = load(options.model)
    pipeline.set_progress_bar_config(disable=True)
    options.output.mkdir(parents=True)
    log = Log(options.output / "log.jsonl", "synonyms")
    synonyms = read_synonyms({name.removeprefix("~") for name in concepts}, unseen)
    encoder = Encoder(pipeline.tokenizer, pipeline.text_encoder, settings.learning)
    lesson = Lesson(synonyms, concepts, unseen, encoder, settings)
    log(words=len(lesson.swaps), kept_apart=len(lesson.kept), vocabulary=len(lesson.far))
    begin = load(options.go_on).text_encoder.state_dict() if options.go_on else None
    teach(pipeline, lesson, log, options.minutes, begin=begin)
    whole = load(options.model)  # tokenizers keep paddings
    old, new = (one.text_encoder.state_dict() for one in (whole, pipeline))
    whole.text_encoder.load_state_dict(between(old, new, options.part))
    whole.save_pretrained(options.output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="synonyms", description="Teach the text encoder words that no caption has.")
    parser.add_argument("model", help="pipeline folder, or the name of a packaged model")
    parser.add_argument("output", type=Path, help="the pipeline folder to write; it must not exist yet")
    parser.add_argument("--bundle", type=Path, required=True, help="whose names training used")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument(
        "--layers", type=int, default=Settings.learning, help="of the encoder, that learn, from the top"
    )
    parser.add_argument("--part", type=float, default=0.7, help="of the way from the old weights to the taught ones")
    parser.add_argument("--go-on", type=Path, help="a folder that this wrote, to go on from its text encoder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"synonyms: {error}")


if __name__ == "__main__":
    main()

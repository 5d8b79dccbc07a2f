"""What the Hugging Face hub has not, or cannot be asked for, said in one sentence."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOT_REACHED = re.compile(
    r"couldn't connect|cannot reach|connection error|offline mode|locate the file on the hub|not fully cached|"
    r"name or service not known|max retries exceeded",
    re.IGNORECASE,
)
NOISY = (None, "huggingface_hub.utils._http", "diffusers.pipelines.pipeline_utils")
"""Loggers that say, each in its own way, what the error says; open_clip uses the root of all."""


class HubError(OSError):
    """The hub has no such model, or not for everybody, or cannot be asked."""


def hub_failure(error: BaseException) -> str | None:
    """What to say of a model that could not be had from the hub, after its name; None: the error is of another kind."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__

    def is_one(*kinds: type[Exception]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if is_one(errors.GatedRepoError):
        return "is on the hub for those who accept its terms on its page there, and log in with 'hf auth login'"
    if is_one(errors.RevisionNotFoundError):
        return "has no such revision on the hub"
    if is_one(errors.RepositoryNotFoundError):
        return "is not on the hub, or is private: 'hf auth login' then says who you are"
    offline = is_one(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if offline or any(NOT_REACHED.search(str(one)) for one in chain):
        return "is not on this machine, and the hub cannot be reached; name a folder, or repeat it with a network"
    return None


def check_on_hub(name: str, kind: str = "model") -> None:
    """Raises HubError for what is neither here nor on the hub, as far as that is known without loading anything heavy.

    kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi, constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir():
        return
    with asking_hub(name):
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=10)
        except Exception as error:
            if hub_failure(error) is not None:
                raise


@contextmanager
def asking_hub(name: object) -> Iterator[None]:
    """Let a failure to have `name` from the hub be a `HubError` of one sentence, and nothing else be said of it."""
    loggers = [logging.getLogger(noisy) for noisy in NOISY]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception as error:
        said = hub_failure(error)
        if said is None:
            raise
        raise HubError(f"{name} {said}") from None
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was

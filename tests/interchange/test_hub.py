"""What the hub has not, or cannot be asked for, is said in one sentence."""

import logging
from collections.abc import Callable

import pytest
from huggingface_hub import errors
from tiny import tiny_pipeline

from latentdiff import ClassConditionalPipeline, TextToImagePipeline
from latentdiff.interchange.hub import HubError, asking_hub
from latentdiff.training.data.captioner import Captioner
from latentdiff.training.trainers.finetune import load_model


@pytest.mark.parametrize(
    "ask",
    [
        TextToImagePipeline.from_pretrained,
        ClassConditionalPipeline.from_pretrained,
        Captioner.load,
        load_model,
        lambda name: tiny_pipeline().load_lora_weights(name),
    ],
)
def test_without_a_network(ask: Callable[[str], object], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HubError) as caught:
        ask("nobody/none")
    assert str(caught.value) == (
        "nobody/none is not on this machine, and the hub cannot be reached; name a folder, or repeat it with a network"
    )
    assert caught.value.__suppress_context__
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.RepositoryNotFoundError, "is not on the hub, or is private"),
        (errors.GatedRepoError, "for those who accept its terms"),
        (errors.RevisionNotFoundError, "has no such revision"),
    ],
)
def test_what_the_hub_answers(kind: type[errors.HfHubHTTPError], said: str) -> None:
    answer = OSError("Cannot load model a/b")  # as diffusers has it
    answer.__cause__ = kind.__new__(kind)
    with pytest.raises(HubError, match=f"^a/b .*{said}"), asking_hub("a/b"):
        raise answer


def test_other_errors_and_loggers_stay_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    for error in (
        OSError("the disk is full"),
        ValueError("wrong"),
        errors.EntryNotFoundError("no file"),
    ):
        with pytest.raises(type(error)) as caught, asking_hub("a/b"):
            raise error
        assert caught.value is error
    with asking_hub("a/b"):
        logging.warning("hidden")
    logging.warning("shown")
    assert caplog.messages == ["shown"]

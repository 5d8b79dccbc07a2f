import os
from pathlib import Path

import pytest

from latentdiff.pipelines.batch.prompt_files import Prompt, name_files, read_prompts


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffa red car\r\n\r\n  # not this\n  a blue fish  \n赤い車".encode())
    assert [prompt.prompt for prompt in read_prompts(file)] == ["a red car", "a blue fish", "赤い車"]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"prompt": "a car", "seed": 3, "guidance_scale": null}\n\n{"prompt": "b", "file_name": "x/b.png"}\n'
    )
    assert read_prompts(file) == [Prompt(prompt="a car", seed=3), Prompt(prompt="b", file_name="x/b.png")]


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,seed,guidance_scale,negative_prompt\n"a car, red",3,,\n"two\nlines",,2.5,blue\n')
    assert read_prompts(file) == [
        Prompt(prompt="a car, red", seed=3),
        Prompt(prompt="two\nlines", guidance_scale=2.5, negative_prompt="blue"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "x", r"prompts are read from \.txt, \.jsonl, \.csv"),
        ("a.txt", "# only this\n\n", "there are no prompts"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\nnonsense\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: a JSON object is expected"),
        ("a.jsonl", '{"prompt": "a", "sede": 1}\n', "line 1: unknown column 'sede'; did you mean 'seed'"),
        ("a.jsonl", '{"prompt": "a", "qqq": 1}\n', "unknown column 'qqq'; the columns are prompt, seed"),
        ("a.jsonl", '{"seed": 1}\n', "line 1: there is no prompt"),
        ("a.jsonl", '{"prompt": " "}\n', "line 1: there is no prompt"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}\n', r"line 1: seed: .*got -1"),
        ("a.csv", "prompt,seed\na,b\n", r"line 2: seed: .*got 'b'"),
        ("a.csv", "prompt,seed\na\n", "line 2: it has fewer cells"),
        ("a.csv", "prompt,seed\na,1,2\n", "line 2: it has more cells"),
        ("a.csv", 'prompt\n"a" b\n', "line 2"),
        ("a.csv", "text\na\n", "unknown column 'text'"),
        (
            "a.csv",
            "prompt,guidance_scale\na,nan\n",
            r"line 2: guidance_scale: a finite number is expected \(got 'nan'\)",
        ),
        ("a.jsonl", '{"prompt": "a", "guidance_scale": Infinity}\n', "line 1: guidance_scale: .*finite number"),
    ],
)
def test_mistakes(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    for name, content in (("a.txt", "a\u2028b\x0cc"), ("a.csv", "prompt\na\u2028b\x0cc")):
        (tmp_path / name).write_text(content)
        assert [prompt.prompt for prompt in read_prompts(tmp_path / name)] == ["a\u2028b\x0cc"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt is a pipe or a device"):
        read_prompts(tmp_path / "a.txt")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such file"):
        read_prompts(tmp_path / "a.txt")


def test_names() -> None:
    assert name_files([Prompt(prompt="a"), Prompt(prompt="b", file_name="x/./b.PNG"), Prompt(prompt="c")]) == [
        "000001.png",
        "x/b.PNG",
        "000003.png",
    ]


def test_an_accent_is_the_same_however_it_is_written() -> None:
    names = ["caf\u00e9.png", "Cafe\u0301.png"]
    with pytest.raises(ValueError, match="prompts 1 and 2 have the same file_name"):
        name_files([Prompt(prompt="a", file_name=name) for name in names])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.png", "leaves the folder"),
        ("x/../../a.png", "leaves the folder"),
        ("/tmp/a.png", "leaves the folder"),
        ("..\\a.png", "leaves the folder"),
        ("C:a.png", "leaves the folder"),
        ("a\0.png", "leaves the folder"),
        ("a.jpg", r"must end in \.png"),
        ("", r"must end in \.png"),
        (".png", r"must end in \.png"),
        ("000002.PNG", "prompts 1 and 2 have the same file_name"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        name_files([Prompt(prompt="a", file_name=name), Prompt(prompt="b")])

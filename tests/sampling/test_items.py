"""Prompt lines with options, grids' axes, and batches that do not know who draws them."""

import pytest

from ldm.errors import InputError
from ldm.sampling.items import LIST, Prompt, batches, planned, read_axis, read_prompts

CONFIG = {
    "checkpoint": "run",
    "weights": "ema",
    "precision": "fp32",
    "num_images": 1,
    "seed": 10,
    "negative_prompt": "",
    "num_steps": 5,
    "guidance_scale": None,
}
NONE = {"": {}}


def written(tmp_path, text):
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    return read_prompts(str(tmp_path / "p.txt"))


def test_a_line_as_sd_scripts_writes_it(tmp_path):
    line = "a cat, (soft:1.2) --n blurry, bad -- worse --w 512 --h 448 --d 7 --s 30 --l 7.5 --ss k_euler_a"
    [prompt] = written(tmp_path, f"# first\n\n{line}\r\n")
    assert prompt.text == "a cat, (soft:1.2)"
    assert prompt.place.endswith("p.txt:3")
    assert prompt.options == {
        "negative_prompt": "blurry, bad -- worse",
        "width": 512,
        "height": 448,
        "seed": 7,
        "num_steps": 30,
        "guidance_scale": 7.5,
        "sampler": "euler_ancestral",
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ddim", "ddim"),
        ("euler_a", "euler_ancestral"),
        ("euler", "euler"),
        ("dpmsolver++", "dpmpp_2m"),
        ("heun", "heun"),
        ("pndm", "plms"),
        ("unipc", "unipc"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde"),
        ("Euler a", "euler_ancestral"),
    ],
)
def test_samplers_by_the_names_of_other_tools(tmp_path, theirs, ours):
    assert written(tmp_path, f"a --ss {theirs}")[0].options == {"sampler": ours}


def test_a_line_without_options_is_taken_word_for_word(tmp_path):
    lines = ["  a cat , 100 % -- b", "well-known --- thing", "x -n y", "a=b # kept", "--5 --"]
    found = written(tmp_path, "\n".join(lines))
    assert [p.text for p in found] == lines
    assert all(p.options == {} for p in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w wide", r"p.txt:2: --w wide: not a number"),
        ("a --s 2.5", r"p.txt:2: --s 2.5: not a number"),
        ("a --l", r"p.txt:2: --l : not a number"),
        ("a --t 0.7", r"p.txt:2: --t is no option of a prompt; have: --n --w --h --d --s --l --ss"),
        ("a --w 8 --w 16", r"p.txt:2: --w is given twice"),
        ("a --ss lms", r"p.txt:2: sampler lms: no such sampler; have: ddim, .*euler_a"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        written(tmp_path, f"fine --s 3\n{line}\n")


def test_seeds_count_on_unless_the_line_has_its_own():
    prompts = [Prompt("a"), Prompt("b", {"seed": 3, "num_steps": 9}, "f:2"), Prompt("c")]
    items, _ = planned(CONFIG | {"num_images": 2}, prompts, NONE, NONE)
    assert [item.seed for item in items] == [10, 11, 3, 4, 14, 15]
    assert [item.options["num_steps"] for item in items] == [5, 5, 9, 9, 5, 5]
    assert items[2].model == ("run", "ema", "fp32")
    assert not {*LIST, "checkpoint"} & items[0].options.keys()


def test_axes():
    verbatim = ("prompt",)
    assert read_axis("xy.x", ["num_steps:1, 2,30"], verbatim) == ("num_steps", ["1", "2", "30"])
    name, values = read_axis("xy.x", ["guidance_interval:[0,1],[1,2]"], verbatim)
    assert (name, values) == ("guidance_interval", ["[0,1]", "[1,2]"])
    assert read_axis("xy.x", ["prompt:a, b: c", "prompt:d"], verbatim) == ("prompt", ["a, b: c", "d"])
    for wrong in (["num_steps"], ["num_steps:"], ["num_steps:1", "seed:2"]):
        with pytest.raises(InputError, match="not one option with values"):
            read_axis("xy.x", wrong, verbatim)


def test_a_grid_is_drawn_row_by_row_and_its_axes_go_before_the_lines():
    columns = {"s=1": {"num_steps": 1}, "s=2": {"num_steps": 2}}
    rows = {"g=3": {"guidance_scale": 3.0}, "g=4": {"guidance_scale": 4.0}}
    prompts = [Prompt("a", {"num_steps": 99, "negative_prompt": "n"})]
    items, sheets = planned(CONFIG | {"num_images": 2}, prompts, columns, rows)
    drawn = [(i.options["guidance_scale"], i.options["num_steps"], i.seed) for i in items]
    assert drawn == [(g, s, seed) for g in (3.0, 4.0) for s in (1, 2) for seed in (10, 11)]
    assert {i.options["negative_prompt"] for i in items} == {"n"}
    assert [list(places) for places, _ in sheets] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(InputError, match=r"xy.y: sets what xy.x sets"):
        planned(CONFIG, prompts, columns, columns)


def test_batches_hold_equal_options_and_at_most_so_many():
    prompts = [Prompt(str(i), {"num_steps": 7} if i in (3, 4) else {}) for i in range(8)]
    items, _ = planned(CONFIG, prompts, NONE, NONE)
    assert batches(items, 2) == [[0, 1], [2], [3, 4], [5, 6], [7]]
    assert batches(items, 99) == [[0, 1, 2], [3, 4], [5, 6, 7]]

"""Pictures from a checkpoint.

    python sample.py checkpoint=runs/quickstart prompt="red apple on a blue background" num_images=4 seed=7
    python sample.py checkpoint=runs/quickstart prompt="green pear" init_image=sketch.png strength=0.7
    python sample.py checkpoint=runs/quickstart prompt="pear" xy.x=guidance_scale:1,2,4 xy.y=num_steps:10,30
    python sample.py checkpoint=runs/quickstart --from-png samples/quickstart/00000.png

Each picture is a PNG that carries its recipe, which --from-png draws again; several make a sheet, too.
Under srun or torchrun each process draws its part of the list. All options: --help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.config import CONFIG_DIR, compose, plain, split_arguments, to_yaml
from ldm.errors import InputError, reported, say
from ldm.sampling.drawing import draw, survey
from ldm.sampling.items import LIST, MODEL, Axis, Item, Prompt, batches, planned, read_axis, read_prompts
from ldm.sampling.output import Sheet, opened, processes
from ldm.sampling.recipes import Recipe
from ldm.sampling.request import whole

AXES = ("xy.x", "xy.y")
REPEATED = ("prompt", *AXES)
PATHS = ("checkpoint", "prompt_file", "from_png", "init_image", "mask_image", "output")
VERBATIM = (*REPEATED, *PATHS, "negative_prompt")  # exactly as typed: not for Hydra


def split(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Texts and paths exactly as they were typed, by option, and everything else."""
    texts: dict[str, list[str]] = {}
    rest = []
    for word in (words := iter(argv)):
        name, equals, value = word.partition("=")
        if name == "--from-png":
            name, equals, value = "from_png", "=", value if equals else next(words, "")
        if equals and name in VERBATIM:
            texts.setdefault(name, []).append(value)
        else:
            rest.append(word)
    for name, values in texts.items():
        if name not in REPEATED and len(values) > 1:
            raise InputError(name, f"given {len(values)} times", f"only {', '.join(REPEATED)} may repeat")
    return texts, rest


def configured(overrides: Sequence[str], texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """configs/sample.yaml under what was typed."""
    config = plain(compose("sample", overrides))
    config |= {name: values[0] for name, values in texts.items() if name not in REPEATED}
    if not any(word.startswith("sampler.") for word in overrides):  # its name says more than its section
        config["sampler"] = next((w[8:] for w in overrides[::-1] if w.startswith("sampler=")), None)
    return config


def axis(option: str, texts: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> Axis:
    """What each value of an axis sets, by its label; one empty entry without the axis."""
    if option not in texts:
        return {"": {}}
    name, values = read_axis(option, texts[option], VERBATIM)
    top = name.partition(".")[0]
    if top in LIST and top not in ("prompt", "seed"):
        raise InputError(f"{option}={name}", "is no option of a picture", "as guidance_scale or seed are")
    if name in VERBATIM:
        return {value: {name: value} for value in values}
    others = [word for word in overrides if not word.startswith(f"{name}=")]
    return {f"{name}={v}": {top: configured([*others, f"{name}={v}"], {})[top]} for v in values}


def prompts_of(texts: Mapping[str, Sequence[str]], recipe: Recipe | None) -> list[Prompt]:
    """The prompts of the command line, then those of the prompt file; without both that of the recipe."""
    prompts = [Prompt(text) for text in texts.get("prompt", [])]
    prompts += [line for path in texts.get("prompt_file", []) for line in read_prompts(path)]
    if not prompts and recipe is not None:
        prompts = [Prompt(recipe.fields["prompt"])]
    if not prompts and not any(value.startswith("prompt:") for o in AXES for value in texts.get(o, [])):
        raise InputError("prompt", "there is none", 'give one: prompt="a red apple"')
    return prompts


def sample(
    items: list[Item], sheets: list[Sheet], config: Mapping[str, Any], recipe: Recipe | None, same: bool
) -> None:
    """Check all, draw this process's part, save it picture by picture and say where."""
    import torch

    import ldm
    from ldm.pipeline import bar

    rank, count, local = processes()
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    pipe_of = lru_cache(4)(lambda *model: ldm.load(*model[:2], device, model[2], config["speed"]))
    groups = batches(items, whole("batch_size", config["batch_size"], 1))
    requests, pipe = survey(items, pipe_of), pipe_of(*items[0].model)
    if recipe is not None:
        recipe.require_same(requests[0], pipe.digest if same else None)
    if rank == 0 and len(groups) < count:
        few = f"only {len(groups)} of {count} processes draw"
        say(f"ldm: {few}: batch_size={config['batch_size']} pictures at a time", error=True)
    folder = Path(config["output"] or Path("samples") / pipe.name.rpartition(" ")[0])
    mine, sizes = groups[rank::count], {(request.width, request.height) for request in requests}
    try:
        out = opened(config["format"], folder, [i for group in mine for i in group], count > 1, sizes)
        with bar(sum(len(requests[group[0]].grid) - 1 for group in mine), rank == 0) as advance:
            draw(items, mine, pipe_of, out, advance)
        paths = out.finish(len(items), sheets)
    except OSError as error:
        what = f"cannot write there ({error.strerror or error})"
        raise InputError(f"output={folder}", what, every_rank=True) from None
    say(*paths)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, or raises SystemExit(2) after one line on what was wrong."""
    with reported():
        texts, rest = split(sys.argv[1:] if argv is None else argv)
        flags, overrides = split_arguments(rest)
        if "help" in flags:
            print(__doc__ + "\n" + (CONFIG_DIR / "sample.yaml").read_text(encoding="utf-8"))
            return 0
        config = configured(overrides, texts)
        given = {word.lstrip("+~").partition("=")[0].partition(".")[0] for word in overrides} | texts.keys()
        recipe = None if config["from_png"] is None else Recipe.read(config["from_png"])
        if recipe is not None:
            config |= {name: value for name, value in recipe.options().items() if name not in given}
            recipe.require_sources(config)
        if "cfg" in flags:
            shown = {"prompt": texts.get("prompt"), "xy": {option[-1]: texts.get(option) for option in AXES}}
            print(to_yaml(config | shown), end="")
            return 0
        columns, rows = (axis(option, texts, overrides) for option in AXES)
        items, sheets = planned(config, prompts_of(texts, recipe), columns, rows)
        if not items[0].model[0]:
            raise InputError("checkpoint", "missing value", "set checkpoint=PATH, a run or a checkpoint")
        if recipe is not None and "batch_size" not in given:
            items = [replace(item, batch=recipe.batch()) for item in items]
        axes = [name for its in (*columns.values(), *rows.values()) for name in its]
        sample(items, sheets, config, recipe, same="weights" not in given and not {*MODEL} & {*axes})
    return 0


if __name__ == "__main__":
    sys.exit(main())

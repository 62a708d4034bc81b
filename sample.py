"""Pictures from a checkpoint.

    python sample.py checkpoint=runs/quickstart prompt="red apple on a blue background" num_images=4 seed=7
    python sample.py checkpoint=runs/quickstart prompt="green pear" init_image=sketch.png strength=0.7

Each picture is a PNG that carries its recipe; several also make a contact sheet. All options: --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import CONFIG_DIR, compose, plain, split_arguments, to_yaml
from ldm.errors import InputError, reported

VERBATIM = ("checkpoint", "prompt", "prompt_file", "negative_prompt", "init_image", "output")  # not for Hydra
LOADING = ("checkpoint", "weights", "prompt", "prompt_file", "output")  # the other options make the pictures


def split(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Texts and paths exactly as they were typed, by option, and everything else."""
    texts: dict[str, list[str]] = {}
    rest = []
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in VERBATIM:
            texts.setdefault(name, []).append(value)
        else:
            rest.append(word)
    for name, values in texts.items():
        if name != "prompt" and len(values) > 1:
            raise InputError(name, f"given {len(values)} times", "only prompt may repeat")
    return texts, rest


def prompts_of(texts: dict[str, list[str]]) -> list[str]:
    """The prompts of the command line, then those of the prompt file."""
    prompts = list(texts.get("prompt", []))
    if "prompt_file" in texts:
        [path] = texts["prompt_file"]
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"prompt_file={path}", reason) from None
        found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"prompt_file={path}", "no prompt in it", "write one a line")
        prompts += found
    if not prompts:
        raise InputError("prompt", "there is none", 'give one: prompt="a red apple"')
    return prompts


def sample(config: dict[str, Any], prompts: list[str]) -> list[Path]:
    """Draw, save and say where; returns the pictures' paths, then that of the sheet if there is one."""
    import ldm
    from ldm.pictures import contact_sheet, save_next

    pipe = ldm.load(config["checkpoint"], weights=config["weights"])
    options = {name: value for name, value in config.items() if name not in LOADING}
    folder = Path(config["output"] or Path("samples") / pipe.name.rpartition(" ")[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = pipe(prompts, progress=True, **options)
        paths: list[Path] = []
        for picture in pictures:
            start = int(paths[-1].stem) + 1 if paths else 0
            paths.append(save_next(folder, picture, start=start))
        if len(pictures) > 1:
            captions = [prompts[i // config["num_images"]] for i in range(len(pictures))]
            sheet = contact_sheet(pictures, captions)
            paths.append(save_next(folder, sheet, prefix="sheet-", start=int(paths[0].stem)))
    except OSError as error:
        raise InputError(f"output={folder}", f"cannot write there ({error.strerror or error})") from None
    print("\n".join(str(path) for path in paths))
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, or raises SystemExit(2) after one line on what was wrong."""
    with reported():
        texts, rest = split(sys.argv[1:] if argv is None else argv)
        flags, overrides = split_arguments(rest)
        if "help" in flags:
            print(__doc__ + "\n" + (CONFIG_DIR / "sample.yaml").read_text(encoding="utf-8"))
            return 0
        config = plain(compose("sample", overrides)) | {
            name: values[0] for name, values in texts.items() if name != "prompt"
        }
        if not any(word.startswith("sampler.") for word in overrides):  # its name says more than its section
            config["sampler"] = next((w[8:] for w in overrides[::-1] if w.startswith("sampler=")), None)
        if "cfg" in flags:
            print(to_yaml(config | {"prompt": texts.get("prompt")}), end="")
            return 0
        if not config["checkpoint"]:
            raise InputError("checkpoint", "missing value", "set checkpoint=PATH, a run or a checkpoint")
        sample(config, prompts_of(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

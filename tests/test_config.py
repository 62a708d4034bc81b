"""Composing, checking and building of configs, with a table of bad input and one of attempts to run code."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import ldm.config
from ldm import build as builder
from ldm.config import (
    build,
    compose,
    from_yaml,
    plain,
    split_arguments,
    to_yaml,
)
from ldm.errors import InputError

FILES = {
    "train.yaml": """
        defaults: [_self_, module: adamw, trainer: cpu, data/source: tar, optional experiment: null]
        seed: 1
        run_name: quick
        resume: null
        optimizer: {lr: 1.0e-4, betas: [0.9, 0.99], fused: false}
        copied: ${optimizer.lr}
        logger: {wandb: {project: x, api_key: null}, num_tokens: 3, caption_key: txt, pad_token: 0}
    """,
    "broken.yaml": "a: [1,",
    "mandatory.yaml": "a: {b: '???'}\nc: ${a.b}",
    "required.yaml": "a: {b: null}\nrequired: [a.b]",
    "strange.yaml": "defaults: [module: nothing]",
    "interpolated.yaml": "a: {b: '${nowhere.c}'}",
    "module/adamw.yaml": "weighting: null\nlr: ${optimizer.lr}",
    "module/sgd.yaml": "weighting: null\nlr: 0.5",
    "trainer/cpu.yaml": "max_steps: 100\nprecision: bf16-mixed\ndetect: true\nclip: 1.0",
    "data/source/tar.yaml": "shards: a.tar",
    "data/source/folder.yaml": "folder: b",
    "extra/one.yaml": "x: 1",
    "experiment/quickstart.yaml": "# @package _global_\nseed: 7\ntrainer: {max_steps: 5}",
    "experiment/laion_subset.yaml": "# @package _global_\nseed: 8",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        file.write_text("\n".join(line.removeprefix(" " * 8) for line in lines))
    return tmp_path


def test_overrides_groups_and_values(folder):
    config = compose("train", ["experiment=quickstart", "optimizer.lr=1e-3", "data/source=folder"], folder)
    assert isinstance(config, DictConfig)
    assert (config.seed, config.trainer.max_steps, config.copied, config.module.lr) == (7, 5, 1e-3, 1e-3)
    assert plain(config)["data"] == {"source": {"folder": "b"}}
    again = compose("train", ["trainer.max_steps=9"], folder)  # nothing is left of the first call
    assert (again.seed, again.trainer.max_steps) == (1, 9)


def test_allowed_overrides(folder):
    lines = ["+new.key=3", "++other=4", "~copied", "resume=/a/b", "trainer.clip=2", "trainer.max_steps=null"]
    config = compose(
        "train", [*lines, "logger.num_tokens=4", "logger.caption_key=text", "run_name=2024"], folder
    )
    assert (config.new.key, config.other, config.resume, config.trainer.clip) == (3, 4, "/a/b", 2)
    assert "copied" not in config
    assert config.trainer.max_steps is None


@pytest.mark.parametrize(
    "text", ["/d/{00000..00031}.tar", "/a/b=c", "an (apple", 'say "no"(', "{x}.tar"[1:], "a: b}"]
)
def test_a_text_outside_hydras_grammar_is_taken_as_it_stands(folder, text):
    assert compose("train", [f"resume={text}"], folder).resume == text


LINES = [
    ("modle.lr=1", "modle: unknown key; did you mean module?"),
    ("modle=sgd", "modle: unknown key; did you mean module?"),
    ("exprement=quickstart", "exprement: unknown key; did you mean experiment?"),
    ("trainer.max_step=3", "trainer.max_step: unknown key; did you mean trainer.max_steps?"),
    ("trainer.max_steps.x=3", "trainer.max_steps.x: unknown key; did you mean trainer.max_steps?"),
    ("max_steps=3", "max_steps: unknown key; did you mean trainer.max_steps?"),
    ("data.source.shards.0=3", "data.source.shards.0: unknown key; did you mean data.source.shards?"),
    ("optimizer.betas.7=3", "optimizer.betas.7: unknown key; did you mean optimizer.betas?"),
    ("data.source.zzz=3", "data.source.zzz: unknown key; data.source has: shards"),
    ("learning_rate=1", "learning_rate: unknown key; did you mean optimizer.lr?"),
    ("train_batch_size=1", "train_batch_size: unknown key; did you mean data.batch_size?"),
    ("trainer.gradient_accumulation_steps=1", "trainer.gradient_accumulation_steps: unknown key; "
     "did you mean trainer.accumulate_grad_batches?"),
    ("max_train_steps=1", "max_train_steps: unknown key; did you mean trainer.max_steps?"),
    ("mixed_precision=no", "mixed_precision: unknown key; did you mean trainer.precision?"),
    ("snr_gamma=5", "snr_gamma: unknown key; did you mean module.weighting.gamma?"),
    ("resume_from_checkpoint=latest", "resume_from_checkpoint: unknown key; did you mean resume?"),
    ("experiment=quikstart", "experiment=quikstart: no such option; did you mean quickstart? "
     "(have: laion_subset, quickstart)"),
    ("module=zzz", "module=zzz: no such option; (have: adamw, sgd)"),
    ("data/source=tars", "data/source=tars: no such option; did you mean tar? (have: folder, tar)"),
    ("trainer={max_steps: 3}", "trainer={'max_steps': 3}: no such option; (have: cpu)"),
    ("experiment=", "experiment=: no such option; (have: laion_subset, quickstart)"),
    ("extra=one", "extra: train.yaml has no such group; add it with +extra=one"),
    ("+module=sgd", "module: train.yaml has a choice for this group; write module=... without +"),
    ("trainer.max_steps=abc", "trainer.max_steps: expected int, got 'abc'"),
    ("trainer.max_steps=true", "trainer.max_steps: expected int, got True"),
    ("trainer.max_steps=1e5", "trainer.max_steps: expected int, got 100000.0; write 100000"),
    ("trainer.max_steps=${optimizer.lr}", "trainer.max_steps: expected int, got 0.0001"),
    ("trainer.detect=1", "trainer.detect: expected bool, got 1"),
    ("trainer.clip=high", "trainer.clip: expected float, got 'high'"),
    ("trainer.clip=[1]", "trainer.clip: expected float, got [1]"),
    ("optimizer={lr: high}", "optimizer.lr: expected float, got 'high'"),
    ("optimizer=adam", "optimizer: expected a mapping, got 'adam'; set optimizer.NAME=..."),
    ("+seed=3", "seed: already in the config; write seed=... without +"),
    ("~nothing", "nothing: unknown key; config has: seed, run_name, resume, optimizer, copied, logger, "
     "module, trainer, data"),
    ("seed=1,2", "seed: '1,2' is a sweep, and one command is one run; write a list as 'seed=[1,2]', "
     "a text as 'seed=\"1,2\"'"),
    ("quickstart", "quickstart: not an override; write KEY=VALUE"),
    ("=3", "=3: no key before '='; write KEY=VALUE"),
    ("+++seed=x(", "+++seed: cannot read the value 'x('; quote it, for the shell too: '+++seed=\"x(\"'"),
    ("resume='a", "resume: cannot read the value \"'a\"; quote it, for the shell too: 'resume=\"'a\"'"),
    ("optimizer.betas=[1,", "optimizer.betas: cannot read the value '[1,'; quote it, for the shell too: "
     "'optimizer.betas=\"[1,\"'"),
    ("run_name=${nowhere}", "run_name: Interpolation key 'nowhere' not found; "
     "correct the ${...} there, or set the key it names"),
    ("logger.wandb.api_key=abc", "logger.wandb.api_key: do not put secrets in the config; set WANDB_API_KEY"),
    ("+logger.box.secret=12", "logger.box.secret: do not put secrets in the config; set BOX_SECRET"),
    ("+data.hf_token=abc", "data.hf_token: do not put secrets in the config; set HF_TOKEN"),
    ("++logger={wandb: {password: abc}}", "logger.wandb.password: do not put secrets in the config; "
     "set WANDB_PASSWORD"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line"), LINES, ids=[override for override, _ in LINES])
def test_one_line_for_every_bad_override(folder, override, line):
    with pytest.raises(InputError) as caught:
        compose("train", [override], folder)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mandatory", "a.b: missing value; set a.b=..."),
        ("required", "a.b: missing value; set a.b=..."),
        ("interpolated", "a.b: Interpolation key 'nowhere.c' not found; correct the ${...} there, or"),
        (
            "strange",
            "strange.yaml: names module/nothing, which does not exist; Available options in 'module': a",
        ),
        ("broken", "broken.yaml: while parsing a flow node"),
        ("nosuch", "{folder}/nosuch.yaml: no such config; run from a checkout of the repository"),
    ],
)
def test_one_line_for_every_bad_config(folder, name, line):
    with pytest.raises(InputError) as caught:
        compose(name, [], folder)
    text = str(caught.value)
    assert text.startswith(line.replace("{folder}", str(folder)))
    assert "\n" not in text


def test_missing_value_is_filled_by_an_override(folder):
    assert plain(compose("mandatory", ["a.b=3"], folder)) == {"a": {"b": 3}, "c": 3}
    assert compose("required", ["a.b=3"], folder).a.b == 3


def test_default_folder_is_that_of_the_repository():
    assert Path(__file__).parents[1] / "configs" == ldm.config.CONFIG_DIR


# ---- text ----------------------------------------------------------------------------------------------


def test_yaml_round_trip_keeps_values_and_order(folder):
    config = compose("train", ["optimizer.lr=1e-05"], folder)
    text = to_yaml(config)
    assert "${" not in text
    again = plain(from_yaml(text))
    assert again == plain(config)
    assert list(again) == list(plain(config))
    assert type(again["optimizer"]["betas"]) is list
    assert type(again["optimizer"]) is dict
    assert again == plain(config)


def test_secrets_never_reach_a_file():
    with pytest.raises(InputError, match=r"^a.api_key: do not put secrets in the config; set A_API_KEY$"):
        to_yaml({"a": {"api_key": "abc"}})
    with pytest.raises(InputError, match=r"^a.token: do not"):
        to_yaml({"a": [{"token": "abc"}]})
    for name in (
        "num_tokens",
        "caption_key",
        "max_tokens",
        "pad_token",
        "placeholder_token",
        "key",
        "tokens",
    ):
        assert name in to_yaml({name: "abc"})
    assert to_yaml({"api_key": None, "secret": ""})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: {b: ['${oc.env:HOME}']}",
            "x.yaml: a.b[0]: a stored config holds no ${...}; write the value itself",
        ),
        ("[1, 2]", "x.yaml: not a mapping of keys to values"),
        ("a: [1,", "x.yaml: not a YAML config: while parsing a flow node"),
        ("a: !!python/object/apply:os.system [echo]", "x.yaml: not a YAML config: could not determine"),
    ],
)
def test_stored_text_that_is_refused(text, line):
    with pytest.raises(InputError) as caught:
        from_yaml(text, "x.yaml")
    assert str(caught.value).startswith(line)


def test_arguments_are_flags_or_overrides():
    assert split_arguments(["a=1", "--cfg", "job", "~b"]) == ({"cfg": "job"}, ["a=1", "~b"])
    assert split_arguments(["--cfg=job", "-h", "prompt=--x"]) == ({"cfg": "job", "help": ""}, ["prompt=--x"])
    assert split_arguments([]) == ({}, [])
    for argv, line in [
        (["--multirun"], "--multirun: unknown flag; options are KEY=VALUE; flags are --help and --cfg job"),
        (["-m", "a=1"], "-m: unknown flag; options are KEY=VALUE; flags are --help and --cfg job"),
        (["--cfg", "all"], "--cfg: expected job, got 'all'; write --cfg job"),
        (["--cfg"], "--cfg: expected job, got ''; write --cfg job"),
    ]:
        with pytest.raises(InputError) as caught:
            split_arguments(argv)
        assert str(caught.value) == line


# ---- build ---------------------------------------------------------------------------------------------


def test_build_nested_lists_and_partials():
    config = OmegaConf.create(
        {
            "lr": 0.5,
            "thing": {
                "_target_": "ldm.types.Conditioning",
                "context": {"_target_": "ldm.types.GridRow", "model_time": 1, "alpha": "${lr}", "sigma": 3},
                "pooled": [
                    {"_target_": "ldm.types.GridRow", "model_time": 0, "alpha": 0, "sigma": 0},
                    {"a": [1]},
                ],
                "label": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "${lr}"},
            },
        }
    )
    thing = build(config.thing, concat="given")
    assert (thing.context, thing.concat) == ((1, 0.5, 3), "given")
    assert thing.pooled == [(0, 0, 0), {"a": [1]}]
    assert type(thing.pooled) is list
    assert type(thing.pooled[1]) is dict
    assert isinstance(thing.label, functools.partial)
    optimizer = thing.label([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_arguments_in_code_may_have_any_name():
    partial = build({"_target_": "ldm.diffusion.samplers.ddim", "_partial_": True}, noise=1, callback=2)
    assert partial.keywords == {"noise": 1, "callback": 2}
    with pytest.raises(InputError, match="^config: ldm.types.GridRow takes no such argument"):
        build({"_target_": "ldm.types.GridRow"}, config=1)


def test_an_argument_in_code_stands_over_the_config_and_its_node_is_not_built():
    row = {"_target_": "ldm.types.GridRow", "model_time": {"_target_": "os.system"}, "alpha": 0, "sigma": 0}
    assert build(row, model_time=5).model_time == 5


def test_a_mapping_of_objects_is_built_to_a_dict():
    rows = {"a": {"_target_": "ldm.types.GridRow", "model_time": 1, "alpha": 2, "sigma": 3}, "b": None}
    assert build(rows) == {"a": (1, 2, 3), "b": None}
    with pytest.raises(InputError, match="^config: has no _target_, so it cannot be built$"):
        build({"a": 1}, x=2)


BYPASSES = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "logging.os.system",
    "ldm.config.os.system",
    "ldm.random.math.sqrt",
    "ldm.random.zlib",
    "ldm.types.torch.load",
    "ldm.types.torch.optim.AdamW",
    "ldm.build.importlib.import_module",
    "ldm.build.built",
    "ldm.config.build",
    "ldm.config.compose",
    "ldm.checkpoints.native.prune",
    "ldm.checkpoints.native.shutil.rmtree",
    "ldm.types.replace",
    "ldm.types.Any",
    "ldm.types.Conditioning.where",
    "ldm.types.GridRow.__new__",
    "ldm.types.__builtins__",
    "ldm.random.MASK",
    "ldm.random.philox",
    "torch.load",
    "torch.optim.lr_scheduler.warnings",
    "torch.optim.swa_utils.update_bn",
    "torch.optim.adamw.torch.load",
    "torch.optimizer.X",
    "torch.hub.load",
    "hydra.utils.instantiate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "lightning.pytorch.utilities.model_helpers.os.system",
    "lightning.pytorch.Trainer.fit",
    "lightning.pytorch.Trainer_",
    "lightning.pytorch.loggers.csv_logs.os",
    "ldmx.thing",
    "ldm",
    "ldm..x",
    "ldm.",
    ".ldm.types.GridRow",
    "",
    "os;system",
    7,
    None,
    ["os", "system"],
]


@pytest.mark.parametrize("target", BYPASSES, ids=str)
def test_nothing_outside_the_allowed_list_is_called(target):
    with pytest.raises(InputError) as caught:
        builder.resolved(target, "module.unet")
    line = str(caught.value)
    assert line.startswith(f"module.unet._target_={target!r}: ")
    assert "allowed list (ldm.*, torch.optim.*, lightning" in line or " has no " in line


def test_a_strangers_object_placed_in_our_module_is_refused(monkeypatch):
    import ldm.random as module

    def innocent():
        return "called"

    innocent.__qualname__ = "innocent"
    monkeypatch.setattr(module, "innocent", innocent, raising=False)  # defined here, not in ldm
    monkeypatch.setattr(module, "bound", functools.partial(print), raising=False)
    for name in ("innocent", "bound"):
        with pytest.raises(InputError, match="is not in the allowed list"):
            build({"_target_": f"ldm.random.{name}"})


def test_functions_are_allowed_where_they_are_pure():
    from ldm.diffusion.samplers import ddim

    sampler = build({"_target_": "ldm.diffusion.samplers.ddim", "_partial_": True, "eta": 0.5})
    assert (sampler.func, sampler.keywords) == (ddim, {"eta": 0.5})


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ({"_target_": "ldm.types.GridRoww"},
         "section.x._target_='ldm.types.GridRoww': ldm.types has no GridRoww; did you mean GridRow?"),
        ({"_target_": "ldm.nosuch.X"}, "section.x._target_='ldm.nosuch.X': there is no module ldm.nosuch"),
        ({"_target_": "ldm.types.GridRow", "model_tim": 1},
         "section.x.model_tim: ldm.types.GridRow takes no such argument; did you mean model_time?"),
        ({"_target_": "ldm.types.GridRow", "_partial_": True, "zzz": 1},
         "section.x.zzz: ldm.types.GridRow takes no such argument; it takes: model_time, alpha, sigma"),
        ({"_target_": "ldm.types.GridRow", "model_time": 1},
         "section.x: GridRow.__new__() missing 2 required positional arguments: 'alpha' and 'sigma'; "
         "raised by ldm.types.GridRow"),
        ({"_target_": "torch.optim.SGD", "params": [], "lr": 1.0},
         "section.x: optimizer got an empty parameter list; raised by torch.optim.sgd.SGD"),
    ],
)  # fmt: skip
def test_what_a_constructor_refuses_names_its_section(node, line):
    config = OmegaConf.create({"section": {"x": node}})
    with pytest.raises(InputError) as caught:
        build(config.section)
    assert str(caught.value) == line


def test_a_package_that_is_not_installed_is_named():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'lightning': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from ldm.build import resolved; resolved('lightning.pytorch.Trainer', 'trainer')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "trainer._target_='lightning.pytorch.Trainer': needs lightning, which is not installed" in done.stderr
    )


def test_lightning_objects_are_allowed():
    from lightning.pytorch.loggers import CSVLogger

    assert builder.resolved("lightning.pytorch.loggers.CSVLogger") is CSVLogger
    trainer = build(
        {"_target_": "lightning.pytorch.Trainer", "max_steps": 1}, logger=False, accelerator="cpu"
    )
    assert trainer.max_steps == 1
    line = "did you mean max_steps"
    with pytest.raises(InputError, match=line):
        build({"_target_": "lightning.pytorch.Trainer", "max_step": 1})

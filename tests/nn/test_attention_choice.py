"""Kernels of attention: what is chosen, what is kept, and that compiled code holds the choice."""

import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

from ldm.nn import attention as attention_module
from ldm.nn import attention_choice
from ldm.nn.attention import Attention, Transformer2D
from ldm.nn.attention_choice import Chooser, Shape, attention, fastest, seconds_of, use_attention

SHAPE = Shape(2, 3, 16, 5, 8, 24, 24, torch.bfloat16, masked=False, grad=True)
TIMES = {"flash": 2e-3, "cudnn": 1e-3, "efficient": None, "math": 4e-3}


class Timer:
    """Says what `times` holds and remembers what it was asked."""

    def __init__(self, times):
        self.times, self.asked = times, []

    def __call__(self, shape, name):
        self.asked.append((shape, name))
        return self.times[name]


@pytest.fixture
def chooses(monkeypatch):
    """(chooser) -> `attention` asks it on a CPU too; the choice of tests alone."""

    def use(chooser):
        torch.compiler.assume_constant_result(attention_choice.chosen)
        monkeypatch.setattr(attention_choice, "_name", "auto")
        monkeypatch.setattr(attention_choice, "_chooser", chooser)
        monkeypatch.setattr(attention_choice, "DEVICES", ("cpu",))

    yield use
    torch._dynamo.reset()


def test_the_fastest_is_chosen_of_those_that_can():
    assert fastest({"flash": 2.0, "cudnn": 1.0, "math": math.inf}) == "cudnn"
    assert fastest({"flash": math.inf}) == fastest({}) == "default"


def test_a_shape_is_tried_once_and_kept_for_the_next_run(tmp_path):
    file, timer = tmp_path / "ldm" / "attention.json", Timer(TIMES)
    chooser = Chooser(list(TIMES), timer, file, "this GPU")
    assert [chooser(SHAPE) for _ in range(3)] == ["cudnn"] * 3
    assert timer.asked == [(SHAPE, name) for name in TIMES]
    assert json.loads(file.read_text()) == {
        "this GPU": {
            "2x3x16x5x8 rows 24 24 bfloat16 with gradient": {
                "chosen": "cudnn",
                "ms": {"flash": 2.0, "cudnn": 1.0, "math": 4.0},
            }
        }
    }
    again = Timer(TIMES)
    assert Chooser(list(TIMES), again, file, "this GPU")(SHAPE) == "cudnn"
    assert again.asked == []
    assert Chooser(list(TIMES), again, file, "another GPU")(SHAPE) == "cudnn"
    assert again.asked != []
    assert list(json.loads(file.read_text())) == ["this GPU", "another GPU"]
    assert [path.name for path in file.parent.iterdir()] == ["attention.json"]


@pytest.mark.parametrize("field", ["queries", "key_row", "dtype", "masked", "grad"])
def test_every_field_of_a_shape_counts(field):
    other = {"queries": 17, "key_row": 72, "dtype": torch.float32, "masked": True, "grad": False}[field]
    timer = Timer(TIMES)
    chooser = Chooser(list(TIMES), timer)
    chooser(SHAPE)
    chooser(SHAPE._replace(**{field: other}))
    assert len(timer.asked) == 2 * len(TIMES)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"this GPU": 3}', '{"this GPU": {"KEY": 3}}', "\0\xff"])
def test_a_broken_file_is_ignored_and_replaced(text, tmp_path):
    file, timer = tmp_path / "attention.json", Timer(TIMES)
    file.write_text(text.replace("KEY", str(SHAPE)), encoding="latin-1")
    chooser = Chooser(list(TIMES), timer, file, "this GPU")
    assert chooser(SHAPE) == "cudnn"
    assert timer.asked
    assert json.loads(file.read_text())["this GPU"][str(SHAPE)]["chosen"] == "cudnn"


def test_a_kernel_of_the_file_that_is_not_known_is_not_taken(tmp_path):
    file = tmp_path / "attention.json"
    file.write_text(json.dumps({"": {str(SHAPE): {"chosen": "newest"}}}))
    assert Chooser(list(TIMES), Timer(TIMES), file)(SHAPE) == "cudnn"


def test_choices_of_another_rank_stay(tmp_path):
    file = tmp_path / "attention.json"
    ranks = [Chooser(list(TIMES), Timer(TIMES), file) for _ in range(2)]
    shapes = [SHAPE, SHAPE._replace(queries=64)]
    for rank, shape in zip(ranks, shapes, strict=True):
        rank(shape)
    assert set(json.loads(file.read_text())[""]) == set(map(str, shapes))


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(tmp_path):
    (tmp_path / "ldm").write_text("a file")
    assert Chooser(list(TIMES), Timer(TIMES), tmp_path / "ldm" / "attention.json")(SHAPE) == "cudnn"


def test_without_memory_to_try_all_nothing_is_kept(tmp_path):
    file = tmp_path / "attention.json"
    assert Chooser(list(TIMES), Timer(TIMES | {"cudnn": math.inf}), file)(SHAPE) == "flash"
    assert not file.exists()
    assert Chooser(list(TIMES), Timer(dict.fromkeys(TIMES, math.inf)), file)(SHAPE) == "default"


def test_plain_products_are_tried_where_scores_are_few_or_where_they_are_named():
    many, timer = SHAPE._replace(queries=4096, keys=4096), Timer(TIMES | {"math": 0.0})
    assert Chooser(list(TIMES), timer)(many) == "cudnn"
    assert Chooser(list(TIMES), timer)(SHAPE) == "math"
    assert Chooser(["math"], timer)(many) == "math"


def test_a_named_kernel_that_cannot_leaves_the_choice_to_torch():
    assert Chooser(["efficient"], Timer(TIMES))(SHAPE) == "default"


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    chooser, timer = (made := Chooser(list(TIMES), Timer(TIMES))), made.measure
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chooser(SHAPE) == "default"
    assert timer.asked == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chooser(SHAPE) == "cudnn"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chooser(SHAPE) == "cudnn"


def test_seconds_are_the_median_of_turns():
    ticks = itertools.chain([0.0, 5.0], [10.0, 10.5], [20.0, 21.0])
    shape = SHAPE._replace(dtype=torch.float32)
    assert seconds_of(shape, "math", "cpu", lambda: next(ticks)) == 1.0 / attention_choice.EACH
    assert list(ticks) == []


def test_a_kernel_that_is_not_there_has_no_seconds():
    assert seconds_of(SHAPE, "cudnn", "cpu") is None


@pytest.mark.parametrize("grad", [False, True])
def test_a_trial_computes_what_the_shape_says(grad):
    shape = Shape(2, 3, 6, 5, 4, 36, 24, torch.float32, masked=True, grad=grad)
    found = attention_choice.attempt(shape, "math", "cpu")()
    if not grad:
        assert found.shape == (2, 3, 6, 4)
        return
    assert [g.shape for g in found] == [(2, 3, 6, 4), (2, 3, 5, 4), (2, 3, 5, 4)]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="attention=fast is none of default, auto, flash"):
        use_attention("fast")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_real_trials_eager_and_while_dynamo_traces(compiled, chooses):
    """On a CPU torch has two of the kernels, so all but the other clock of a GPU is as there."""
    timed = []

    def measure(shape, name):
        timed.append((shape, name, found := seconds_of(shape, name, "cpu")))
        return found

    chooser = Chooser(list(attention_choice.KERNELS), measure)
    torch.manual_seed(0)
    layer = Attention(24, 3, context_width=7)
    x = torch.randn(2, 6, 24, requires_grad=True)
    context, mask = torch.randn(2, 5, 7), torch.tensor([[True, False, True, True, True]] * 2)
    expected = layer(x, context, mask)
    grads = torch.autograd.grad(expected.sum(), [x, *layer.parameters()])
    chooses(chooser)
    state = torch.random.get_rng_state()
    if compiled:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        out = layer(x, context, mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), [x, *layer.parameters()]), grads)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, context, mask), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    shapes = list(dict.fromkeys(shape for shape, *_ in timed))
    assert shapes == [Shape(2, 3, 6, 5, 8, 24, 24, torch.float32, True, grad) for grad in (True, False)]
    assert len(timed) == len(set(timed)) == 2 * len(attention_choice.KERNELS)
    assert {name for _, name, seconds in timed if seconds} >= {"math"}
    assert set(chooser.known.values()) <= {"flash", "math"}


@pytest.mark.parametrize("name", ["flash", "math"])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_the_chosen_kernel_runs_eager_and_compiled(name, chooses):
    chooses(Chooser([name], seconds_of_cpu))
    q, k = torch.randn(2, 3, 6, 8, requires_grad=True), torch.randn(2, 3, 6, 8)
    seen = []

    def keep(graph, inputs):
        seen.append(graph.code)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend=keep)
    for function in (attention, compiled):
        out = function(q, k, k)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k))
        assert ("Flash" in type(out.grad_fn).__name__) == (name == "flash")
    assert len(seen) == 1
    assert torch.backends.cuda.flash_sdp_enabled(), "flags are as before"
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_transformer_with_all_options_is_the_transformer(recompute, chooses, monkeypatch):
    torch.manual_seed(0)
    net = Transformer2D(16, 1, 2, context_dim=6, norm_groups=4)
    torch.nn.init.normal_(net.proj_out.weight)
    x = torch.randn(2, 16, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    context = torch.randn(2, 4, 6)

    def results():
        out = net(x, context, None, recompute)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *net.parameters()])]

    expected = results()
    monkeypatch.setattr(attention_module, "_fused_qkv", True)
    chooses(chooser := Chooser(["math"], seconds_of_cpu))
    net.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for found in (results(), results()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = [(15, 15, 48, 48), (15, 4, 16, 32)]
    assert list(chooser.known) == [
        str(Shape(2, 2, queries, keys, 8, *row, torch.float32, masked=False, grad=True))
        for queries, keys, *row in rows
    ]


def seconds_of_cpu(shape, name):
    return seconds_of(shape, name, "cpu")


def test_without_a_gpu_nothing_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_attention("auto")
    try:
        q = torch.randn(2, 3, 6, 8)
        assert torch.equal(attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
        assert attention_choice._chooser is None
        monkeypatch.setattr(attention_choice, "seconds_of", Timer(TIMES))
        assert attention_choice.chosen(*SHAPE) == "cudnn"
        assert attention_choice._chooser.file == tmp_path / "ldm" / "attention.json"
        use_attention("efficient")
        assert attention_choice.chosen(*SHAPE) == "default", "it cannot"
        assert attention_choice._chooser.file is None
    finally:
        use_attention("default")


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_every_choice_computes_the_same(masked, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    q, k, v = (torch.randn(2, 64, 3, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    q.requires_grad_()
    mask = torch.arange(64, device="cuda")[None, None, None] < 50 if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    try:
        for name in attention_choice.NAMES:
            use_attention(name)
            torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=2e-2, atol=2e-2)
            if name == "auto":
                (choice,) = attention_choice._chooser.known.values()
                assert choice in attention_choice.KERNELS
                assert len(list(tmp_path.rglob("attention.json"))) == 1
    finally:
        use_attention("default")

"""The composition score gives references 100 % and shuffled ones chance, and judges its halves apart."""

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.composition import background_of, evaluate_quickstart, objects_of, percent, score_pictures


def references(tiny_set, objects=range(12), backgrounds=None):
    backgrounds = [j for _, j in tiny_set.held_out] if backgrounds is None else backgrounds
    return [Image.fromarray(tiny_set.picture(i, j)) for i, j in zip(objects, backgrounds, strict=True)]


def test_references_score_everything(tiny_set):
    score = score_pictures(references(tiny_set), tiny_set)
    assert (score.background, score.object) == (1.0, 1.0)
    assert (score.chance_background, score.chance_object) == (1 / 4, 1 / 12)
    assert score.captions[1] == "object 1 on a green background"
    assert score.line() == "held-out: background 100 %, object 100 % (12 pairs; chance 25 %, 8.3 %)"
    assert score.sheet().width > 3 * 144


def test_wrong_objects_on_right_backgrounds_and_the_reverse(tiny_set):
    score = score_pictures(references(tiny_set, objects=[(i + 4) % 12 for i in range(12)]), tiny_set)
    assert (score.background, score.object) == (1.0, 0.0)
    score = score_pictures(
        references(tiny_set, backgrounds=[(j + 1) % 4 for _, j in tiny_set.held_out]), tiny_set
    )
    assert (score.background, score.object) == (0.0, 1.0)  # each shape is far from all others


def test_shuffled_pictures_score_about_chance(tiny_set):
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(30):
        order = rng.permutation(12)
        scores.append(score_pictures([references(tiny_set)[k] for k in order], tiny_set))
    assert np.mean([s.background for s in scores]) == pytest.approx(1 / 4, abs=0.08)
    assert np.mean([s.object for s in scores]) < 0.25


def test_half_right(tiny_set):
    pictures = references(tiny_set)[:6] + references(tiny_set, objects=[0] * 12, backgrounds=[0] * 12)[6:]
    score = score_pictures(pictures, tiny_set)
    assert score.object_right == [True] * 6 + [False] * 6
    assert score.background_right == [True] * 6 + [j == 0 for _, j in tiny_set.held_out[6:]]


def test_background_is_the_median_of_the_border():
    colours = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0)])
    picture = np.zeros((9, 9, 3), np.uint8)
    picture[2:7, 2:7] = 255  # most of the inside does not count
    picture[0, :4] = 255  # nor a minority of the border
    assert background_of(picture, colours) == 0
    picture[:, [0, -1]] = picture[[0, -1], :] = (240, 20, 10)
    assert background_of(picture, colours) == 2


def test_object_is_the_least_squared_error():
    references = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 100, 255)])
    pictures = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (49, 51, 177, 178)])
    assert objects_of(pictures, references).tolist() == [0, 1, 1, 2]
    rng = np.random.default_rng(0)
    references, pictures = (rng.integers(0, 256, (k, 8, 8, 3), np.uint8) for k in (30, 50))
    errors = ((references[None].astype(int) - pictures[:, None]) ** 2).sum((2, 3, 4))
    assert objects_of(pictures, references).tolist() == errors.argmin(1).tolist()


def test_quickstart_asks_for_each_held_out_pair_once(tiny_set):
    calls = []

    def pipe(prompts, **options):
        calls.append((list(prompts), options))
        return references(tiny_set)

    score = evaluate_quickstart(pipe, tiny_set, seed=3, batch_size=5)
    assert score.object == 1.0
    [(prompts, options)] = calls
    assert prompts == [tiny_set.caption(i, j) for i, j in tiny_set.held_out]
    assert options | {"progress": False} == {
        "seed": 3,
        "batch_size": 5,
        "height": 16,
        "width": 16,
        "progress": False,
    }


def test_count_must_match(tiny_set):
    with pytest.raises(ValueError, match="3 pictures but 12"):
        score_pictures(references(tiny_set)[:3], tiny_set)


@pytest.mark.parametrize(
    ("fraction", "text"), [(1, "100 %"), (0.979, "97.9 %"), (0.97999, "97.9 %"), (0.29, "29 %")]
)
def test_percent_never_rounds_up(fraction, text):
    assert percent(fraction) == text

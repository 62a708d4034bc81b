from ldm.checkpoints.differences import ABSENT, differences


def test_differences_ignore_what_may_change():
    old = {
        "seed": 1,
        "trainer": {"max_steps": 5, "devices": 1, "clip": 1.0},
        "backbone": {"head_dim": 8, "gradient_checkpointing": False},
        "logger": {"a": 1},
        "loggers": 1,
    }
    new = {
        "seed": 1,
        "trainer": {"max_steps": 9, "devices": 2, "clip": 2.0},
        "backbone": {"head_dim": 8, "gradient_checkpointing": True},
        "logger": None,
        "extra": {"x": 0},
    }
    assert differences(old, new) == [
        ("trainer.clip", 1.0, 2.0),
        ("loggers", 1, ABSENT),
        ("extra.x", ABSENT, 0),
    ]
    assert differences(old, old) == []

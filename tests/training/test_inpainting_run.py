"""A conditioner made of others, from train.py to a checkpoint to pictures."""

import ldm
import train

TEXT = "{_target_: ldm.conditioning.text.TextTransformer, width: 16, layers: 1, heads: 2, context_length: 12}"


def test_inpainting_trains_saves_and_samples(recipe, tmp_path):
    """Its captions are read by a text tower trained here; without a picture it paints all of one."""
    argv = [text for text in recipe(2, "inpainting") if not text.startswith("conditioner")]
    argv += ["conditioner=inpainting", "conditioner.context_dim=16", "backbone.in_channels=9"]
    argv += ["~conditioner.parts.text", f"+conditioner.parts.own={TEXT}", "trainer.max_steps=5"]
    assert train.command(argv) == 0
    pipe = ldm.load(tmp_path / "inpainting", device="cpu")
    prompt = "a (red:1.5) cat BREAK dog"
    [weighted] = pipe(prompt, num_steps=2, prompt_weights=True, negative_prompt="bad")
    [verbatim] = pipe(prompt, num_steps=2, negative_prompt="bad")
    assert weighted.size == verbatim.size == (16, 16)
    assert weighted.tobytes() != verbatim.tobytes()

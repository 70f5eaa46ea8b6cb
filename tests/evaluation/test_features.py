"""Feature extractors: what they tell apart, and that none of them asks the network for weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from imagen_kit.data.pocket import SceneBatch, parse, render
from imagen_kit.errors import KitError
from imagen_kit.evaluation import features

MODEL = "test_efficientnet"  # timm's own for tests, 0.4 M parameters


def scenes(*captions, size=64):
    batch = SceneBatch.of([parse(text) for text in captions])
    return render(batch, size, torch.Generator().manual_seed(0)) / 2 + 0.5


def test_the_judges_features_are_what_it_reads():
    same = "a small red star on a white background"
    other = "a large red star on a white background"
    a, b, c = features.parse("judge").load()(scenes(same, same, other))
    assert len(a) == 50
    assert (a[:-3] - b[:-3]).abs().max() < 0.2  # only the place differs
    # another size: two of the words, and the side itself
    assert (a - c).abs().sum() > 2
    blank = features.judge_features(torch.full((1, 3, 32, 32), 0.5))
    assert blank[0, 8:].abs().sum() == 0  # no object


def test_pixels_are_means_of_blocks():
    picture = torch.rand(2, 3, 16, 16)
    found = features.parse("pixels").load()(picture)
    assert torch.allclose(found[:, 0], picture[:, 0, :2, :2].mean((1, 2)).double())
    assert found.dtype == torch.float64


def test_timm_weights_come_from_the_file(tmp_path):
    import timm

    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    random = features.parse(f"timm:{MODEL}@random").load()
    assert random.name == f"timm:{MODEL}@random"
    assert torch.equal(random(pictures), features.parse(f"timm:{MODEL}@random").load()(pictures))

    torch.manual_seed(1)
    network = timm.create_model(MODEL, pretrained=False).eval()
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    loaded = features.parse(f"timm:{MODEL}@{tmp_path / 'mine.safetensors'}").load()
    assert loaded.name == f"timm:{MODEL}@mine.safetensors"
    found = loaded(pictures)
    # Independently: resized, normalised, the features before the classifier.
    data = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(data[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    side = data["input_size"][-1]
    large = torch.nn.functional.interpolate(pictures, (side, side), mode="bicubic", antialias=True)
    with torch.no_grad():
        inside = network.forward_features((large.clamp(0, 1) - mean) / std)
        expected = network.forward_head(inside, pre_logits=True)
    assert torch.allclose(found.float(), expected, atol=1e-5)  # the same float32 sums
    assert not torch.allclose(found, random(pictures))


def test_open_clip_with_random_weights():
    pictures = torch.rand(2, 3, 32, 32)
    found = features.parse("open_clip:ViT-S-32-alt@random").load()(pictures)
    assert found.shape[0] == 2
    assert torch.isfinite(found).all()
    assert (found[0] - found[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jugde", "did you mean 'judge'"),
        ("judge:large", "takes no model"),
        ("timm", "needs a model and weights"),
        (f"timm:{MODEL}", "nothing is downloaded"),
        (f"timm:{MODEL}@", "needs a model and weights"),
        (f"timm:{MODEL}@/none.safetensors", "there is no weight file /none.safetensors"),
        ("timm:resnet5o@random", "did you mean 'resnet50"),
        ("open_clip:ViT-B-33@random", "did you mean 'ViT-B-32'"),
    ],
)
def test_bad_extractors(text, says):
    with pytest.raises(KitError, match=says):
        features.parse(text)


def test_weights_of_another_model(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(KitError, match="is not a weight file of test_efficientnet"):
        features.parse(f"timm:{MODEL}@{tmp_path / 'a.safetensors'}").load()
    assert features.parse("none") is None

"""The choices: what is refused, how they are spoken, and that recipe and object know the same ones."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import get_args

import pytest

from imagen_kit.attention import _OTHERS
from imagen_kit.errors import KitError
from imagen_kit.performance import Performance
from imagen_kit.performance.options import ATTENTIONS, CHOICES
from imagen_kit.recipe.spec import PerformanceSpec


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "bf61"}, "unknown performance dtype 'bf61'; did you mean 'bf16'?"),
        ({"memory_format": "nhwc"}, "choose from auto, channels_last, contiguous"),
        ({"compile": "block"}, "did you mean 'blocks'?"),
        ({"compile": None}, "unknown performance compile 'None'"),
        ({"quantise": "int4"}, "did you mean 'int8'?"),
        ({"attention": "fa3"}, "unknown performance attention 'fa3'"),
        ({"graph": "yes"}, "performance graph must be true or false, not 'yes'"),
    ],
)
def test_wrong_values_are_told_in_one_line(options, says):
    with pytest.raises(KitError) as error:
        Performance(**options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_and_object_have_the_same_keys_defaults_and_values():
    assert PerformanceSpec().model_dump() == asdict(Performance())
    for name, choices in CHOICES.items():
        written = str(PerformanceSpec.model_fields[name].annotation)
        assert {choice for choice in choices if repr(choice) in written} == set(choices)
        literals = [arg for each in [PerformanceSpec.model_fields[name].annotation] for arg in get_args(each)]
        flat = {value for literal in literals for value in (get_args(literal) or (literal,))}
        assert flat - {None, type(None)} == set(choices)
    assert set(ATTENTIONS) == {"sdpa", *_OTHERS}
    assert [field.name for field in fields(Performance)] == list(PerformanceSpec.model_fields)


def test_words():
    assert Performance().words() == ""
    assert Performance(dtype="bf16", remember_text=False).words() == "dtype bf16, remember text false"
    assert Performance().brief() == "fp32 eager"
    told = Performance(
        dtype="bf16", memory_format="channels_last", compile="blocks", quantise="int8", graph=True
    )
    assert told.brief() == "bf16 channels-last int8 compiled-blocks graph"
    assert Performance(memory_format="contiguous", attention="flash").brief() == "fp32 flash eager"

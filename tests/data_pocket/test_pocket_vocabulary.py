"""The words and numbers that checks outside this project rely on."""

from __future__ import annotations

from imagen_kit.data.pocket.vocabulary import (
    BACKGROUNDS,
    CHINESE,
    COLORS,
    ENGLISH,
    RELATIONS,
    SHAPES,
    SIZES,
)


def test_words():
    assert SHAPES == ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
    assert RELATIONS == ("left of", "right of", "above", "below")
    assert SIZES == {"small": 0.30, "large": 0.44}


def test_colours():
    assert COLORS == {
        "red": (220, 30, 30),
        "green": (30, 160, 60),
        "blue": (40, 70, 220),
        "yellow": (245, 215, 40),
        "purple": (140, 50, 170),
        "orange": (245, 130, 30),
        "cyan": (40, 200, 210),
        "pink": (245, 140, 180),
    }
    assert BACKGROUNDS == {"white": (255, 255, 255), "black": (15, 15, 15), "gray": (128, 128, 128)}


def test_chinese_names_every_word_once():
    words = {*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *RELATIONS}
    assert set(CHINESE) == words
    assert len(ENGLISH) == len(words)  # no two words share a translation
    listed = (
        "圆形 方形 三角形 星形 圆环 十字 心形 菱形 红色 绿色 蓝色 黄色 紫色 橙色 青色 粉色 白色 黑色 灰色"
    )
    order = [*SHAPES, *COLORS, *BACKGROUNDS]
    assert [CHINESE[word] for word in order] == listed.split()

"""The words of the pocket world, in English and Chinese, with the colours and sizes they stand for.

Tuples fix the order: the index of a word is the integer that ``SceneBatch`` holds for it.
"""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLORS = {  # sRGB, 0..255
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "cyan": (40, 200, 210),
    "pink": (245, 140, 180),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (15, 15, 15), "gray": (128, 128, 128)}
SIZES = {"small": 0.30, "large": 0.44}  # longer side of the bounding box, as a fraction of the picture's side
RELATIONS = ("left of", "right of", "above", "below")

CHINESE = {
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "ring": "圆环",
    "cross": "十字",
    "heart": "心形",
    "diamond": "菱形",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "cyan": "青色",
    "pink": "粉色",
    "white": "白色",
    "black": "黑色",
    "gray": "灰色",
    "small": "小",
    "large": "大",
    "left of": "左边",
    "right of": "右边",
    "above": "上方",
    "below": "下方",
}
ENGLISH = {chinese: english for english, chinese in CHINESE.items()}

"""Is a picture right, how often, and at what cost: the pocket judge, accuracy, and comparison of samplers."""

from imagen_kit.evaluation.judge import Judge, Limits, Reading, Seen

__all__ = ["Judge", "Limits", "Reading", "Seen"]

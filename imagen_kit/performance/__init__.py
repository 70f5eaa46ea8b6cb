"""How a stage's network is run: precision, memory layout, compilation, quantisation, attention kernel.

``Performance`` holds the choices, ``choose`` resolves ``auto`` for a network and a device, ``apply`` carries the
choices out on a network and says in words what was done.
"""

from imagen_kit.performance.applying import Applied, apply, apply_to_codec
from imagen_kit.performance.automatic import choose
from imagen_kit.performance.options import Performance
from imagen_kit.performance.prepacking import prepack, unpack

__all__ = ["Applied", "Performance", "apply", "apply_to_codec", "choose", "prepack", "unpack"]

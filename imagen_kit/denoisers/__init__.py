"""Registry of denoisers: ``create(name, **config)``, ``names(pattern)``, ``register``, ``describe``."""

from imagen_kit.registry import Registry

registry = Registry("denoiser", __name__)
create = registry.create
names = registry.names
register = registry.register
describe = registry.describe

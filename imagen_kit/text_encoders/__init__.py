"""Registry of text encoders: ``create(name, **config)``, ``names(pattern)``, ``register``, ``describe``."""

from imagen_kit.registry import Registry

registry = Registry("text encoder", __name__)
create = registry.create
names = registry.names
register = registry.register
describe = registry.describe

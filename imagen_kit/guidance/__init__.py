"""Registry of guidance strategies: ``create(name, **config)``, ``names(pattern)``, ``register``, ``describe``."""

from imagen_kit.registry import Registry

registry = Registry("guidance", __name__)
create = registry.create
names = registry.names
register = registry.register
describe = registry.describe

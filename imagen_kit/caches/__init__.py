"""Registry of step caches: ``create(name, **config)``, ``names(pattern)``, ``register``, ``describe``."""

from imagen_kit.registry import Registry

registry = Registry("cache", __name__)
create = registry.create
names = registry.names
register = registry.register
describe = registry.describe

"""Registry of schedules: ``create``, ``names``, ``register`` and ``describe``."""

from imagen_kit.registry import Registry

registry = Registry("schedule", __name__)
create = registry.create
names = registry.names
register = registry.register
describe = registry.describe

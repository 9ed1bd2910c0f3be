"""Settings that every test shares."""

from hypothesis import settings

settings.register_profile("jfp4", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("jfp4")

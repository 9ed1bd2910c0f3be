"""A package, so that its test_config is not taken for the trainer's."""

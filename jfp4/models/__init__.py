"""The models that jfp4 trains."""

"""The reference trainer: prepares text, trains a Llama model in FP4 and measures the result."""

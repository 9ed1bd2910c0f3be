"""The operations of FP4 training, one idea a file; ``linear`` ties them together."""

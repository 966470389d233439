"""What a DSPy user changes to fine-tune on Ray: three plain scripts, run without a model."""

"""Tiny random models of the real vision-language classes of transformers, each with handwritten inputs.

No processor, no tokenizer and no torchvision: the inputs are what a processor would return.
"""

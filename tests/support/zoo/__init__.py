"""Tiny random models of the real vision-language classes of transformers, each with inputs made by hand.

No processor, no tokenizer and no torchvision: the inputs are what a processor would hand over.
"""

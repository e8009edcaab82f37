"""Real processors of transformers around a tiny tokenizer, which fit the models of the zoo.

`pair(name)` returns a model of the zoo and its processor; each file adds processors with `@processor`.
"""

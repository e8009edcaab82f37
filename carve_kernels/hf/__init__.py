"""CARVE on transformers models. A reading map, in the order of the flow; imports go up this list only.

1. Model access. `loading` finds a checkpoint and loads it, `processors` its processor. `model` finds the decoder, the
   layers and the devices of a model, and foreign code in its forward. `names` and `caches` spell the private names of
   transformers. `inputs` opens images and builds prompts; `image_features` runs each image through the processor and
   the vision tower once. `query_rows` finds the captured rows of a prompt by its `prompt_text` and the processor's
   `chat_templates`. `attention_patch` wraps attention functions; `layer_batch` captures the layers of a forward and
   assembles the maps. `tensors` reads weights of any kind for checksums.
2. `layouts`: where visual tokens are and which part of an image each covers. A module per kind of layout;
   `letterbox` pads images that a processor would crop.
3. `session`: `capture_attention`. `session` installs the hooks, `forward_tracker` decides to which prompt a forward
   belongs (`cache_tracker`: by its KV cache; `generate_guard`: inside `generate`), `attention_masks` reads its mask,
   `recording` keeps its captures. `contract` checks an untested transformers.
4. `decoding`: greedy decoding with captured rows, many prompts in one batch over a shared prefix cache (tree decoding),
   or one `generate` per prompt (the sequential fallback).
5. `engine`: `CarveEngine`. Questions become requests; first pass over the original images, carve, second pass over the
   refined images, results; the cache keeps general maps by a fingerprint of the model.
6. `profile`: finds the layers and rows of a model whose maps follow the question.
"""
